"""Processes without PyTorch at the other end of pipes: a bundle, the clients' data and the commands that start them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import baffle as bf
from baffle.client import edge
from baffle.core.types import DEFAULT_BITS, Reply, Weights, packed_size
from baffle.engines.pipe import PipeEngine, write_clients
from baffle.protocol.messages import TrainResponse
from baffle.protocol.pipes import (
    Hello,
    WorkRequest,
)
from baffle.runtimes.onnx.bundle import Precision
from helpers import TASK

CLIENTS = 3

METHOD = bf.Method(num_directions=6, batch_size=8, sigma=1e-3, optimizer=bf.adam(0.05))

encode = msgspec.msgpack.encode


@dataclass(frozen=True)
class Fleet:
    """A bundle, the clients' data, and the commands that start them."""

    bundle: bf.Bundle
    clients: tuple[bf.Dataset, ...]
    commands: list[list[str]]
    folder: Path

    def engine(self) -> PipeEngine:
        return PipeEngine(self.bundle, self.commands, self.runtime())

    def runtime(self) -> bf.OrtRuntime:
        return bf.OrtRuntime(self.bundle, 1)

    def simulation(self) -> bf.LocalEngine:
        return bf.LocalEngine(self.runtime(), self.clients, together=False)


def small(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Hardswish(), nn.Linear(16, 10))


def make_fleet(folder: Path, precision: Precision, credit: str | None = None) -> Fleet:
    train, _ = bf.load("digits")
    bundle = bf.export(small(), F.cross_entropy, train, precision=precision, credit=credit)
    clients = bf.partition(train, CLIENTS)
    return Fleet(bundle, clients, write_clients(bundle, clients, folder), folder)


def assert_trains_as_simulated(fleet: Fleet, engine: PipeEngine, method: bf.Method) -> None:
    """Processes give the weights of the simulation, for as many passes."""
    initial = fleet.bundle.initial
    over_pipes = bf.train(method, engine, initial, rounds=3, seed=5)
    simulated = bf.train(method, fleet.simulation(), initial, rounds=3, seed=5)
    assert over_pipes.weights_sha256 == simulated.weights_sha256
    assert (over_pipes.weights != initial).any()
    for ours, theirs in zip(over_pipes.records, simulated.records, strict=True):
        assert ours.forward_passes == theirs.forward_passes
        assert ours.samples_forwarded == theirs.samples_forwarded


def hello(fleet: Fleet, **changes: object) -> Hello:
    return msgspec.structs.replace(Hello(100, fleet.bundle.sha256, {"runtime": "ort"}), **changes)


def answer(**changes: object) -> TrainResponse:
    scalars = bytes(packed_size(6, DEFAULT_BITS))
    zeros = Reply(round=0, client=0, weight=100, scalars=scalars, magnitudes=(0,), clipped=0, nonfinite=0)
    return TrainResponse(msgspec.structs.replace(zeros, **changes))


NAN, INF = float("nan"), float("inf")


def work(weights: Weights, client: int = 0, **changes: object) -> WorkRequest:
    task = msgspec.structs.replace(TASK, **{"batch_size": 4, "sigma": 0.01, **changes})
    return WorkRequest(client, task, weights.astype("<f4").tobytes())


def main(*arguments: str | Path) -> int:
    """``python -m baffle.client.edge`` in this process, which keeps its standard output."""
    original = os.dup(1)
    try:
        return edge.main(list(map(str, arguments)))
    except SystemExit as exit:
        return int(exit.code or 0)
    finally:
        os.dup2(original, 1)
        os.close(original)


def one_line(captured: Any, *words: str) -> None:
    assert captured.out == ""
    assert captured.err.startswith("error: "), captured.err
    assert captured.err.count("\n") == 1, captured.err
    for word in words:
        assert word in captured.err


@contextlib.contextmanager
def without_torch(folder: Path) -> Iterator[None]:
    """In every process that starts meanwhile, importing PyTorch fails."""
    (folder / "torch").mkdir()
    (folder / "torch/__init__.py").write_text("raise ImportError('no PyTorch on this machine')\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder))
        yield
