"""Divergence in a run: noticed, undone, recorded, and replayed to the same bits."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

import baffle as bf
from baffle.core.guard import Guard
from baffle.core.method import replay
from baffle.errors import DivergedError, PlanError
from baffle.protocol.encoding import decode_row
from baffle.runfolder.metrics import Record
from baffle.training.loop import Progress
from helpers import METHOD, copy_run, digits_engine, initial_weights, invoke

_, TEST = bf.load("digits")
WILD = msgspec.structs.replace(
    METHOD, num_directions=32, optimizer=bf.sgd(30.0, momentum=0.5), guard=Guard(rollbacks=9)
)
"""The learning rate of METHOD times 600: diverges within a few rounds, without overflow."""
EVERY = 2


def run(out: Path | None, method: bf.Method = WILD, rounds: int = 40, progress: Progress | None = None) -> bf.Run:
    return bf.train(
        method,
        digits_engine(),
        initial_weights(),
        rounds=rounds,
        test=TEST,
        evaluate_every=EVERY,
        snapshot_every=3,
        out=out,
        progress=progress,
    )


def returns(records: tuple[Record, ...]) -> list[tuple[int, int]]:
    return [(r.round, r.restores) for r in records if r.restores is not None]


@pytest.fixture(scope="module")
def wild(tmp_path_factory: pytest.TempPathFactory) -> bf.Run:
    return run(tmp_path_factory.mktemp("wild") / "run")


def test_a_diverging_run_comes_back_and_learns(wild: bf.Run) -> None:
    assert np.isfinite(wild.weights).all()
    assert returns(wild.records)
    assert wild.accuracy is not None
    assert wild.accuracy > 0.5
    assert wild.loss is not None
    assert wild.loss < wild.records[0].loss  # type: ignore[operator]  # round 0 is evaluated
    assert wild.summary()["rollbacks"] == len(returns(wild.records))


def test_a_return_is_to_the_very_state(wild: bf.Run) -> None:
    assert wild.path is not None
    journal = bf.Journal.open(wild.path)
    states, rows = list(journal.states()), [decode_row(row) for row in journal.rows]
    for at, to in returns(wild.records):
        row, then = rows[at], rows[to]
        assert (states[at].weights == states[to].weights).all()
        assert states[at].step == states[to].step
        assert all((states[at].slots[n] == states[to].slots[n]).all() for n in states[to].slots)
        assert (states[at].ema_weights == states[to].ema_weights).all()
        assert not row.applied
        assert row.scalars == then.scalars
        assert row.state_sha256 == then.state_sha256
        assert wild.records[at].loss is None or wild.records[at].loss > wild.records[to].loss  # type: ignore[operator]


def test_each_return_shrinks_the_learning_rate(wild: bf.Run) -> None:
    assert wild.path is not None
    rows = [decode_row(row) for row in bf.Journal.open(wild.path).rows]
    count = 0
    for row in rows:
        count += row.restores is not None
        assert row.rollbacks == count
        if row.applied:
            assert row.coefficients["lr"] == np.float32(30.0 * 0.1**count)
    assert count == len(returns(wild.records))


def test_replay_gives_the_hashes_of_a_run_with_returns(wild: bf.Run, tmp_path: Path) -> None:
    assert wild.path is not None
    for options in ((), ("--slow",), ("--threads", "2", "--block", "300")):
        outcome = invoke(tmp_path, "replay", str(wild.path), *options)
        assert (outcome.code, outcome.out.strip()) == (0, wild.weights_sha256)


def test_replay_needs_the_state_a_row_returns_to(wild: bf.Run) -> None:
    assert wild.path is not None
    journal = bf.Journal.open(wild.path)
    at, to = returns(wild.records)[0]
    with pytest.raises(PlanError, match=f"round {at} returns to round {to}"):
        replay(journal.state(at - 1), journal.config.table, decode_row(journal.rows[at]))


@pytest.mark.parametrize("stop", [1, 3, 4, 5, 8, 9, 25, 39])
def test_a_run_interrupted_anywhere_returns_as_if_it_had_not_been(wild: bf.Run, tmp_path: Path, stop: int) -> None:
    def interrupt(record: Record) -> None:
        if record.round == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", progress=interrupt)
    again = bf.resume(tmp_path / "run", digits_engine(), test=TEST)
    assert again.weights_sha256 == wild.weights_sha256
    assert returns(again.records) == returns(wild.records)


def test_a_run_that_diverges_too_often_stops_where_it_was_good(tmp_path: Path) -> None:
    method = msgspec.structs.replace(WILD, guard=Guard(rollbacks=0))
    with pytest.raises(DivergedError, match=r"stops with the weights it had after round \d+. Use a smaller lr than 30"):
        run(tmp_path / "run", method)
    journal = bf.Journal.open(tmp_path / "run")
    assert journal.records[-1].restores is not None
    assert (journal.state().weights == journal.state(journal.records[-1].restores).weights).all()


def test_weights_near_overflow_return_as_well(tmp_path: Path) -> None:
    method = msgspec.structs.replace(METHOD, optimizer=bf.sgd(1e38), guard=Guard(rollbacks=99, shrink=1e-4))
    done = run(tmp_path / "run", method, rounds=14)
    assert returns(done.records)[0] == (1, 0)
    assert done.records[1].loss is None
    assert float(np.abs(done.weights).max()) < 1e6
    assert done.weights_sha256 == invoke(tmp_path, "replay", "run").out.strip()


def test_without_a_guard_a_run_may_diverge_finitely(tmp_path: Path) -> None:
    done = run(tmp_path / "run", msgspec.structs.replace(WILD, guard=None))
    assert not returns(done.records)
    assert done.loss is not None
    assert done.loss > 10


def test_a_guard_does_not_touch_a_good_run() -> None:
    with_guard, without = run(None, METHOD, 8), run(None, msgspec.structs.replace(METHOD, guard=None), 8)
    assert with_guard.weights_sha256 == without.weights_sha256
    assert not returns(with_guard.records)


def test_the_last_evaluation_is_of_the_weights_that_count(tmp_path: Path) -> None:
    first = returns(run(None).records)[0][0]
    done = run(None, rounds=first)
    assert done.records[-1].restores is not None
    assert done.loss == pytest.approx(done.records[done.records[-1].restores].loss)


def test_after_a_return_every_client_needs_the_state(wild: bf.Run) -> None:
    at, _ = returns(wild.records)[0]
    state_bytes = wild.weights.nbytes * 2  # weights and momentum
    after, before = wild.records[at + 1].bytes_down, wild.records[1].bytes_down
    assert after is not None
    assert before is not None
    assert before < 3 * state_bytes <= after


def test_a_repair_of_metrics_does_not_blind_the_guard(wild: bf.Run, tmp_path: Path) -> None:
    def interrupt(record: Record) -> None:
        if record.round == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", progress=interrupt)
    lines = (tmp_path / "run/metrics.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "run/metrics.jsonl").write_bytes(b"".join([lines[0], b"x" + lines[1], *lines[2:]]))
    again = bf.resume(tmp_path / "run", digits_engine(), test=TEST, repair=True)
    assert again.weights_sha256 == wild.weights_sha256
    assert [r.seconds is None for r in again.records[:20]] == [i == 1 for i in range(20)]


def test_a_line_that_was_put_in_costs_no_other(wild: bf.Run, tmp_path: Path) -> None:
    assert wild.path is not None
    path = copy_run(wild.path, tmp_path / "run")
    lines = (path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (path / "metrics.jsonl").write_bytes(b"".join([*lines[:5], b"{}\n", *lines[5:]]))
    journal = bf.Journal.open(path)
    assert journal.damage is not None
    assert "line 6 is not of round 5" in journal.damage
    assert tuple(journal.records) == wild.records


def test_a_run_that_was_stopped_stays_stopped(tmp_path: Path) -> None:
    with pytest.raises(DivergedError) as first:
        run(tmp_path / "run", msgspec.structs.replace(WILD, guard=Guard(rollbacks=1)))
    before = (tmp_path / "run/rows.bin").read_bytes()
    for rounds in (None, 90):
        with pytest.raises(DivergedError) as again:
            bf.resume(tmp_path / "run", digits_engine(), test=TEST, rounds=rounds)
        assert str(again.value) == str(first.value)
    assert (tmp_path / "run/rows.bin").read_bytes() == before
    assert (tmp_path / "run/model.safetensors").exists()


@pytest.mark.parametrize("rounds", [3, 5, 7])
def test_a_total_between_evaluations_changes_nothing_later(wild: bf.Run, tmp_path: Path, rounds: int) -> None:
    run(tmp_path / "run", rounds=rounds)
    again = bf.resume(tmp_path / "run", digits_engine(), test=TEST, rounds=40)
    assert again.weights_sha256 == wild.weights_sha256
