"""Imports go one way: the contracts of pyproject.toml hold, and cover every module."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_import_contracts_hold() -> None:
    command = [
        str(Path(sys.executable).parent / "lint-imports"),
        "--no-cache",
        "--config",
        str(ROOT / "pyproject.toml"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_every_module_has_its_place() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    placed = {name.strip() for layer in contracts[0]["layers"] for name in layer.split("|")}
    found = {
        f"baffle.{p.stem}" for p in (ROOT / "src/baffle").iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()
    }
    assert found - {"baffle.__init__", "baffle.__main__"} == placed


def test_the_internals_of_flower_are_used_in_one_folder() -> None:
    public = {"flwr.app", "flwr.clientapp", "flwr.serverapp"}
    for file in sorted((ROOT / "src/baffle").rglob("*.py")):
        if file.parent.name == "flower":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flwr"):
                assert node.module in public, f"{file}: {node.module}"
            if isinstance(node, ast.Import):
                assert not any(name.name.startswith("flwr") for name in node.names), file
