"""``baffle node``: what its owner decides, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import baffle as bf
from baffle.errors import BaffleError
from baffle.training.build import assemble_server
from baffle.training.options import TrainConfig
from cli_helpers import refused
from helpers import invoke

pytestmark = pytest.mark.usefixtures("no_network", "no_environment")


NODE = ("node", "--superlink", "localhost:1", "--data", "mine.npz", "--insecure")


@pytest.mark.parametrize(
    ("flags", "strategy", "memory"),
    [
        ((), "copies", None),
        (("--strategy", "stacked"), "stacked", None),
        (("--strategy", "streaming", "--memory", "64MB"), "streaming", 64_000_000),
        (("--memory", "32MiB"), "copies", 2**25),
    ],
)
def test_a_node_evaluates_as_its_owner_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], strategy: str, memory: int | None
) -> None:
    pytest.importorskip("flwr")
    from baffle.deploy import client_model, server_app

    made: list[client_model.Own] = []

    def builder(data: bf.Dataset, own: client_model.Own) -> None:
        made.append(own)
        raise BaffleError("here")

    monkeypatch.setattr(client_model, "builder", builder)
    data, _ = bf.load("digits")
    np.savez(tmp_path / "mine.npz", x=data.x[:8], y=data.y[:8])
    refused(invoke(tmp_path, *NODE, "--threads", "2", *flags), "here")
    options = TrainConfig(model="mlp", threads=1, strategy="copies", memory="1GB")  # the server's own way
    setup = server_app.setup_of(options, assemble_server(options))
    runtime = client_model.runtime_for(setup, made[0])
    told = {"runtime": "torch", "threads": 2, "strategy": strategy, "memory": memory}
    assert {name: runtime.plan.get(name) for name in told} == told


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--strategy", "auto"), ("strategy = 'auto'", "copies, stacked, streaming")),
        (("--strategy", "stream"), ("strategy = 'stream'", "did you mean streaming?")),
        (("--memory", "lots"), ("memory = 'lots'", "64MB, 64MiB or 64000000")),
        (("--memory", "0"), ("memory = '0'", "64MB")),
    ],
)
def test_a_node_refuses_what_it_cannot_do_in_one_line(
    tmp_path: Path, flags: tuple[str, ...], words: tuple[str, ...]
) -> None:
    pytest.importorskip("flwr")
    np.savez(tmp_path / "mine.npz", x=np.zeros((2, 1, 8, 8), np.float32), y=np.zeros(2, np.int64))
    refused(invoke(tmp_path, *NODE, *flags), *words)
