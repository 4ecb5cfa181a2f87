"""The run folder as a whole: written, read back, replayed, and used by several processes."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

import baffle as bf
from baffle.core.rebuild import Execution
from baffle.core.state import state_sha256, weights_sha256
from baffle.core.types import Family, Row, Sharing
from baffle.errors import CorruptRunError, JournalError
from baffle.protocol.encoding import decode_row
from baffle.runfolder.metrics import Record
from helpers import (
    METHOD,
    Place,
    flip,
    initial_weights,
    train_digits,
    tree,
)
from runfolder_helpers import ROUNDS, logged, resume_digits


def test_a_run_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    seen: list[Record] = []
    run = train_digits(tmp_path / "run", ROUNDS, progress=seen.append)
    journal = bf.Journal.open(tmp_path / "run")
    assert journal.damage is None
    assert tuple(journal.records) == run.records == tuple(seen)
    assert [r.round for r in journal.records] == list(range(ROUNDS + 1))
    assert logged(journal.records)[-1] == run.weights_sha256
    assert (journal.initial == initial_weights()).all()
    assert journal.config == run.config
    assert journal.config.method == METHOD
    assert len(journal.rows) == ROUNDS + 1
    last = journal.last_row()
    assert last == decode_row(journal.rows[-1])
    assert last.weights_sha256.hex() == run.weights_sha256
    state = journal.state()
    assert state_sha256(state) == state_sha256(run.state)
    for ours, theirs in ((state.weights, run.weights), (state.ema_weights, run.average)):
        assert ours.tobytes() == theirs.tobytes()
    assert [decode_row(row).round for row in journal.rows] == list(range(ROUNDS + 1))


def test_the_folder_holds_what_the_documentation_says(whole: Path) -> None:
    assert tree(whole) == sorted(
        str(whole / name)
        for name in (
            "config.json",
            "summary.json",
            "initial.safetensors",
            "metrics.jsonl",
            "model.safetensors",
            "rows.bin",
            "snapshots",
            "snapshots/00000006.safetensors",
            "snapshots/00000009.safetensors",
        )
    )
    assert len((whole / "metrics.jsonl").read_text().splitlines()) == ROUNDS + 1
    assert json.loads((whole / "config.json").read_text())["rounds"] == ROUNDS


def test_opening_to_write_drops_the_unfinished_round_from_both_files(run: Path, where: list[Place]) -> None:
    data = (run / "rows.bin").read_bytes()
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run / "rows.bin").write_bytes(data[: where[-1].end - 1])
    bf.Journal.open(run)
    assert (run / "rows.bin").stat().st_size == where[-1].end - 1  # reading changes nothing
    bf.Journal.open(run, write=True).close()
    assert (run / "rows.bin").read_bytes() == data[: where[-1].start]
    assert (run / "metrics.jsonl").read_bytes() == b"".join(lines[:-1])


def test_a_run_with_other_initial_weights_cannot_be_repaired(run: Path) -> None:
    flip(run / "initial.safetensors", -4)
    before = (run / "rows.bin").read_bytes()
    with pytest.raises(
        CorruptRunError, match=r"initial\.safetensors, or the row, was edited; there is no round before"
    ):
        resume_digits(run, repair=True)
    assert (run / "rows.bin").read_bytes() == before


@pytest.mark.parametrize("name", ["initial.safetensors", "rows.bin", "metrics.jsonl", "config.json"])
def test_a_missing_file_is_refused_by_name(run: Path, name: str) -> None:
    (run / name).unlink()
    for write in (False, True):
        with pytest.raises(JournalError, match=name.replace(".", r"\.")):
            bf.Journal.open(run, write=write)


def test_leftovers_of_a_kill_are_ignored(run: Path, final: str) -> None:
    (run / "snapshots/.00000012.safetensors.abcdef").write_bytes(b"half")
    (run / ".model.safetensors.abcdef").write_bytes(b"half")
    assert resume_digits(run).weights_sha256 == final


def test_a_second_writer_is_refused_and_readers_are_not(run: Path) -> None:
    first = bf.Journal.open(run, write=True)
    with pytest.raises(JournalError, match="another process"):
        bf.Journal.open(run, write=True)
    with pytest.raises(JournalError, match="another process"):
        resume_digits(run)
    assert len(bf.Journal.open(run).rows) == ROUNDS + 1
    first.close()
    first.close()
    bf.Journal.open(run, write=True).close()


def test_a_run_in_progress_can_be_read_but_not_written(tmp_path: Path) -> None:
    path, seen = tmp_path / "run", list[int]()

    def look(record: Record) -> None:
        journal = bf.Journal.open(path)
        assert journal.damage is None
        assert journal.records[-1] == record
        with pytest.raises(JournalError, match="another process"):
            bf.Journal.open(path, write=True)
        seen.append(len(journal.rows))

    train_digits(path, 3, progress=look)
    assert seen == [1, 2, 3, 4]
    bf.Journal.open(path, write=True).close()


def test_a_journal_opened_for_reading_cannot_be_written(run: Path) -> None:
    journal = bf.Journal.open(run)
    with pytest.raises(JournalError, match="reading only"):
        journal.commit(journal.rows[-1], journal.records[-1])


@pytest.mark.parametrize("repair_first", [True, False])
def test_a_refused_writer_lets_go_of_the_run(run: Path, where: list[Place], final: str, repair_first: bool) -> None:
    flip(run / "rows.bin", where[3].row)
    with pytest.raises(CorruptRunError):
        bf.Journal.open(run, write=True)
    with pytest.raises(CorruptRunError):
        resume_digits(run)
    if repair_first:
        bf.Journal.open(run, write=True, repair=True).close()
    assert resume_digits(run, repair=not repair_first).weights_sha256 == final


FAMILIES: tuple[Family, ...] = ("rank1", "rademacher", "gaussian")


SHARINGS: tuple[tuple[Sharing, int], ...] = (("shared", 1), ("shared", 3), ("per-client", 1))


METHODS = {
    f"{family}-{sharing}-{steps}": bf.Method(
        num_directions=5,
        batch_size=8,
        family=family,
        sharing=sharing,
        local_steps=steps,
        optimizer=bf.sgd(0.05) if steps > 1 else bf.adam(0.02),
        server=(bf.clip_update(0.5),),
    )
    for family in FAMILIES
    for sharing, steps in SHARINGS
}


EXECUTIONS = [Execution(threads, block) for threads in (1, 2) for block in (1, 7, 256, 65536)] + [Execution(slow=True)]


@pytest.mark.parametrize("name", METHODS)
def test_every_way_to_replay_gives_the_logged_weights(tmp_path: Path, name: str) -> None:
    run = train_digits(tmp_path / "run", 4, method=METHODS[name])
    journal = bf.Journal.open(tmp_path / "run")
    assert len(set(logged(journal.records))) == 1 + sum(r.applied for r in journal.records)
    for execution in EXECUTIONS:
        states = list(journal.states(execution))
        assert [weights_sha256(s.weights).hex() for s in states] == logged(journal.records)
        assert states[-1].ema_weights.tobytes() == run.average.tobytes()
        assert [s.round for s in states] == [1, 2, 3, 4, 5]


def test_replay_notices_a_row_that_lies(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lying(data: bytes) -> Row:
        row = decode_row(data)
        return msgspec.structs.replace(row, clip_factor=0.5) if row.round == 5 else row

    monkeypatch.setattr("baffle.runfolder.journal.decode_row", lying)
    states = bf.Journal.open(run).states()
    for _ in range(5):
        next(states)
    with pytest.raises(CorruptRunError, match="round 5"):
        next(states)
