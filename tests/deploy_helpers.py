"""What the tests of deployments share: a federation of processes, its run folder as it grows, waiting with a limit."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

import baffle as bf
from baffle.core.state import weights_sha256
from baffle.deploy.federation import Federation
from baffle.deploy.flower.app_bundle import app_folder
from baffle.runfolder.clients import RoundLog, read_members, read_rounds

OPTIONS: dict[str, str | int | float] = {
    "model": "mlp",
    "batch-size": 8,
    "num-directions": 6,
    "sigma": 1e-3,
    "evaluate-every": 50,
    "snapshot-every": 10,
}
"""A round costs a client some milliseconds."""


def until(condition: Callable[[], object], seconds: float, what: str | Callable[[], str]) -> None:
    """Wait until a condition holds; fail when it takes longer."""
    give_up = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > give_up:
            pytest.fail(f"not within {seconds:g} s: {what if isinstance(what, str) else what()}")
        time.sleep(0.05)


@dataclass
class Site:
    """A federation of processes in a folder, and the run that it trains."""

    fed: Federation
    out: Path
    files: list[Path]
    submitted: list[int] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        """Where everything is."""
        return self.fed.folder

    def log(self, name: str) -> str:
        """What a process printed."""
        file = self.folder / f"{name}.log"
        return file.read_text(errors="replace") if file.exists() else ""

    def start_nodes(self, *options: str) -> None:
        """Start a warm client for each part of the data."""
        for n, file in enumerate(self.files):
            self.fed.start_node(f"client-{n}", file, *options)

    def submit(self, config: dict[str, str | int | float], **values: str | int | float | bool) -> int:
        """Train by these options, or continue."""
        toml = self.folder / "train.toml"
        toml.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in config.items()))
        told: dict[str, str | int | float | bool] = {"clients": len(self.files), "deadline": 4.0, "patience": 300.0}
        run = self.fed.submit(app_folder(), config=str(toml), out=str(self.out), **{**told, **values})
        self.submitted.append(run)
        return run

    def rounds(self) -> int:
        """How many lines of metrics there are."""
        file = self.out / "metrics.jsonl"
        return file.read_bytes().count(b"\n") if file.exists() else 0

    def reach(self, rounds: int, seconds: float = 90) -> None:
        """Wait until so many rounds are done."""
        until(lambda: self.rounds() >= rounds, seconds, lambda: f"round {rounds}, only {self.rounds()}{self.told()}")

    def finish(self, seconds: float = 180) -> None:
        """Wait until the run is done."""
        file = self.out / "summary.json"
        until(file.exists, seconds, lambda: f"the end of the run, only {self.rounds()} rounds{self.told()}")

    def told(self) -> str:
        """The newest lines of all processes."""
        tails = {file.stem: file.read_text(errors="replace")[-1500:] for file in sorted(self.folder.glob("*.log"))}
        return "".join(f"\n--- {name}\n{tail}" for name, tail in tails.items())

    def kill_server_app(self) -> None:
        """``kill -9`` of the one ServerApp."""
        [pid] = self.fed.server_apps()
        os.kill(pid, 9)
        until(lambda: pid not in self.fed.server_apps(), 10, "the end of the ServerApp")

    def kill_node(self, name: str) -> None:
        """``kill -9`` of a client."""
        self.fed.nodes[name].kill()
        self.fed.nodes[name].wait()

    def server_log(self) -> str:
        """What the ServerApps of all submissions logged, by ``flwr log``."""
        return "".join(self.fed.flwr("log", str(run), "local", "--show") for run in self.submitted)

    def logs(self) -> tuple[RoundLog, ...]:
        """What each round cost whom."""
        return read_rounds(self.out)

    def number(self, name: str) -> int:
        """The number of the client with this name."""
        return [member.name for member in read_members(self.out)].index(name)

    def outcomes(self, name: str) -> list[str]:
        """What became of a client's question, round by round."""
        client = self.number(name)
        return [visit.outcome for log in self.logs() for visit in log.visits if visit.client == client]


@contextmanager
def site(folder: Path, *, secure: bool = False, clients: int = 3) -> Iterator[Site]:
    """A SuperLink and a SuperExec, and the files of so many clients' parts of digits; all ended behind it."""
    train, _ = bf.load("digits")
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"client-{n}.npz" for n in range(clients)]
    for file, part in zip(files, bf.partition(train, clients=clients), strict=True):
        np.savez(file, x=part.x, y=part.y)
    with Federation(folder, secure=secure) as fed:
        fed.start()
        yield Site(fed, folder.resolve() / "run", files)


def check_run(run: Path, rounds: int) -> str:
    """A finished run has all its rounds, and its weights are those that its journal gives; their hash."""
    journal = bf.Journal.open(run)
    assert journal.damage is None
    assert not journal.lost
    assert [record.round for record in journal.records] == list(range(rounds + 1))
    state = list(journal.states())[-1]  # raises if a row does not fit
    digest = weights_sha256(state.weights).hex()
    assert json.loads((run / "summary.json").read_text())["weights_sha256"] == digest
    assert journal.records[-1].weights_sha256 == digest
    assert sorted({log.round for log in read_rounds(run)}) == list(range(rounds + 1))
    return digest


def peak_mb(pid: int) -> float:
    """Peak resident memory of a process, in MiB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    [peak] = [int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")]
    return peak


def one_line(text: str, *parts: str) -> None:
    """What a command printed is one line with these parts."""
    assert len(text.strip().splitlines()) == 1, text
    assert "Traceback" not in text
    for part in parts:
        assert part in text


def members(run: Path) -> Sequence[str]:
    """Names of the clients that a run has had."""
    return [member.name for member in read_members(run)]
