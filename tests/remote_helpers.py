"""Clients on other machines, in one process: a transport of bytes with nodes that drop out, come late, or lie.

Time is a number that the engine's own sleeps move on, so that deadlines cost nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch.nn.functional as F

import baffle as bf
from baffle.client.participant import Participant
from baffle.core.state import State
from baffle.core.types import Task
from baffle.engines import Exchange
from baffle.engines.remote import engine as remote
from baffle.engines.remote.engine import Downlink, RemoteEngine
from baffle.engines.remote.transport import Arrival, Letter, Sent
from baffle.protocol.encoding import decode_row
from baffle.protocol.messages import Ask, Question, Response, Setup, decode_question, decode_response
from baffle.runfolder.clients import Roster
from baffle.runfolder.metrics import Record
from baffle.runtimes.pytorch.runtime import TorchRuntime
from helpers import initial_weights, linear

Twist = Callable[[Letter, Arrival], Sequence[Arrival]]
"""What a node's answer becomes on its way: (question, answer) -> answers."""

RUNTIME = TorchRuntime(linear(), F.cross_entropy, threads=1)
TRAIN, TEST = bf.load("digits")
SETUP_OF_DIGITS = Setup(
    table=RUNTIME.table, frozen="", shape=(1, 8, 8), classes=10, vocabulary=None, options={}, bundle=None
)
METHOD = bf.Method(num_directions=4, batch_size=8, sigma=1e-3, optimizer=bf.sgd(0.05, momentum=0.5))
DEADLINE = 10.0


class Clock:
    """Stands in for the module ``time``: sleeping is what makes time pass."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@dataclass
class Node:
    """A client of the federation. ``twist`` changes its answers, ``seconds`` is how long they take."""

    name: str
    address: int
    data: bf.Dataset
    setup: Setup = SETUP_OF_DIGITS
    online: bool = True
    seconds: float = 0.1
    twist: Twist = lambda letter, arrival: [arrival]
    participant: Participant = field(init=False)

    def __post_init__(self) -> None:
        self.restart()

    @property
    def identity(self) -> str:
        return f"{self.name:x<12}-key"

    def restart(self) -> None:
        """Forget everything."""
        self.participant = Participant(self.name, lambda setup: (RUNTIME, self.data))


@dataclass(frozen=True)
class Carried:
    """A letter that was sent, and what its node said to it (whatever became of that on the way)."""

    node: Node
    letter: Letter
    question: Question
    response: Response
    size: int


class Office:
    """Carries letters between an engine and nodes, as bytes."""

    def __init__(self, clock: Clock, nodes: Sequence[Node]) -> None:
        self.clock, self.members, self.carried = clock, list(nodes), list[Carried]()
        self.look: Callable[[], None] = lambda: None
        """Called whenever the engine looks who is connected."""
        self._ids = map(str, itertools.count())
        self._due: list[tuple[float, Arrival]] = []

    def nodes(self) -> Mapping[str, int]:
        self.look()
        return {node.identity: node.address for node in self.members if node.online}

    def send(self, letters: Sequence[Letter], ttl: float) -> list[Sent]:
        return [self._send(letter) for letter in letters]

    def receive(self, ids: Sequence[str]) -> list[Arrival]:
        now = self.clock.now
        come = [arrival for at, arrival in self._due if at <= now]
        self._due = [(at, arrival) for at, arrival in self._due if at > now]
        return come

    def inject(self, arrival: Arrival) -> None:
        """Put an answer into the mail that nobody asked for."""
        self._due.append((self.clock.now, arrival))

    def asked(self, node: Node) -> list[tuple[Ask, frozenset[str]]]:
        """The tasks that a node was asked, each with the names of its parcels."""
        return [
            (c.question, frozenset(c.letter.parcels))
            for c in self.carried
            if c.node is node and isinstance(c.question, Ask)
        ]

    def _send(self, letter: Letter) -> Sent:
        node = next((n for n in self.members if n.address == letter.node and n.online), None)
        size = len(letter.question) + sum(map(len, letter.parcels.values()))
        if node is None:
            return Sent("", size)
        id = next(self._ids)
        said = node.participant.answer(letter.question, letter.parcels, letter.client)
        carried = Carried(node, letter, decode_question(letter.question), decode_response(said), size)
        self.carried.append(carried)
        for arrival in node.twist(letter, Arrival(id, node.address, said, None, len(said))):
            self._due.append((self.clock.now + node.seconds, arrival))
        return Sent(id, size)


@dataclass
class Federation:
    """Nodes with parts of digits, and engines for them."""

    clock: Clock
    nodes: list[Node]
    office: Office

    def engine(
        self,
        *,
        clients: int | None = None,
        downlink: Downlink = "replay",
        quorum: float = 0.5,
        deadline: float = DEADLINE,
        patience: float = 1000.0,
        roster: Roster | None = None,
        setup: Setup = SETUP_OF_DIGITS,
    ) -> RemoteEngine:
        return RemoteEngine(
            self.office,
            RUNTIME,
            setup,
            clients=len(self.nodes) if clients is None else clients,
            downlink=downlink,
            quorum=quorum,
            deadline=deadline,
            patience=patience,
            roster=roster,
        )

    def train(
        self,
        out: Path | None = None,
        *,
        method: bf.Method = METHOD,
        rounds: int = 6,
        engine: RemoteEngine | None = None,
        progress: Callable[[Record], None] | None = None,
    ) -> bf.Run:
        engine = engine or self.engine(roster=Roster(out))
        return bf.train(method, engine, initial_weights(), rounds=rounds, out=out, snapshot_every=3, progress=progress)

    @property
    def data(self) -> tuple[bf.Dataset, ...]:
        return tuple(node.data for node in self.nodes)


class Chosen(bf.LocalEngine):
    """A local engine that only some of a round's participants answer: the reference for drop-outs."""

    def __init__(self, clients: Sequence[bf.Dataset], answers: Callable[[int, int], bool]) -> None:
        super().__init__(RUNTIME, clients, together=False)
        self._answers = answers

    def exchange(self, task: Task, participants: Sequence[int], state: State, rows: Sequence[bytes]) -> Exchange:
        there = [client for client in participants if self._answers(task.round, client)]
        return super().exchange(task, there, state, rows)


def local(
    clients: Sequence[bf.Dataset],
    *,
    method: bf.Method = METHOD,
    rounds: int = 6,
    answers: Callable[[int, int], bool] = lambda round, client: True,
) -> bf.Run:
    """The same run with all clients in this process."""
    return bf.train(method, Chosen(clients, answers), initial_weights(), rounds=rounds)


def who_answered(run: Path) -> list[tuple[int, ...]]:
    """The participants in each row of a run."""
    return [decode_row(row).participants for row in bf.Journal.open(run).rows]


def federation(clients: int = 3, clock: Clock | None = None) -> Federation:
    """Nodes a, b, c, ... with the numbers 0, 1, 2, ...; the engine's module must be given the clock."""
    clock = clock or Clock()
    parts = bf.partition(TRAIN, clients, seed=0)
    nodes = [Node(chr(ord("a") + i), 100 + i, part) for i, part in enumerate(parts)]
    return Federation(clock, nodes, Office(clock, nodes))


def patched_clock() -> Iterator[Clock]:
    """The engine's time, for as long as the generator lives."""
    clock = Clock()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote, "time", clock)
        yield clock
