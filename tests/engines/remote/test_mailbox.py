"""Which answer belongs to which request: stray, repeated and forged ones, and errors of the transport."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from baffle.engines.remote.memory import Twist
from baffle.engines.remote.transport import Arrival, Request
from baffle.protocol.messages import (
    TrainRequest,
    decode_request,
)
from baffle.runfolder.clients import read_rounds
from remote_helpers import (
    Federation,
    local,
)


def wrong_sender(request: Request, arrival: Arrival) -> list[Arrival]:
    return [replace(arrival, node=999, response=b"?"), arrival]


def own_sender(request: Request, arrival: Arrival) -> list[Arrival]:
    return [replace(arrival, node=100), arrival]


def twice(request: Request, arrival: Arrival) -> list[Arrival]:
    return [arrival, arrival]


def unasked(request: Request, arrival: Arrival) -> list[Arrival]:
    return [replace(arrival, id="of nobody"), arrival]


@pytest.mark.parametrize(
    ("twist", "reason"),
    [
        (wrong_sender, "an answer from node 999: expected one from node 101"),
        (own_sender, "an answer from node 100: expected one from node 101"),
        (twice, "an answer to no request"),
        (unasked, "an answer to no request"),
    ],
)
def test_an_answer_beside_the_right_one_changes_nothing(
    fed: Federation, twist: Twist, reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fed.nodes[1].twist = twist
    run = fed.train(tmp_path / "run", rounds=3)
    assert run.weights_sha256 == local(fed.data, rounds=3).weights_sha256
    logs = read_rounds(tmp_path / "run")
    assert sum(log.refused for log in logs) == 5  # one when it joined
    assert {v.outcome for log in logs for v in log.visits} == {"ok"}
    assert sum(reason in record.getMessage() for record in caplog.records) == 5


def test_a_forger_cannot_speak_for_another(fed: Federation, tmp_path: Path) -> None:
    def forge(request: Request, arrival: Arrival) -> list[Arrival]:
        fed.network.inject(replace(arrival, id=str(int(arrival.id) - 1)))  # as the one asked before it
        return [arrival]

    fed.nodes[1].twist = forge
    run = fed.train(tmp_path / "run", rounds=3)
    assert run.weights_sha256 == local(fed.data, rounds=3).weights_sha256
    assert {v.outcome for log in read_rounds(tmp_path / "run") for v in log.visits} == {"ok"}


def test_errors_of_the_transport_are_told_and_the_request_is_repeated(
    fed: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    errors = iter([True, True])

    def twist(request: Request, arrival: Arrival) -> list[Arrival]:
        broken = isinstance(decode_request(request.message), TrainRequest) and next(errors, False)
        return [replace(arrival, node=None, response=None, error="error 5: gone")] if broken else [arrival]

    fed.nodes[1].twist = twist
    run = fed.train(rounds=2)
    assert run.weights_sha256 == local(fed.data, rounds=2).weights_sha256
    assert sum("error 5: gone" in record.getMessage() for record in caplog.records) == 2


def test_a_client_that_comes_back_at_another_address_is_asked_in_the_same_round(fed: Federation) -> None:
    moving = fed.nodes[1]

    def twist(request: Request, arrival: Arrival) -> list[Arrival]:
        if isinstance(decode_request(request.message), TrainRequest) and moving.address == 101:
            moving.restart()
            moving.address = 201
            return []
        return [arrival]

    moving.twist = twist
    assert fed.train(rounds=2).weights_sha256 == local(fed.data, rounds=2).weights_sha256
