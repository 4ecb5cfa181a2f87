"""Run the snippets of README and docs: python blocks in one namespace a file, shell blocks as they stand."""

import subprocess
from pathlib import Path

import pytest
from sybil import Example, Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser

ROOT = Path(__file__).parent


class ShellCodeBlockParser(CodeBlockParser):
    """Blocks marked ``bash``: run line by line in a scratch folder, with the environment's commands first."""

    language = "bash"

    def evaluate(self, example: Example) -> None:
        """Run the block; a failing command fails the test."""
        script = f'export PATH="{ROOT}/.venv/bin:$PATH"\nset -euo pipefail\n{example.parsed}'
        folder = example.namespace["folder"]
        done = subprocess.run(["bash", "-c", script], cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            raise AssertionError(f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}")


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A scratch folder that snippets run in."""
    path = tmp_path_factory.mktemp("snippets")
    monkeypatch.chdir(path)
    return path


pytest_collect_file = Sybil(
    parsers=[SkipParser(), PythonCodeBlockParser(), ShellCodeBlockParser()],
    patterns=["*.md"],
    fixtures=["folder"],
).pytest()
