"""What ``import baffle`` offers: every public name and nothing else, documented, and loaded when it is needed."""

from __future__ import annotations

import ast
import inspect
import pkgutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import baffle as bf
from baffle.errors import MissingExtraError

SOURCE = Path(bf.__file__).read_text()


def test_dir_lists_the_public_names_alone() -> None:
    import_module("baffle.cli")  # a submodule that is imported becomes an attribute
    assert set(dir(bf)) == {*bf.__all__, "__version__"}
    assert bf.__all__ == sorted(bf.__all__)


@pytest.mark.parametrize("name", bf.__all__)
def test_a_public_name_is_found_and_documented(name: str) -> None:
    try:
        public = getattr(bf, name)
    except MissingExtraError as error:
        pytest.skip(str(error))
    assert vars(public).get("__doc__") if inspect.isclass(public) else public.__doc__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'baffle' has no attribute 'nothing'"):
        _ = bf.nothing


def test_editors_see_the_names_that_are_loaded_when_used() -> None:
    blocks = [node for node in ast.parse(SOURCE).body if isinstance(node, ast.If)]
    imported = {
        name.name: node.module
        for block in blocks
        if ast.unparse(block.test) == "TYPE_CHECKING"
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for name in node.names
    }
    assert imported == bf._LAZY


def test_no_module_has_the_name_of_a_public_function() -> None:
    """A submodule would replace the function as soon as it is imported."""
    assert not {module.name for module in pkgutil.iter_modules(bf.__path__)} & set(bf.__all__)


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import sys, baffle; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "onnx", "onnxruntime", "openvino", "flwr", "typer", "rich"} & set(done.stdout.split())
