"""Imports go one way: the contracts of pyproject.toml hold, and cover every module. Tests mirror the code."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src/baffle"

LONGEST_CHAIN = 16
"""Imports that follow one another, at most, from a module to one that imports nothing of the package."""

FOLDERS, LAYERS = 15, 9
"""Folders of the package, and layers that they form, at most: as many as one remembers."""

EXCEPTIONS: Mapping[str, str] = {
    "__init__.py": "the public names: test_public_names.py, and every other test uses them",
    "__main__.py": "one call; tests/cli runs it",
    "cli/__init__.py": "the entry point: each command's tests go through it",
    "deploy/federation.py": "the processes that every test of tests/deploy starts",
    "deploy/server_app.py": "in deploy/test_deploy.py, as processes; refused options in deploy/test_client_model.py",
    "engines/__init__.py": "a protocol and a struct; its implementations are tested",
    "engines/remote/transport.py": "a protocol and structs; its implementations are tested",
    "exporter/blocks.py": "in runtimes/test_credit_contract.py, as what it exports is evaluated",
    "exporter/__init__.py": "in test_export.py, named after what users call",
    "report/__init__.py": "loads pages.py when it is first used: in report/test_pages.py",
    "runtimes/credit.py": "in runtimes/test_credit_contract.py, which holds every runtime to it",
    "runtimes/onnx/blocks.py": "in runtimes/test_credit_contract.py, which holds every runtime to it",
    "runtimes/pytorch/credit_table.py": "in runtimes/pytorch/test_credit.py and test_chain.py",
    "runtimes/__init__.py": "a protocol and structs; test_contract.py holds every runtime to it",
}
"""Modules of the package without a test file of their own name in the same place, and why."""


# -- imports ---------------------------------------------------------------------------------------------------------


def test_import_contracts_hold() -> None:
    command = [
        str(Path(sys.executable).parent / "lint-imports"),
        "--no-cache",
        "--config",
        str(ROOT / "pyproject.toml"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def layers() -> list[list[str]]:
    """The names in each layer of the import contract, from the top."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    return [[name.strip() for name in layer.split("|")] for layer in contracts[0]["layers"]]


def test_every_module_has_its_place() -> None:
    modules = {f"baffle.{p.stem}" for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    placed = [name for layer in layers() for name in layer]
    assert len(placed) == len(set(placed))
    assert modules - {"baffle.__init__", "baffle.__main__"} == set(placed)


def test_the_layers_are_few_enough_to_remember() -> None:
    names = [name for layer in layers() for name in layer]
    print("\n".join(" | ".join(layer) for layer in layers()))
    folders = [name for name in names if (PACKAGE / name.removeprefix("baffle.")).is_dir()]
    files = [name for name in names if name not in folders]
    assert len(folders) <= FOLDERS, folders
    assert files == ["baffle.errors", "baffle.files"]
    assert len(layers()) <= LAYERS


def test_the_internals_of_flower_are_used_in_one_folder() -> None:
    public = {"flwr.app", "flwr.clientapp", "flwr.serverapp"}
    for file in sorted(PACKAGE.rglob("*.py")):
        if file.parent.name == "flower":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flwr"):
                assert node.module in public, f"{file}: {node.module}"
            if isinstance(node, ast.Import):
                assert not any(name.name.startswith("flwr") for name in node.names), file


def imports_of_the_package(package: Path = PACKAGE) -> dict[str, set[str]]:
    """Each module of the package, and the modules of the package that it imports, inside functions too.

    Imports for type checking alone do not count: they never run. The package's own ``__init__`` and ``__main__``, which
    import the rest by its names, are left out.
    """
    files = {module_name(file, package): file for file in package.rglob("*.py")}
    graph: dict[str, set[str]] = {}
    for module, file in files.items():
        graph[module] = set()
        for node in nodes_that_run(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module in files:
                named = {f"{node.module}.{alias.name}" for alias in node.names}
                graph[module] |= {name if name in files else node.module for name in named}
            if isinstance(node, ast.Import):
                graph[module] |= {alias.name for alias in node.names} & files.keys()
    apart = {package.name, f"{package.name}.__main__"}
    return {module: imported - apart - {module} for module, imported in graph.items() if module not in apart}


def nodes_that_run(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node of a tree but what stands below ``if TYPE_CHECKING``."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        yield node
        yield from nodes_that_run(node)


def module_name(file: Path, package: Path) -> str:
    return ".".join(file.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__")


def longest_chain(graph: Mapping[str, set[str]]) -> tuple[str, ...]:
    """The longest chain of modules each of which imports the next. RecursionError if imports go in a circle."""

    @cache
    def chain(module: str) -> tuple[str, ...]:
        return (module, *max(map(chain, sorted(graph[module])), key=len, default=()))

    return max(map(chain, graph), key=len)


def test_chains_of_imports_are_short() -> None:
    chain = longest_chain(imports_of_the_package())
    print(len(chain) - 1, "imports:", " > ".join(chain))
    assert len(chain) - 1 <= LONGEST_CHAIN, chain


def test_the_longest_chain_of_a_small_graph() -> None:
    graph = {"a": {"b", "d"}, "b": {"c"}, "c": {"d"}, "d": set[str]()}
    assert longest_chain(graph) == ("a", "b", "c", "d")


# -- tests -----------------------------------------------------------------------------------------------------------


def modules_to_test() -> Iterator[tuple[str, Path]]:
    """Every module by its path in the package, and where its tests are expected.

    A package's ``__init__`` counts where it defines something; ``x/__init__.py`` is tested by ``tests/x/test_x.py``.
    """
    for file in sorted(PACKAGE.rglob("*.py")):
        path = file.relative_to(PACKAGE)
        name = path.stem
        if name == "__init__":
            if not any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in ast.parse(file.read_text()).body):
                continue
            name = file.parent.name
        yield path.as_posix(), ROOT / "tests" / path.parent / f"test_{name}.py"


def test_tests_mirror_the_package() -> None:
    missing = {path for path, tests in modules_to_test() if not tests.exists()}
    assert missing - EXCEPTIONS.keys() == set(), "each needs the test file of its name, or an exception with the reason"
    assert EXCEPTIONS.keys() - missing == set(), "these have tests, or are gone: they are no exceptions any more"
