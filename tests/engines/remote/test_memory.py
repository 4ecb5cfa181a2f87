"""The transport within one process: what it delivers when, and what its nodes can do."""

from __future__ import annotations

from dataclasses import replace

from baffle.engines.remote.memory import MemoryTransport, SimulatedClock
from baffle.engines.remote.transport import Arrival, Request
from baffle.protocol.messages import FailedResponse, TrainRequest, UnmaskRequest, decode_response, encode
from baffle.secure.messages import Survivors
from helpers import TASK
from remote_helpers import TRAIN, Node

MESSAGE = encode(TrainRequest(setup="none", task=TASK, rows=()))


def network() -> tuple[SimulatedClock, list[Node], MemoryTransport]:
    clock = SimulatedClock()
    nodes = [Node(name, address, TRAIN) for address, name in enumerate("ab")]
    return clock, nodes, MemoryTransport(nodes, clock)


def test_answers_arrive_after_their_time_and_once() -> None:
    clock, nodes, transport = network()
    nodes[1].seconds = 2.0
    first, second = transport.send([Request(0, MESSAGE), Request(1, MESSAGE, {"x": b"12"}, 1)], 60.0)
    assert (first.size, second.size) == (len(MESSAGE), len(MESSAGE) + 2)
    assert transport.receive([first.id, second.id]) == []
    clock.sleep(1)
    assert [arrival.id for arrival in transport.receive([first.id, second.id])] == [first.id]
    clock.sleep(1)
    [arrival] = transport.receive([second.id])
    assert (arrival.id, arrival.node) == (second.id, 1)
    assert arrival.response is not None
    assert decode_response(arrival.response) == transport.deliveries[1].response
    assert transport.receive([]) == []


def test_a_node_that_is_offline_is_not_listed_and_gets_nothing() -> None:
    _, nodes, transport = network()
    nodes[0].online = False
    assert list(transport.nodes().values()) == [1]
    assert [sent.id for sent in transport.send([Request(0, MESSAGE)], 60.0)] == [""]
    assert transport.deliveries == []


def test_a_twist_and_injected_answers_change_what_arrives() -> None:
    clock, nodes, transport = network()
    nodes[0].twist = lambda request, arrival: [arrival, replace(arrival, response=b"?")]
    nodes[1].twist = lambda request, arrival: []
    transport.send([Request(0, MESSAGE), Request(1, MESSAGE)], 60.0)
    transport.inject(Arrival("none", None, None, "gone", 0))
    clock.sleep(1)
    assert [arrival.error or arrival.response for arrival in transport.receive([])][1:] == [b"?", "gone"]
    assert len(transport.deliveries) == 2


def test_tasks_are_listed_by_node() -> None:
    _, nodes, transport = network()
    unmask = encode(UnmaskRequest(setup="none", key=1, survivors=Survivors(round=0, clients=(0,))))
    transport.send([Request(0, unmask), Request(0, MESSAGE, {"state": b""}), Request(1, MESSAGE)], 60.0)
    assert [(request.task, names) for request, names in transport.train_requests(nodes[0])] == [
        (TASK, frozenset({"state"}))
    ]
    assert isinstance(transport.deliveries[0].response, FailedResponse)
