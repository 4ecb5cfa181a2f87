"""Which state each client has: rows where they suffice, the whole state where it is shorter or lost."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

import baffle as bf
from baffle.core.guard import Guard
from baffle.engines.remote.transport import Arrival, Request
from baffle.protocol.encoding import decode_row
from baffle.protocol.messages import (
    SETUP,
    STATE,
    WEIGHTS,
)
from baffle.runfolder.clients import Roster, read_rounds
from baffle.runfolder.metrics import Record
from helpers import initial_weights
from remote_helpers import (
    METHOD,
    RUNTIME,
    TEST,
    Federation,
    local,
)


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


@pytest.mark.parametrize(("gone", "whole"), [(1, False), (4, False), (40, True)])
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
