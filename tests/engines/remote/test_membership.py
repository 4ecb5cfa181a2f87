"""Which nodes join, under which numbers and names, and which are rejected."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

import baffle as bf
from baffle.engines.remote.transport import Arrival, Request
from baffle.errors import FederationError
from baffle.protocol.messages import (
    BehindResponse,
    EnrolResponse,
    FailedResponse,
    decode_response,
    encode,
)
from baffle.runfolder.clients import Roster, read_members
from baffle.runfolder.metrics import Record
from remote_helpers import (
    BAD,
    TRAIN,
    Federation,
    Node,
    local,
    who_answered,
)


def test_too_few_clients_at_the_start_are_told(fed: Federation, tmp_path: Path) -> None:
    with pytest.raises(FederationError, match="3 of 4 clients joined within 50 s"):
        fed.engine(clients=4, patience=50.0)


def test_clients_are_numbered_by_name_and_late_ones_come_after_them(fed: Federation, tmp_path: Path) -> None:
    late = Node("A0", 300, TRAIN.take(np.arange(50)), online=False)
    fed.network.members.insert(0, late)

    def progress(record: Record) -> None:
        if record.round == 1:
            late.online = True
        fed.clock.now += 2

    run = fed.train(tmp_path / "run", rounds=8, engine=fed.engine(roster=Roster(tmp_path / "run")), progress=progress)
    assert [(m.name, m.examples) for m in read_members(tmp_path / "run")] == [
        *((node.name, len(node.data)) for node in fed.nodes),
        ("A0", 50),
    ]
    answered = who_answered(tmp_path / "run")
    assert answered[0] == (0, 1, 2)
    assert answered[-1] == (0, 1, 2, 3)
    assert bf.Journal.open(tmp_path / "run").state().weights.tobytes() == run.weights.tobytes()
    again = bf.resume(tmp_path / "run", fed.engine(roster=Roster(tmp_path / "run")), rounds=10)
    assert again.records[-1].participants == 4


def test_no_client_can_spoil_what_a_resume_compares(fed: Federation, tmp_path: Path) -> None:
    def twist(request: Request, arrival: Arrival) -> list[Arrival]:
        assert arrival.response is not None
        answer = decode_response(arrival.response)
        if isinstance(answer, EnrolResponse):
            plan: dict[str, str | int] = {"data": "x", "frozen": "y", "threads": 3}
            return [replace(arrival, response=encode(msgspec.structs.replace(answer, plan=plan)))]
        return [arrival]

    fed.nodes[0].twist = twist
    assert fed.train(tmp_path / "run", rounds=2).config.plan["threads"] == 3
    run = bf.resume(tmp_path / "run", fed.engine(roster=Roster(tmp_path / "run")), rounds=3)
    assert run.state.round == 4


ABSURD = [
    *(encode(msgspec.structs.replace(BAD, examples=n)) for n in (0, -1, 2**40 + 1, 2**63)),
    encode(BehindResponse(0, b"", False)),
    b"\xc1",
    b"",
    bytes(100_000),
]


@pytest.mark.parametrize("answer", ABSURD)
def test_a_stranger_that_talks_nonsense_is_asked_once(
    fed: Federation, answer: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    stranger = Node("x", 400, TRAIN)
    stranger.twist = lambda request, arrival: [replace(arrival, response=answer, size=len(answer))]
    fed.network.members.append(stranger)
    roster = Roster(None)

    def progress(record: Record) -> None:
        fed.clock.now += 2

    run = fed.train(rounds=2, engine=fed.engine(roster=roster), progress=progress)
    assert run.weights_sha256 == local(fed.data, rounds=2).weights_sha256
    assert len(roster.members) == 3
    assert sum(c.node is stranger for c in fed.network.deliveries) == 1
    assert sum(f"refused: node {stranger.identity[:12]}" in r.getMessage() for r in caplog.records) == 1


def test_a_stranger_that_cannot_take_part_is_told_and_asked_again_when_it_comes_back(
    fed: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    stranger = Node("x", 400, TRAIN)
    stranger.twist = lambda request, arrival: [replace(arrival, response=encode(FailedResponse("other\ndata")))]
    fed.network.members.append(stranger)

    def progress(record: Record) -> None:
        fed.clock.now += 2
        if record.round == 2:
            stranger.address, stranger.twist = 401, lambda request, arrival: [arrival]

    run = fed.train(rounds=6, engine=fed.engine(), progress=progress)
    assert sum("cannot take part: other data" in r.getMessage() for r in caplog.records) == 1
    assert run.records[-1].participants == 4


def test_a_stranger_whose_answer_was_lost_is_asked_again_though_a_round_took_long(fed: Federation) -> None:
    stranger = Node("x", 400, TRAIN, online=False)
    fed.network.members.append(stranger)
    began = fed.clock.now
    answers = iter([list[Arrival]()])

    def shy(request: Request, arrival: Arrival) -> list[Arrival]:
        return next(answers, [arrival])

    def silent(request: Request, arrival: Arrival) -> list[Arrival]:
        return [arrival] if fed.clock.now < began + 5 or fed.clock.now > began + 700 else []

    def progress(record: Record) -> None:
        fed.clock.now += 5
        stranger.online = True

    stranger.twist = shy
    for node in fed.nodes:
        node.twist = silent
    run = fed.train(rounds=4, engine=fed.engine(), progress=progress)
    assert run.records[-1].participants == 4


def test_a_name_is_cleaned(fed: Federation) -> None:
    roster = Roster(None)
    fed.nodes[0].name = "\x1b[2J\nroot" + "x" * 500
    fed.nodes[0].restart()
    fed.engine(roster=roster)
    assert any(m.name.startswith("[2J rootxxx") and len(m.name) <= 64 for m in roster.members)
