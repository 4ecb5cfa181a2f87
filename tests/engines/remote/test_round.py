"""When a round closes: deadlines, quorum, and which clients it waits for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from baffle.engines.remote.transport import Arrival, Request
from baffle.protocol.messages import (
    EnrolRequest,
    FailedResponse,
    TrainRequest,
    decode_request,
    encode,
)
from baffle.runfolder.clients import Roster, RoundLog, read_rounds
from remote_helpers import (
    DEADLINE,
    METHOD,
    Federation,
    local,
)


def test_a_client_that_finds_sigma_late_is_not_taken_for_one_that_cannot_answer(fed: Federation) -> None:
    slow = fed.nodes[1]

    def twist(request: Request, arrival: Arrival) -> list[Arrival]:
        message = decode_request(request.message)
        if not isinstance(message, TrainRequest) or not message.calibrate:
            slow.seconds = 0.3 * DEADLINE
            return [arrival]
        slow.seconds = 1.02 * DEADLINE
        return [replace(arrival, response=encode(FailedResponse("too slow")))]

    slow.twist = twist
    fed.nodes[0].seconds = fed.nodes[2].seconds = 0.3 * DEADLINE
    roster = Roster(None)
    logs = list[RoundLog | None]()
    fed.train(
        method=msgspec.structs.replace(METHOD, sigma="auto"),
        engine=fed.engine(roster=roster),
        progress=lambda record: logs.append(roster.last),
    )
    assert logs[0] is not None
    assert (logs[0].late, logs[0].visits[1].outcome) == (1, "ok")


def test_a_round_closes_at_its_deadline_and_does_not_wait_for_the_same_client_again(
    fed: Federation, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fed.nodes[1].twist = lambda request, arrival: (
        [arrival] if isinstance(decode_request(request.message), EnrolRequest) else []
    )
    run = fed.train(tmp_path / "run", rounds=3)
    logs = read_rounds(tmp_path / "run")
    assert DEADLINE <= logs[0].seconds < DEADLINE + 1
    assert all(log.seconds < 1 for log in logs[1:])
    assert [log.visits[1].outcome for log in logs] == ["late"] * 4
    assert len(fed.network.train_requests(fed.nodes[1])) == 4  # it is asked all the same
    assert run.weights_sha256 == local(fed.data, rounds=3, answers=lambda round, client: client != 1).weights_sha256
    assert "client 1 missed the deadline of round 0" in caplog.text


def test_late_answers_are_counted_and_their_client_is_waited_for_again(fed: Federation, tmp_path: Path) -> None:
    slow, seconds = fed.nodes[1], iter([1.05 * DEADLINE, 0.8 * DEADLINE])

    def twist(request: Request, arrival: Arrival) -> list[Arrival]:
        asked = isinstance(decode_request(request.message), TrainRequest)
        slow.seconds = next(seconds, 0.1) if asked else 0.1
        return [arrival]

    slow.twist = twist
    fed.nodes[0].seconds = fed.nodes[2].seconds = 0.1 * DEADLINE
    run = fed.train(tmp_path / "run", rounds=3)
    logs = read_rounds(tmp_path / "run")
    assert [log.visits[1].outcome for log in logs] == ["late", "ok", "ok", "ok"]
    assert [(log.late, log.refused) for log in logs] == [(0, 0), (1, 0), (0, 0), (0, 0)]
    assert 0.8 * DEADLINE <= logs[1].seconds < DEADLINE
    assert logs[1].visits[1].seconds == pytest.approx(0.8 * DEADLINE, abs=0.6)
    assert (
        run.weights_sha256 == local(fed.data, rounds=3, answers=lambda r, client: (r, client) != (0, 1)).weights_sha256
    )


def test_without_a_quorum_all_are_asked_again_and_either_answer_counts_once(fed: Federation, tmp_path: Path) -> None:
    slow, seconds = fed.nodes[1], iter([1.5 * DEADLINE, 0.6 * DEADLINE])

    def twist(request: Request, arrival: Arrival) -> list[Arrival]:
        message = decode_request(request.message)
        slow.seconds = next(seconds) if isinstance(message, TrainRequest) and message.task.round == 1 else 0.1
        return [arrival]

    slow.twist = twist
    engine = fed.engine(quorum=1.0, roster=Roster(tmp_path / "run"))
    run = fed.train(tmp_path / "run", rounds=30, engine=engine)
    assert run.weights_sha256 == local(fed.data, rounds=30).weights_sha256
    logs = read_rounds(tmp_path / "run")
    assert DEADLINE < logs[1].seconds < 2 * DEADLINE
    assert logs[1].visits[1].seconds == pytest.approx(1.5 * DEADLINE, abs=0.6)
    assert (sum(log.late for log in logs), sum(log.refused for log in logs)) == (1, 0)  # the answer to the other one


def test_nobody_waits_for_a_client_whose_requests_all_come_back(fed: Federation, tmp_path: Path) -> None:
    fed.nodes[1].twist = lambda request, arrival: (
        [arrival]
        if isinstance(decode_request(request.message), EnrolRequest)
        else [replace(arrival, node=None, response=None, error="gone")]
    )
    fed.train(tmp_path / "run", rounds=1)
    assert all(log.seconds < DEADLINE / 2 for log in read_rounds(tmp_path / "run"))
