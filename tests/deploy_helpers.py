"""What the tests of deployments share: a federation of processes, its run folder as it grows, waiting with a limit.

A busy machine makes clients miss deadlines, so which clients took part in a round is read from the journal, never
assumed: :func:`hashes_in_one_process` repeats the run with exactly these. Tests wait for events. The time limits below
only end a test that hangs.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

import baffle as bf
from baffle.core.aggregate import nothing
from baffle.core.state import State, weights_sha256
from baffle.core.types import Task
from baffle.data import Dataset
from baffle.deploy.federation import Federation
from baffle.deploy.flower.app_bundle import app_folder
from baffle.engines import Exchange
from baffle.protocol.encoding import decode_row
from baffle.runfolder.clients import RoundLog, Visit, read_members, read_rounds
from baffle.runtimes import Runtime
from baffle.training.build import assemble_server
from baffle.training.options import train_config

OPTIONS: dict[str, str | int | float] = {
    "model": "mlp",
    "batch-size": 8,
    "num-directions": 6,
    "sigma": 1e-3,
    "evaluate-every": 50,
    "snapshot-every": 10,
}
"""A round takes a client some milliseconds."""

WAITS_FOR_ALL = 60.0
"""A deadline in seconds that an answer misses only if its client is gone: the round then waits for everyone."""


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
        """Start a ``baffle node`` for each part of the data."""
        for n, file in enumerate(self.files):
            self.fed.start_node(f"client-{n}", file, *options)

    def submit(self, config: dict[str, str | int | float], **values: str | int | float | bool) -> int:
        """Train by these options, or continue."""
        toml = self.folder / "train.toml"
        toml.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in config.items()))
        defaults: dict[str, str | int | float | bool] = {"clients": len(self.files), "deadline": 4.0, "patience": 300.0}
        run = self.fed.submit(app_folder(), config=str(toml), out=str(self.out), **{**defaults, **values})
        self.submitted.append(run)
        return run

    def rounds(self) -> int:
        """How many lines of metrics there are."""
        file = self.out / "metrics.jsonl"
        return file.read_bytes().count(b"\n") if file.exists() else 0

    def reach(self, rounds: int, seconds: float = 300) -> None:
        """Wait until ``rounds`` rounds are done."""
        until(lambda: self.rounds() >= rounds, seconds, lambda: f"round {rounds}, only {self.rounds()}{self.tails()}")

    def finish(self, seconds: float = 600) -> None:
        """Wait until the run is done."""
        file = self.out / "summary.json"
        until(file.exists, seconds, lambda: f"the end of the run, only {self.rounds()} rounds{self.tails()}")

    def tails(self) -> str:
        """The newest lines of all processes."""
        tails = {file.stem: file.read_text(errors="replace")[-1500:] for file in sorted(self.folder.glob("*.log"))}
        return "".join(f"\n--- {name}\n{tail}" for name, tail in tails.items())

    def kill_server_app(self) -> None:
        """``kill -9`` of the one ServerApp."""
        [pid] = self.fed.server_apps()
        os.kill(pid, 9)
        until(lambda: pid not in self.fed.server_apps(), 60, "the end of the ServerApp")

    def kill_node(self, name: str) -> None:
        """``kill -9`` of a client."""
        self.fed.nodes[name].kill()
        self.fed.nodes[name].wait()

    def server_log(self) -> str:
        """What the ServerApps of all submissions logged, by ``flwr log``."""
        return "".join(self.fed.flwr("log", str(run), "local", "--show") for run in self.submitted)

    def logs(self) -> tuple[RoundLog, ...]:
        """What each round cost each client."""
        return read_rounds(self.out)

    def number(self, name: str) -> int:
        """The number of the client with this name."""
        return [member.name for member in read_members(self.out)].index(name)

    def outcomes(self, name: str) -> list[str]:
        """How a client took part, per round."""
        return [visit.outcome for _, visit in self.visits(name)]

    def visits(self, name: str) -> list[tuple[int, Visit]]:
        """The number of each round that is done, and how a client took part in it.

        The line of a round is written before its row: a round that is not done is left out, since it is repeated if
        the server is killed.
        """
        client, rounds = self.number(name), self.rounds()
        return [(log.round, v) for log in self.logs() if log.round < rounds for v in log.visits if v.client == client]


@contextmanager
def site(folder: Path, *, secure: bool = False, clients: int = 3) -> Iterator[Site]:
    """A SuperLink and a SuperExec, and the files of ``clients`` parts of digits; all processes end after it."""
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


# -- the same run in one process --------------------------------------------------------------------------------------


def weights_hashes(run: Path) -> list[str]:
    """Hashes of the weights after each round of a run folder."""
    return [record.weights_sha256 for record in bf.Journal.open(run).records]


def participants(run: Path) -> list[set[int]]:
    """The participants in each row of a run."""
    return [set(decode_row(row).participants) for row in bf.Journal.open(run).rows]


class RecordedParticipants(bf.LocalEngine):
    """All clients in this process; in each round those answer that a journal says took part in it.

    Sums are plain ones. Where the run makes secure sums, they are handed on as the secure ones are, and a round in
    which nobody took part is void.
    """

    def __init__(self, runtime: Runtime, clients: Sequence[Dataset], rounds: Sequence[Collection[int]]) -> None:
        super().__init__(runtime, clients, together=False)
        self._rounds = rounds

    def exchange(self, task: Task, participants: Sequence[int], state: State, rows: Sequence[bytes]) -> Exchange:
        present = sorted(self._rounds[task.round])
        if not present:
            return Exchange((), 0, 0, 0, 0, nothing(task))
        plain = super().exchange(msgspec.structs.replace(task, secure=0), present, state, rows)
        if not task.secure:
            return plain
        cohort = {reply.client: reply.weight for reply in plain.replies}
        return replace(plain, replies=(), total=bf.weighted_sum().combine(task, cohort, plain.replies))


def hashes_in_one_process(here: Site, rounds: Sequence[Collection[int]]) -> list[str]:
    """Hashes of the weights after each round of the same training in this process, by plain sums.

    ``rounds`` has the participants of each round, as :func:`participants` reads them.
    """
    options = train_config(here.folder / "train.toml", {"threads": 1})
    server = assemble_server(options)
    options = server.options
    engine = RecordedParticipants(server.runtime, bf.partition(server.train, clients=len(here.files)), rounds)
    run = bf.train(options.method(), engine, server.initial, rounds=len(rounds) - 1, seed=options.seed)
    return [record.weights_sha256 for record in run.records]
