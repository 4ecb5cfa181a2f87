"""Fixtures that several tests of commands share."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import baffle as bf
from baffle.runtimes import Runtime
from baffle.runtimes.choose import Choice
from baffle.training import build as assemble
from cli_helpers import SMALL_RUN, TINY, TRAIN_SHORT, TRAIN_TINY
from helpers import Outcome, copy_run, invoke
from status_helpers import deployed as deployed
from status_helpers import finished as finished


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """A small run of the command line and what it printed. Never changed: tests take copies."""
    folder = tmp_path_factory.mktemp("trained")
    return folder / "run", invoke(folder, *SMALL_RUN, "--out", "run")


@pytest.fixture
def run(trained: tuple[Path, Outcome], tmp_path: Path) -> Path:
    """A copy of the run to damage."""
    return copy_run(trained[0], tmp_path / "run")


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The measurement is over at once, and finds what this list has first; more ways are added as they are offered."""
    wanted: list[str] = []

    def choose(candidates: dict[str, Callable[[], Runtime]], *arguments: object, **options: object) -> Choice:
        name = wanted[0]
        wanted[:] = list(candidates)
        return Choice(candidates[name](), name, dict.fromkeys(candidates, 1234.5))

    monkeypatch.setattr(assemble, "choose", choose)
    return wanted


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No command looks for another machine."""
    asked: list[object] = []

    def refuse(*arguments: object, **options: object) -> None:
        asked.append(arguments)
        raise OSError("no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield
    assert asked == []


@pytest.fixture
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BAFFLE_DATA", raising=False)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without any of the options. Never changed: tests take copies."""
    folder = tmp_path_factory.mktemp("plain")
    assert invoke(folder, *TRAIN_SHORT).code == 0
    return folder / "run"


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A model of the user's own, where Python finds it."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "tiny_model.py").write_text(TINY)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield


@pytest.fixture(scope="module")
def exports() -> Iterator[dict[Any, bf.Bundle]]:
    """A model that was exported once is not exported again, which takes a second; tests may empty this."""
    from baffle import exporter

    made: dict[Any, bf.Bundle] = {}
    real = exporter.export

    def export(model: nn.Module, loss: Any, data: bf.Dataset, **options: Any) -> bf.Bundle:
        weights = [(n, p.requires_grad, p.detach().numpy().tobytes()) for n, p in model.named_parameters()]
        masks = {name: mask.tobytes() for name, mask in (options.get("masks") or {}).items()}
        key = repr((model, weights, options | {"masks": masks}))
        if key not in made:
            made[key] = real(model, loss, data, **options)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporter, "export", export)
        yield made


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run to start from. Never changed."""
    folder = tmp_path_factory.mktemp("base")
    assert invoke(folder, *TRAIN_TINY, "--out", "base").code == 0
    return folder / "base"
