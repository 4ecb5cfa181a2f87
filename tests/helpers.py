"""What the tests of run folders and commands share: a small run, edits of files, the command line in process."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import baffle as bf
from baffle.core.types import Task, Weights
from baffle.runtimes.pytorch.runtime import TorchRuntime
from baffle.training.loop import Progress

BIN = Path(sys.executable).parent
CHAIN = 32  # bytes of a checksum in rows.bin

METHOD = bf.Method(num_directions=4, batch_size=8, optimizer=bf.sgd(0.05, momentum=0.5))

TASK = Task(
    round=3,
    key=1,
    family="rank1",
    sharing="shared",
    difference="forward",
    num_directions=2,
    sigma=0.5,
    lattice=0,
    exponents=(-4,),
    clip=None,
    batch_size=None,
    local_steps=1,
    local_lr=0.0,
    quantum=1,
    state_sha256=b"",
)
"""A round's task to vary with ``msgspec.structs.replace``."""


def linear(inputs: int = 64, seed: int = 0) -> nn.Module:
    """A linear classifier of digits: 650 parameters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(inputs, 10))


def digits_engine(clients: int = 3, *, seed: int = 0, model: nn.Module | None = None) -> bf.LocalEngine:
    """Clients with parts of digits, on one thread."""
    train, _ = bf.load("digits")
    runtime = TorchRuntime(model or linear(), F.cross_entropy, threads=1)
    return bf.LocalEngine(runtime, bf.partition(train, clients, seed=seed))


def initial_weights() -> Weights:
    """The linear model's weights."""
    return TorchRuntime(linear(), F.cross_entropy).initial_weights()


def train_digits(
    out: Path | None,
    rounds: int = 8,
    *,
    method: bf.Method = METHOD,
    snapshot_every: int = 3,
    progress: Progress | None = None,
) -> bf.Run:
    """Train the linear model for some rounds: about 0.1 s."""
    return bf.train(
        method,
        digits_engine(),
        initial_weights(),
        rounds=rounds,
        out=out,
        snapshot_every=snapshot_every,
        progress=progress,
    )


def copy_run(source: Path, target: Path) -> Path:
    """A copy of a run folder to damage."""
    shutil.copytree(source, target)
    return target


def flip(file: Path, position: int, mask: int = 1) -> None:
    """Change one byte of a file."""
    data = bytearray(file.read_bytes())
    data[position] ^= mask
    file.write_bytes(data)


@dataclass(frozen=True)
class Place:
    """Where a record of ``rows.bin`` lies: its length, from ``start``; its row; its checksum, up to ``end``."""

    start: int
    row: int
    chain: int
    end: int


def places(run: Path) -> list[Place]:
    """Where each record of an intact ``rows.bin`` lies."""
    data, found, position = (run / "rows.bin").read_bytes(), list[Place](), 0
    for row in bf.Journal.open(run).rows:
        start = data.index(row, position)
        found.append(Place(position, start, start + len(row), start + len(row) + CHAIN))
        position = found[-1].end
    assert position == len(data)
    return found


def tree(folder: Path) -> list[str]:
    """Every path under a folder, hidden ones included."""
    return sorted(str(Path(where, name)) for where, folders, files in os.walk(folder) for name in [*folders, *files])


@dataclass(frozen=True)
class Outcome:
    """What a command did."""

    code: int
    out: str
    err: str


def invoke(folder: Path, *arguments: str | Path) -> Outcome:
    """Run ``baffle`` in this process with ``folder`` as the working directory."""
    from baffle import cli

    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["baffle", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            cli.main()
    code = exit.value.code
    assert isinstance(code, int)
    return Outcome(code, out.getvalue(), err.getvalue())


def start(
    folder: Path,
    *arguments: str | Path,
    env: Mapping[str, str] | None = None,
    sigint: signal.Handlers = signal.SIG_DFL,
) -> subprocess.Popen[str]:
    """Start the installed ``baffle`` as a process of its own.

    A suite that runs as a background job has SIGINT ignored; the process would inherit that, but for ``sigint``.
    """
    return subprocess.Popen(
        [BIN / "baffle", *arguments],
        cwd=folder,
        env={**os.environ, **(env or {})},
        preexec_fn=lambda: signal.signal(signal.SIGINT, sigint),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def spawn(folder: Path, *arguments: str | Path, env: Mapping[str, str] | None = None) -> Outcome:
    """Run the installed ``baffle`` as a process of its own, to its end."""
    process = start(folder, *arguments, env=env)
    out, err = process.communicate()
    return Outcome(process.returncode, out, err)
