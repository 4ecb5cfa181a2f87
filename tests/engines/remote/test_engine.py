"""Clients on other machines: the same weights as in one process, whoever drops out, comes late, or lies."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import baffle as bf
from baffle.client.calibrate import LADDER
from baffle.core.guard import Guard
from baffle.core.types import LIMIT
from baffle.engines.remote.downlink import Downlink
from baffle.engines.remote.memory import Twist
from baffle.engines.remote.transport import Arrival, Request
from baffle.errors import FederationError
from baffle.protocol.encoding import decode_row
from baffle.protocol.messages import (
    SETUP,
    STATE,
    WEIGHTS,
    AnyResponse,
    BehindResponse,
    CalibrateResponse,
    EnrolRequest,
    EnrolResponse,
    FailedResponse,
    TrainRequest,
    TrainResponse,
    decode_request,
    decode_response,
    encode,
)
from baffle.runfolder.clients import Roster, RoundLog, read_members, read_rounds
from baffle.runfolder.metrics import Record
from helpers import initial_weights
from remote_helpers import (
    DEADLINE,
    METHOD,
    RUNTIME,
    SETUP_OF_DIGITS,
    TEST,
    TRAIN,
    Federation,
    Node,
    federation,
    local,
    who_answered,
)


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """No power fails here."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def fed() -> Federation:
    return federation()


def lost(request: Request, arrival: Arrival) -> list[Arrival]:
    """A node that takes requests and never answers."""
    return []


def saying(make: Callable[[TrainResponse], bytes]) -> Twist:
    """A node whose answers to tasks are others."""

    def twist(request: Request, arrival: Arrival) -> list[Arrival]:
        assert arrival.response is not None
        said = decode_response(arrival.response)
        if not isinstance(said, TrainResponse):
            return [arrival]
        data = make(said)
        return [replace(arrival, response=data, size=len(data))]

    return twist


# The same bits


METHODS = {
    "forward": METHOD,
    "central": msgspec.structs.replace(METHOD, difference="central"),
    "adam": msgspec.structs.replace(METHOD, optimizer=bf.adam(0.01)),
    "local steps": msgspec.structs.replace(METHOD, local_steps=3, local_lr=0.1),
    "per client": msgspec.structs.replace(METHOD, sharing="per-client", family="gaussian"),
    "lattice": msgspec.structs.replace(METHOD, lattice=2, difference="central"),
    "some": msgspec.structs.replace(METHOD, participation=0.6),
}


@pytest.mark.parametrize("downlink", ["replay", "weights"])
@pytest.mark.parametrize("name", METHODS)
def test_the_weights_are_those_of_one_process(fed: Federation, name: str, downlink: Downlink) -> None:
    run = fed.train(method=METHODS[name], engine=fed.engine(downlink=downlink))
    reference = local(fed.data, method=METHODS[name])
    assert run.weights_sha256 == reference.weights_sha256
    for ours, theirs in zip(run.records, reference.records, strict=True):
        assert (ours.forward_passes, ours.samples_forwarded) == (theirs.forward_passes, theirs.samples_forwarded)


def test_every_client_proves_the_servers_state_in_every_round(fed: Federation) -> None:
    fed.train(rounds=8)
    for node in fed.nodes:
        told = [c for c in fed.network.deliveries if c.node is node and isinstance(c.response, TrainResponse)]
        assert len(told) == 9
        for carried in told:
            assert isinstance(carried.message, TrainRequest)
            assert isinstance(carried.response, TrainResponse)
            assert carried.response.state_sha256 == carried.message.task.state_sha256


def test_weights_go_down_each_round_if_asked_for(fed: Federation) -> None:
    fed.train(engine=fed.engine(downlink="weights"))
    for node in fed.nodes:
        assert all(attachments == {WEIGHTS} and not ask.rows for ask, attachments in fed.network.train_requests(node))


def test_a_state_goes_down_once_and_then_a_row_a_round(fed: Federation, tmp_path: Path) -> None:
    fed.train(tmp_path / "run", rounds=9)
    rows = bf.Journal.open(tmp_path / "run").rows
    assert not decode_row(rows[0]).applied  # the state stays: a row is a row all the same
    for node in fed.nodes:
        asked = fed.network.train_requests(node)
        assert [sorted(attachments) for _, attachments in asked] == [[STATE]] + [[]] * 9
        assert [list(ask.rows) for ask, _ in asked] == [[], *([row] for row in rows[:-1])]


def test_rounds_that_change_nothing_do_not_bring_the_state_again(fed: Federation, tmp_path: Path) -> None:
    coarse = msgspec.structs.replace(METHOD, sigma=1e-30)  # no scalar is measured: three rounds for the scale
    fed.train(tmp_path / "run", method=coarse, rounds=5)
    assert sum(not decode_row(row).applied for row in bf.Journal.open(tmp_path / "run").rows) > 2
    for node in fed.nodes:
        assert sum(STATE in attachments for _, attachments in fed.network.train_requests(node)) == 1


def test_bytes_are_those_that_were_sent(fed: Federation, tmp_path: Path) -> None:
    run = fed.train(tmp_path / "run")
    down = sum(c.size for c in fed.network.deliveries)
    up = sum(len(encode(c.response)) for c in fed.network.deliveries)
    assert sum(r.bytes_down or 0 for r in run.records) == down
    assert sum(r.bytes_up or 0 for r in run.records) == up
    visits = [v for log in read_rounds(tmp_path / "run") for v in log.visits]
    enrolled = [c for c in fed.network.deliveries if isinstance(c.message, EnrolRequest)]
    assert sum(v.bytes_down for v in visits) == down - sum(c.size for c in enrolled)
    assert {v.outcome for v in visits} == {"ok"}


@pytest.mark.parametrize("downlink", ["replay", "weights"])
def test_clients_find_sigma(fed: Federation, tmp_path: Path, downlink: Downlink) -> None:
    method = msgspec.structs.replace(METHOD, sigma="auto")
    run = fed.train(tmp_path / "run", method=method, engine=fed.engine(downlink=downlink))
    assert run.records[-1].sigma in LADDER
    assert (
        run.weights_sha256
        == local(fed.data, method=msgspec.structs.replace(METHOD, sigma=run.records[-1].sigma)).weights_sha256
    )
    assert bf.Journal.open(tmp_path / "run").state().weights.tobytes() == run.weights.tobytes()


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


def test_an_engine_serves_one_run_after_another(fed: Federation) -> None:
    engine = fed.engine()
    first = fed.train(engine=engine)
    began = fed.clock.now
    second = fed.train(engine=engine, method=METHODS["central"], rounds=4)
    assert first.weights_sha256 == local(fed.data).weights_sha256
    assert second.weights_sha256 == local(fed.data, method=METHODS["central"], rounds=4).weights_sha256
    assert fed.clock.now - began < DEADLINE  # what it knew of the first run is forgotten at once


# Drop-outs


Fate = str  # of a request to one client


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    fates=st.lists(st.lists(st.sampled_from(["on", "slow", "dead", "restart"]), max_size=8), min_size=3, max_size=3),
    away=st.lists(st.sets(st.integers(0, 2)), max_size=8),
    downlink=st.sampled_from(["replay", "weights"]),
)
def test_whoever_drops_out_the_run_ends_with_the_weights_of_its_rows(
    tmp_path_factory: pytest.TempPathFactory,
    fates: list[list[Fate]],
    away: list[set[int]],
    downlink: Downlink,
) -> None:
    out = tmp_path_factory.mktemp("runs") / "run"
    fed = federation()
    engine = fed.engine(downlink=downlink, roster=Roster(out))
    for node, fate in zip(fed.nodes, fates, strict=True):
        node.twist = _fate(node, list(fate))
    absences = list(away)

    def look() -> None:
        gone = absences.pop(0) if absences else set[int]()
        for i, node in enumerate(fed.nodes):
            node.online = i not in gone

    fed.network.on_look = look
    run = fed.train(out, rounds=5, engine=engine)
    answered = who_answered(out)
    assert all(len(clients) >= 2 for clients in answered)
    assert bf.Journal.open(out).state().weights.tobytes() == run.weights.tobytes()
    reference = local(fed.data, rounds=5, answers=lambda round, client: client in answered[round])
    assert run.weights_sha256 == reference.weights_sha256
    for log, clients in zip(read_rounds(out), answered, strict=True):
        assert tuple(v.client for v in log.visits if v.outcome == "ok") == clients
        assert log.refused == 0


def _fate(node: Node, fates: list[Fate]) -> Twist:
    def twist(request: Request, arrival: Arrival) -> list[Arrival]:
        fate = fates.pop(0) if fates else "on"
        node.seconds = 1.3 * DEADLINE if fate == "slow" else 0.1
        if fate == "restart":
            node.restart()
        return [] if fate in ("dead", "restart") else [arrival]

    return twist


@pytest.mark.parametrize(("gone", "whole"), [(1, False), (4, False), (14, True)])
def test_who_is_behind_gets_the_rows_that_it_lacks_or_the_state_where_that_is_shorter(
    fed: Federation, tmp_path: Path, gone: int, whole: bool
) -> None:
    away = fed.nodes[2]

    def progress(record: Record) -> None:
        away.online = not 2 <= record.round < 2 + gone
        fed.clock.now += 2  # so that it is seen

    run = fed.train(tmp_path / "run", rounds=gone + 5, progress=progress)
    rows = bf.Journal.open(tmp_path / "run").rows
    back, attachments = next(a for a in fed.network.train_requests(away) if a[0].task.round > 3)
    assert back.task.round == 3 + gone
    if whole:
        assert sum(map(len, rows[2 : 3 + gone])) > 2 * run.weights.nbytes
        assert (list(back.rows), sorted(attachments)) == ([], [STATE])
    else:
        assert (list(back.rows), sorted(attachments)) == (rows[2 : 3 + gone], [])
    assert {v.outcome for log in read_rounds(tmp_path / "run")[3 : 3 + gone] for v in log.visits[2:]} == {"offline"}
    assert (
        run.weights_sha256
        == local(
            fed.data, rounds=gone + 5, answers=lambda round, client: client != 2 or not 3 <= round < 3 + gone
        ).weights_sha256
    )


def test_a_client_that_lost_its_memory_gets_setup_and_state_and_later_rows_again(fed: Federation) -> None:
    lame = fed.nodes[1]

    def progress(record: Record) -> None:
        if record.round in (1, 3, 5, 7):
            lame.restart()

    run = fed.train(rounds=11, progress=progress)
    attachments = [(ask.task.round, set(attachments)) for ask, attachments in fed.network.train_requests(lame)]
    both = {SETUP, STATE}
    assert attachments == [
        (0, {STATE}),
        (1, set()),
        *[entry for r in (2, 4, 6, 8) for entry in ((r, set()), (r, both), (r + 1, set()))],
        (10, set()),
        (11, set()),
    ]
    assert run.weights_sha256 == local(fed.data, rounds=11).weights_sha256


def test_a_client_that_keeps_nothing_is_soon_given_all_at_once(fed: Federation) -> None:
    stock = fed.nodes[1]
    twist = stock.twist

    def forgetful(request: Request, arrival: Arrival) -> list[Arrival]:
        stock.restart()
        return list(twist(request, arrival))

    stock.twist = forgetful
    run = fed.train(rounds=8)
    assert [ask.task.round for ask, _ in fed.network.train_requests(stock)] == [0, 0, 1, 1, 2, 2, 3, 4, 5, 6, 7, 8]
    assert run.weights_sha256 == local(fed.data, rounds=8).weights_sha256


def test_a_row_that_returns_brings_everyone_the_state(fed: Federation, tmp_path: Path) -> None:
    wild = msgspec.structs.replace(
        METHOD, num_directions=32, optimizer=bf.sgd(30.0, momentum=0.5), guard=Guard(rollbacks=9)
    )
    engine = fed.engine(roster=Roster(tmp_path / "run"))
    run = bf.train(wild, engine, initial_weights(), rounds=24, test=TEST, evaluate_every=2, out=tmp_path / "run")
    alone = bf.LocalEngine(RUNTIME, fed.data, together=False)
    reference = bf.train(wild, alone, initial_weights(), rounds=24, test=TEST, evaluate_every=2)
    assert run.weights_sha256 == reference.weights_sha256
    returns = [r.round for r in run.records if r.restores is not None]
    assert returns
    for node in fed.nodes:
        whole = [ask.task.round for ask, attachments in fed.network.train_requests(node) if STATE in attachments]
        assert set(whole) >= {0, *(r + 1 for r in returns if r + 1 <= 24)}
        assert len(fed.network.train_requests(node)) == 25  # nobody was asked twice


# Lies


def changed(**fields: object) -> Twist:
    """A reply with other values in it."""
    return saying(lambda said: encode(TrainResponse(msgspec.structs.replace(said.reply, **fields), said.state_sha256)))


def spoken(response: AnyResponse) -> Twist:
    return saying(lambda said: encode(response))


def raw(data: bytes) -> Twist:
    return saying(lambda said: data)


def _scalars(*values: int) -> bytes:
    return np.array(values, "<i4").tobytes()


BAD = EnrolResponse(name="a", examples=2**63, plan={}, state_sha256=b"", round=2**63)
LIES = {
    "K": (changed(scalars=_scalars(1, 2, 3)), "12 bytes of scalars: expected 16"),
    "round": (changed(round=77), "reply to round 77"),
    "client": (changed(client=0), "reply of client 0"),
    "no client": (changed(client=2**60), "reply of client"),
    "weight": (changed(weight=256), "weight = 256"),
    "weight 0": (changed(weight=0), "weight = 0"),
    "huge": (changed(scalars=_scalars(2**31 - 1, 0, 0, 0)), "scalar 2147483647"),
    "huge and negative": (changed(scalars=_scalars(-(2**31), 0, 0, 0)), "scalar 2147483648"),
    "one too much": (changed(scalars=_scalars(LIMIT * 255 + 1, 0, 0, 0)), "expected at most 16383 x its weight"),
    "negative count": (changed(clipped=-1), "clipped = -1"),
    "huge count": (changed(nonfinite=2**60), "nonfinite = 1152921504606846976"),
    "hash": (saying(lambda said: encode(TrainResponse(said.reply, bytes(32)))), "evaluated at state 000000"),
    "no hash": (saying(lambda said: encode(TrainResponse(said.reply))), "evaluated at state : expected"),
    "garbage": (raw(b"\xc1\xff\x00"), "malformed response"),
    "nothing": (raw(b""), "malformed response"),
    "text": (raw(b"\x82\xa4type\xa6failed\xa6reason\xa2\xff\xfe"), "malformed response"),
    "deep": (raw(b"\x82\xa4type\xa6failed\xa1x" + b"\x91" * 60_000), "malformed response"),
    "integer of 128 bits": (raw(b"\x82\xa4type\xa6behind\xa5round\xcf" + b"\xff" * 16), "malformed response"),
    "large": (raw(bytes(100_000_000)), "100000000 bytes: expected at most"),
    "found": (spoken(CalibrateResponse(LADDER, (0.1,) * len(LADDER), 1, 1)), "CalibrateResponse: expected an answer"),
    "present": (spoken(BAD), "EnrolResponse: expected an answer"),
    "behind": (spoken(BehindResponse(2**63, b"\xff" * 32, False)), "behind after 4 requests"),
    "behind at a known round": (spoken(BehindResponse(1, b"", True)), "behind after 4 requests"),
}


@pytest.mark.parametrize("name", LIES)
def test_a_liar_is_refused_and_told_and_counts_as_absent(
    fed: Federation, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    twist, reason = LIES[name]
    liar = fed.nodes[1]
    liar.twist = twist
    rounds = 1 if name == "large" else 3
    run = fed.train(tmp_path / "run", rounds=rounds)
    assert run.weights_sha256 == local(fed.data, rounds=rounds, answers=lambda r, client: client != 1).weights_sha256
    for log in read_rounds(tmp_path / "run"):
        assert (log.refused, log.late, [v.outcome for v in log.visits]) == (1, 0, ["ok", "refused", "ok"])
        assert reason in (log.visits[1].reason or "")
        assert log.seconds < DEADLINE / 2  # nobody waits for it
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(told) == rounds + 1
    assert all(reason in line and f"client 1, node {liar.identity[:12]}" in line for line in told)
    assert all(line.isprintable() and len(line) < 400 for line in told)


def test_weights_that_are_sent_do_not_ask_for_a_hash_but_for_all_else(fed: Federation, tmp_path: Path) -> None:
    fed.nodes[1].twist = changed(scalars=_scalars(1))
    run = fed.train(tmp_path / "run", engine=fed.engine(downlink="weights", roster=Roster(tmp_path / "run")))
    assert run.weights_sha256 == local(fed.data, answers=lambda round, client: client != 1).weights_sha256
    assert [log.refused for log in read_rounds(tmp_path / "run")] == [1] * 7


def test_what_a_client_cannot_do_is_told_and_its_words_are_cleaned(
    fed: Federation, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fed.nodes[1].twist = spoken(FailedResponse("no \x1b[31mdata\nrefused: node b " + "x" * 5000))
    run = fed.train(tmp_path / "run", rounds=2)
    assert run.weights_sha256 == local(fed.data, rounds=2, answers=lambda round, client: client != 1).weights_sha256
    for log in read_rounds(tmp_path / "run"):
        assert (log.refused, log.visits[1].outcome) == (0, "failed")
        assert (log.visits[1].reason or "").startswith("no [31mdata refused: node b xxx")
    assert all(len(record.getMessage()) < 2100 and record.getMessage().isprintable() for record in caplog.records)


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


@pytest.mark.parametrize(
    "found",
    [
        CalibrateResponse((), (), 0, 0),
        CalibrateResponse((1.0,), (0.1,), 1, 1),
        CalibrateResponse(LADDER, (math.nan,) * len(LADDER), 1, 1),
        CalibrateResponse(LADDER, (-1.0,) * len(LADDER), 1, 1),
        CalibrateResponse(LADDER, (0.1,), 1, 1),
        CalibrateResponse((math.inf,) * len(LADDER), (0.1,) * len(LADDER), 1, 1),
    ],
)
def test_a_liar_has_no_say_in_sigma(fed: Federation, found: CalibrateResponse) -> None:
    method = msgspec.structs.replace(METHOD, sigma="auto")
    honest = fed.nodes[0]

    def twist(request: Request, arrival: Arrival) -> list[Arrival]:
        message = decode_request(request.message)
        return [replace(arrival, response=encode(found))] if isinstance(message, TrainRequest) else [arrival]

    honest.twist = twist
    lied = fed.train(method=method, rounds=2)
    sane = federation()
    sane.nodes[0].twist = lambda request, arrival: (
        [arrival] if isinstance(decode_request(request.message), EnrolRequest) else [replace(arrival, response=b"")]
    )
    assert lied.weights_sha256 == sane.train(method=method, rounds=2).weights_sha256


# Deadlines and quorum


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


def test_with_too_few_the_engine_gives_up_after_its_patience_and_the_run_goes_on_from_there(
    fed: Federation, tmp_path: Path
) -> None:
    def progress(record: Record) -> None:
        if record.round == 2:
            fed.nodes[0].twist = fed.nodes[1].twist = lost

    engine = fed.engine(patience=100.0, roster=Roster(tmp_path / "run"))
    began = fed.clock.now
    with pytest.raises(FederationError, match="round 3: 1 of the 2 replies it needs within 100 s"):
        fed.train(tmp_path / "run", engine=engine, progress=progress)
    assert 100 <= fed.clock.now - began < 100 + 2 * DEADLINE
    fed.nodes[0].twist = fed.nodes[1].twist = lambda request, arrival: [arrival]
    run = bf.resume(tmp_path / "run", fed.engine(roster=Roster(tmp_path / "run")))
    assert run.weights_sha256 == local(fed.data).weights_sha256


def test_too_few_clients_at_the_start_are_told(fed: Federation, tmp_path: Path) -> None:
    with pytest.raises(FederationError, match="3 of 4 clients joined within 50 s"):
        fed.engine(clients=4, patience=50.0)


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


def test_nobody_waits_for_a_client_whose_requests_all_come_back(fed: Federation, tmp_path: Path) -> None:
    fed.nodes[1].twist = lambda request, arrival: (
        [arrival]
        if isinstance(decode_request(request.message), EnrolRequest)
        else [replace(arrival, node=None, response=None, error="gone")]
    )
    fed.train(tmp_path / "run", rounds=1)
    assert all(log.seconds < DEADLINE / 2 for log in read_rounds(tmp_path / "run"))


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


# Who joins, and what is remembered


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


@pytest.mark.parametrize("memory", ["kept", "lost"])
def test_a_run_that_is_continued_has_the_weights_of_an_undisturbed_one(
    fed: Federation, memory: str, tmp_path: Path
) -> None:
    def progress(record: Record) -> None:
        if record.round == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fed.train(tmp_path / "run", rounds=8, progress=progress)
    if memory == "lost":
        for node in fed.nodes:
            node.restart()
    before = len(fed.network.deliveries)
    run = bf.resume(tmp_path / "run", fed.engine(roster=Roster(tmp_path / "run")))
    assert run.weights_sha256 == local(fed.data, rounds=8).weights_sha256
    assert not any(isinstance(c.message, EnrolRequest) for c in fed.network.deliveries[before:])


def test_a_run_is_continued_by_clients_that_served_another_one_since(fed: Federation, tmp_path: Path) -> None:
    fed.train(tmp_path / "run", rounds=3)
    other = msgspec.structs.replace(SETUP_OF_DIGITS, options={"seed": 1})
    fed.train(engine=fed.engine(setup=other), method=METHODS["central"], rounds=2)
    run = bf.resume(tmp_path / "run", fed.engine(roster=Roster(tmp_path / "run")), rounds=6)
    assert run.weights_sha256 == local(fed.data).weights_sha256


def test_no_client_can_spoil_what_a_resume_compares(fed: Federation, tmp_path: Path) -> None:
    def twist(request: Request, arrival: Arrival) -> list[Arrival]:
        assert arrival.response is not None
        said = decode_response(arrival.response)
        if isinstance(said, EnrolResponse):
            plan: dict[str, str | int] = {"data": "x", "frozen": "y", "threads": 3}
            return [replace(arrival, response=encode(msgspec.structs.replace(said, plan=plan)))]
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


@pytest.mark.parametrize("said", ABSURD)
def test_a_stranger_that_talks_nonsense_is_asked_once(
    fed: Federation, said: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    stranger = Node("x", 400, TRAIN)
    stranger.twist = lambda request, arrival: [replace(arrival, response=said, size=len(said))]
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
