"""Clients on other machines that return numbers of rows: plain, in secure sums, and with answers lost."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch.nn.functional as F

import baffle as bf
from baffle.client.participant import Participant
from baffle.engines.remote.engine import RemoteEngine
from baffle.engines.remote.memory import MemoryTransport, SimulatedClock
from baffle.engines.remote.transport import Arrival, Request
from baffle.protocol.messages import MaskedTrainResponse, Setup, TrainRequest, TrainResponse, decode_request
from baffle.runfolder.clients import Roster
from baffle.runtimes.pytorch.credit import CreditRuntime
from baffle.secure.masks import Identity
from edge_helpers import small
from remote_helpers import DEADLINE, TRAIN, Node, who_answered

RUNTIME = CreditRuntime(small(), F.cross_entropy, TRAIN, threads=1)
SETUP = Setup(table=RUNTIME.table, frozen="", shape=(1, 8, 8), classes=10, vocabulary=None, options={}, bundle=None)
ROWS = bf.Method(num_directions=2, slices=2, bits=8, batch_size=8, sigma=1e-3, optimizer=bf.adam(0.02))
METHODS = {
    "forward": ROWS,
    "central": msgspec.structs.replace(ROWS, difference="central"),
    "one bit": msgspec.structs.replace(ROWS, bits=1),
    "local steps": msgspec.structs.replace(ROWS, local_steps=2, optimizer=bf.sgd(0.05)),
    "a direction of one's own": msgspec.structs.replace(ROWS, sharing="per-client"),
    "sigma is measured": msgspec.structs.replace(ROWS, sigma="auto"),
}


class CreditedNode(Node):
    """A client whose model has rows, with keys for secure sums."""

    def start(self) -> Participant:
        identity = Identity.make(self.name.encode())
        return Participant(self.name, lambda setup: (RUNTIME, self.data), identity=identity)


def nodes(clients: int = 3) -> list[Node]:
    return [CreditedNode(f"client-{i}", 100 + i, part) for i, part in enumerate(bf.partition(TRAIN, clients))]


def train(members: list[Node], method: bf.Method, out: Path | None = None) -> tuple[bf.Run, MemoryTransport]:
    clock = SimulatedClock()
    network = MemoryTransport(members, clock)
    engine = RemoteEngine(
        network, RUNTIME, SETUP, clients=len(members), deadline=DEADLINE, roster=Roster(out), clock=clock
    )
    return bf.train(method, engine, RUNTIME.initial_weights(), rounds=4, out=out), network


def simulated(members: list[Node], method: bf.Method) -> bf.Run:
    engine = bf.LocalEngine(RUNTIME, [node.data for node in members], together=False)
    return bf.train(method, engine, RUNTIME.initial_weights(), rounds=4)


@pytest.mark.parametrize("name", METHODS)
def test_rows_over_messages_give_the_weights_of_the_simulation(name: str) -> None:
    members = nodes()
    run, network = train(members, METHODS[name])
    assert run.weights_sha256 == simulated(members, METHODS[name]).weights_sha256
    assert run.records[-1].applied
    replies = [c.response.reply for c in network.deliveries if isinstance(c.response, TrainResponse)]
    assert {len(reply.magnitudes) for reply in replies} == {2}  # the rows of one layer, and the head


@pytest.mark.parametrize("bits", [15, 8, 4, 1])
def test_a_secure_sum_of_rows_has_the_bits_of_a_plain_one(bits: int) -> None:
    method = msgspec.structs.replace(ROWS, bits=bits, aggregate=bf.secure_sum())
    run, network = train(nodes(4), method)
    plain = msgspec.structs.replace(method, aggregate=bf.weighted_sum())
    assert run.weights_sha256 == simulated(nodes(4), plain).weights_sha256
    assert not any(isinstance(c.response, TrainResponse) for c in network.deliveries)
    words = [
        (c.message.task.word, len(c.response.masked.vector))
        for c in network.deliveries
        if isinstance(c.response, MaskedTrainResponse) and isinstance(c.message, TrainRequest)
    ]
    assert {word for word, _ in words} <= set(range(bits, bits + 12))


def test_a_client_that_is_lost_in_a_round_is_left_out_of_it_and_comes_back(tmp_path: Path) -> None:
    members = nodes()

    def twist(request: Request, arrival: Arrival) -> list[Arrival]:
        message = decode_request(request.message)
        return [] if isinstance(message, TrainRequest) and message.task.round == 2 else [arrival]

    members[1].twist = twist
    run, _ = train(members, ROWS, tmp_path / "run")
    answered = who_answered(tmp_path / "run")
    assert answered[:2] == [(0, 1, 2)] * 2
    assert answered[2] == (0, 2)
    assert bf.Journal.open(tmp_path / "run").state().weights.tobytes() == run.weights.tobytes()
