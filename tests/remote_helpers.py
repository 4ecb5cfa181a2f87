"""A federation in one process, over the memory transport: nodes with parts of digits, engines, and references."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import torch.nn.functional as F

import baffle as bf
from baffle.client.participant import Participant
from baffle.core.state import State
from baffle.core.types import Task
from baffle.engines import Exchange
from baffle.engines.remote.downlink import Downlink
from baffle.engines.remote.engine import RemoteEngine
from baffle.engines.remote.memory import MemoryNode, MemoryTransport, SimulatedClock, Twist
from baffle.engines.remote.transport import Arrival, Request
from baffle.protocol.encoding import decode_row
from baffle.protocol.messages import EnrolResponse, Setup, TrainResponse, decode_response
from baffle.runfolder.clients import Roster
from baffle.runfolder.metrics import Record
from baffle.runtimes.pytorch.runtime import TorchRuntime
from helpers import initial_weights, linear

RUNTIME = TorchRuntime(linear(), F.cross_entropy, threads=1)
TRAIN, TEST = bf.load("digits")
SETUP_OF_DIGITS = Setup(
    table=RUNTIME.table, frozen="", shape=(1, 8, 8), classes=10, vocabulary=None, options={}, bundle=None
)
METHOD = bf.Method(num_directions=4, batch_size=8, sigma=1e-3, optimizer=bf.sgd(0.05, momentum=0.5))
DEADLINE = 10.0


class Node(MemoryNode):
    """A client with a part of digits."""

    def __init__(self, name: str, address: int, data: bf.Dataset, *, online: bool = True) -> None:
        self.data = data
        super().__init__(name, address, self.start, online=online)

    def start(self) -> Participant:
        return Participant(self.name, lambda setup: (RUNTIME, self.data))


@dataclass
class Federation:
    """Nodes with parts of digits, and engines for them."""

    clock: SimulatedClock
    nodes: list[Node]
    network: MemoryTransport

    @classmethod
    def of(cls, nodes: list[Node]) -> Federation:
        clock = SimulatedClock()
        return cls(clock, nodes, MemoryTransport(nodes, clock))

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
            self.network,
            RUNTIME,
            setup,
            clients=len(self.nodes) if clients is None else clients,
            downlink=downlink,
            quorum=quorum,
            deadline=deadline,
            patience=patience,
            roster=roster,
            clock=self.clock,
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


def federation(clients: int = 3) -> Federation:
    """Nodes a, b, c, ... with the numbers 0, 1, 2, ..."""
    parts = bf.partition(TRAIN, clients, seed=0)
    return Federation.of([Node(chr(ord("a") + i), 100 + i, part) for i, part in enumerate(parts)])


def lost(request: Request, arrival: Arrival) -> list[Arrival]:
    """A node that takes requests and never answers."""
    return []


def saying(make: Callable[[TrainResponse], bytes]) -> Twist:
    """A node whose answers to tasks are others."""

    def twist(request: Request, arrival: Arrival) -> list[Arrival]:
        assert arrival.response is not None
        answer = decode_response(arrival.response)
        if not isinstance(answer, TrainResponse):
            return [arrival]
        data = make(answer)
        return [replace(arrival, response=data, size=len(data))]

    return twist


METHODS = {
    "forward": METHOD,
    "central": msgspec.structs.replace(METHOD, difference="central"),
    "adam": msgspec.structs.replace(METHOD, optimizer=bf.adam(0.01)),
    "local steps": msgspec.structs.replace(METHOD, local_steps=3, local_lr=0.1),
    "per client": msgspec.structs.replace(METHOD, sharing="per-client", family="gaussian"),
    "lattice": msgspec.structs.replace(METHOD, lattice=2, difference="central"),
    "some": msgspec.structs.replace(METHOD, participation=0.6),
}

BAD = EnrolResponse(name="a", examples=2**63, plan={}, state_sha256=b"", round=2**63)
