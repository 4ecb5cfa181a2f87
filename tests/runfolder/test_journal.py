"""The run folder under everything that can happen to it: cuts, edits, full disks, two writers, other machines."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.numpy import load_file

import baffle as bf
from baffle.core.method import replay
from baffle.core.rebuild import Execution
from baffle.core.state import State, state_sha256, weights_sha256
from baffle.core.types import Family, Row, Sharing, Table
from baffle.errors import CorruptRunError, JournalError, OptionError, PlanError, RunExistsError
from baffle.protocol.encoding import decode_row
from baffle.runfolder.metrics import Record
from baffle.runtimes.pytorch.runtime import TorchRuntime
from helpers import (
    METHOD,
    Place,
    copy_run,
    digits_engine,
    flip,
    initial_weights,
    linear,
    places,
    train_digits,
    tree,
)

ROUNDS = 8
"""Rows 0 to 8; snapshots behind rounds 5 and 8 (their states' ``round`` is 6 and 9)."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run. Never changed: tests take copies."""
    path = tmp_path_factory.mktemp("journal") / "run"
    train_digits(path, ROUNDS)
    return path


@pytest.fixture(scope="module")
def final(whole: Path) -> str:
    """The hash of the weights that every continuation must reach."""
    return bf.Journal.open(whole).records[-1].weights_sha256


@pytest.fixture(scope="module")
def where(whole: Path) -> list[Place]:
    return places(whole)


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return copy_run(whole, tmp_path / "run")


def resume_digits(path: Path, *, rounds: int | None = None, repair: bool = False) -> bf.Run:
    return bf.resume(path, digits_engine(), rounds=rounds, repair=repair)


def logged(records: list[Record]) -> list[str]:
    return [r.weights_sha256 for r in records]


def replayed(path: Path) -> list[str]:
    return [weights_sha256(state.weights).hex() for state in bf.Journal.open(path).states()]


# --- What a run leaves behind


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


def test_a_run_without_folder_gives_the_same(final: str) -> None:
    assert train_digits(None, ROUNDS).weights_sha256 == final


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


def test_the_model_file_holds_the_average_by_name(whole: Path) -> None:
    tensors = load_file(whole / "model.safetensors")
    assert {name: t.shape for name, t in tensors.items()} == {"1.weight": (10, 64), "1.bias": (10,)}
    average = bf.Journal.open(whole).state().ema_weights
    assert (np.concatenate([tensors["1.weight"].reshape(-1), tensors["1.bias"]]) == average).all()


def test_two_runs_have_the_same_rows(whole: Path, tmp_path: Path) -> None:
    train_digits(tmp_path / "again", ROUNDS)
    assert (tmp_path / "again/rows.bin").read_bytes() == (whole / "rows.bin").read_bytes()


# --- Cut short


def test_every_truncation_of_the_rows_keeps_the_valid_prefix_and_resumes(
    run: Path, where: list[Place], final: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("baffle.runfolder.journal.os.fsync", lambda descriptor: None)
    data, metrics = (run / "rows.bin").read_bytes(), (run / "metrics.jsonl").read_bytes()
    rows, lines = bf.Journal.open(run).rows, metrics.splitlines(keepends=True)
    runtime = TorchRuntime(linear(), F.cross_entropy, threads=1)
    parts = bf.partition(bf.load("digits")[0], 3)
    boundaries = {b for at in where[-2:] for b in (at.start, at.row, at.chain, at.end)}
    near = {b + step for b in boundaries for step in (-1, 0, 1)}
    for size in range(where[-2].start, len(data)):
        (run / "rows.bin").write_bytes(data[:size])
        (run / "metrics.jsonl").write_bytes(metrics)
        kept = ROUNDS - 1 if size < where[-1].start else ROUNDS
        journal = bf.Journal.open(run)
        assert journal.damage is None
        assert journal.rows == rows[:kept]
        assert [r.round for r in journal.records] == list(range(kept))
        bf.Journal.open(run, write=True).close()  # cuts: from here on there are two different folders only
        assert (run / "rows.bin").read_bytes() == data[: where[kept].start]
        assert (run / "metrics.jsonl").read_bytes() == b"".join(lines[:kept])
        if size in near or size % 10 == 0:
            assert bf.resume(run, bf.LocalEngine(runtime, parts)).weights_sha256 == final
            assert (run / "rows.bin").read_bytes() == data
    assert not list(run.glob("*.damaged"))


def test_opening_to_write_drops_the_unfinished_round_from_both_files(run: Path, where: list[Place]) -> None:
    data = (run / "rows.bin").read_bytes()
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run / "rows.bin").write_bytes(data[: where[-1].end - 1])
    bf.Journal.open(run)
    assert (run / "rows.bin").stat().st_size == where[-1].end - 1  # reading changes nothing
    bf.Journal.open(run, write=True).close()
    assert (run / "rows.bin").read_bytes() == data[: where[-1].start]
    assert (run / "metrics.jsonl").read_bytes() == b"".join(lines[:-1])


@pytest.mark.parametrize("cut", [0, 1, 100, -1])
def test_a_metrics_line_without_its_row_is_dropped(run: Path, where: list[Place], final: str, cut: int) -> None:
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run / "rows.bin").write_bytes((run / "rows.bin").read_bytes()[: where[-1].start])
    (run / "metrics.jsonl").write_bytes(b"".join(lines[:-1]) + lines[-1][: cut if cut >= 0 else len(lines[-1]) + cut])
    journal = bf.Journal.open(run)
    assert journal.damage is None
    assert len(journal.records) == len(journal.rows) == ROUNDS
    assert resume_digits(run).weights_sha256 == final
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [r["round"] for r in records] == list(range(ROUNDS + 1))


def test_no_rows_at_all_starts_over(run: Path, whole: Path, final: str) -> None:
    (run / "rows.bin").write_bytes(b"")
    journal = bf.Journal.open(run)
    assert (journal.damage, journal.rows, journal.records) == (None, [], [])
    assert journal.last_row() is None
    assert journal.state().round == 0
    assert list(journal.states()) == []
    assert resume_digits(run).weights_sha256 == final
    assert (run / "rows.bin").read_bytes() == (whole / "rows.bin").read_bytes()


def test_a_finished_run_resumes_to_itself(run: Path, final: str) -> None:
    (run / "model.safetensors").unlink()
    before = (run / "rows.bin").read_bytes()
    assert resume_digits(run).weights_sha256 == final
    assert (run / "rows.bin").read_bytes() == before
    assert (run / "model.safetensors").exists()


# --- Edited


def edit_length(run: Path, at: Place, byte: int) -> None:
    flip(run / "rows.bin", at.start + byte)


def edit_row(run: Path, at: Place, byte: int) -> None:
    flip(run / "rows.bin", at.row + byte if byte >= 0 else at.chain + byte)


def edit_chain(run: Path, at: Place, byte: int) -> None:
    flip(run / "rows.bin", at.chain + byte)


def set_metric(run: Path, round: int, change: Callable[[bytes], bytes]) -> None:
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    assert change(lines[round]) != lines[round]
    lines[round] = change(lines[round])
    (run / "metrics.jsonl").write_bytes(b"".join(lines))


ROW_EDITS = (
    [(edit_length, byte) for byte in range(4)]
    + [(edit_row, byte) for byte in (0, 1, 100, 300, -1)]
    + [(edit_chain, byte) for byte in (0, 15, 31)]
)


@pytest.mark.parametrize("round", [0, 4, ROUNDS])
@pytest.mark.parametrize(("edit", "byte"), ROW_EDITS)
def test_one_changed_byte_of_the_rows_is_damage(
    run: Path, where: list[Place], edit: Callable[[Path, Place, int], None], byte: int, round: int
) -> None:
    before = logged(bf.Journal.open(run).records)
    edit(run, where[round], byte)
    journal = bf.Journal.open(run)
    assert journal.damage is not None
    assert "rows.bin" in journal.damage
    assert f"round {round} " in journal.damage
    assert logged(journal.records) == before[:round]
    assert replayed(run) == before[:round]
    damaged = (run / "rows.bin").read_bytes()
    way_out = "--repair" if round else "no round before it"
    with pytest.raises(CorruptRunError, match=rf"rows\.bin: round {round} .*{way_out}"):
        bf.Journal.open(run, write=True)
    assert (run / "rows.bin").read_bytes() == damaged


@pytest.mark.parametrize(("edit", "byte"), [(edit_length, 0), (edit_length, 3), (edit_row, 50), (edit_chain, 0)])
@pytest.mark.parametrize("round", [1, 7])
def test_repair_continues_behind_edited_rows_and_keeps_them_aside(
    run: Path, where: list[Place], final: str, edit: Callable[[Path, Place, int], None], byte: int, round: int
) -> None:
    good = (run / "rows.bin").read_bytes()
    edit(run, where[round], byte)
    bad = (run / "rows.bin").read_bytes(), (run / "metrics.jsonl").read_bytes()
    assert resume_digits(run, repair=True).weights_sha256 == final
    assert (run / "rows.bin").read_bytes() == good
    assert ((run / "rows.bin.damaged").read_bytes(), (run / "metrics.jsonl.damaged").read_bytes()) == bad
    assert bf.Journal.open(run).damage is None


def test_a_removed_row_and_swapped_rows_are_damage(run: Path, where: list[Place]) -> None:
    data = (run / "rows.bin").read_bytes()
    (run / "rows.bin").write_bytes(data[: where[3].start] + data[where[3].end :])
    damage = bf.Journal.open(run).damage
    assert damage is not None
    assert "round 3 " in damage
    swapped = data[where[5].start : where[5].end] + data[where[4].start : where[4].end]
    (run / "rows.bin").write_bytes(data[: where[4].start] + swapped + data[where[5].end :])
    damage = bf.Journal.open(run).damage
    assert damage is not None
    assert "round 4 " in damage


def test_rows_of_another_run_are_damage(run: Path, tmp_path: Path) -> None:
    other = bf.train(METHOD, digits_engine(), initial_weights(), rounds=ROUNDS, seed=1, out=tmp_path / "other")
    (run / "rows.bin").write_bytes((tmp_path / "other/rows.bin").read_bytes())
    assert other.path is not None
    damage = bf.Journal.open(run).damage
    assert damage is not None
    assert "round 0 " in damage


def test_a_metrics_line_of_another_round_or_hash_is_damage(run: Path) -> None:
    good = (run / "metrics.jsonl").read_bytes()
    lines = good.splitlines(keepends=True)
    before = logged(bf.Journal.open(run).records)
    start = sum(map(len, lines[:4]))
    checked = [*range(10), *range(lines[4].index(b"weights_sha256"), len(lines[4]))]
    for position in checked:
        (run / "metrics.jsonl").write_bytes(good)
        flip(run / "metrics.jsonl", start + position)
        journal = bf.Journal.open(run)
        assert journal.damage is not None
        assert "metrics.jsonl" in journal.damage
        assert "line 5" in journal.damage
        assert logged(journal.records) == before
        lost = [i for i, r in enumerate(journal.records) if r.seconds is None]
        assert lost == [4] or (lost == [4, 5] and position == len(lines[4]) - 1)  # the end of the line


@pytest.mark.parametrize(
    "change",
    [
        lambda line: b"",
        lambda line: b"\n",
        lambda line: line[:50],
        lambda line: b"[" + line[1:],
        lambda line: line.replace(b'"round":4', b'"round":5'),
        lambda line: line.replace(b'"weights_sha256":"', b'"weights_sha256":"0'),
    ],
)
def test_an_edited_metrics_line_is_damage_and_is_rebuilt_from_the_rows(
    run: Path, final: str, change: Callable[[bytes], bytes]
) -> None:
    before = bf.Journal.open(run).records
    set_metric(run, 4, change)
    journal = bf.Journal.open(run)
    assert journal.damage is not None
    assert "metrics.jsonl" in journal.damage
    assert logged(journal.records) == logged(before)
    assert [r for i, r in enumerate(journal.records) if i not in (4, 5)] == before[:4] + before[6:]
    assert replayed(run) == logged(before)  # the rows are whole
    with pytest.raises(CorruptRunError, match=r"metrics\.jsonl.*--repair"):
        resume_digits(run)
    bad = (run / "metrics.jsonl").read_bytes()
    repaired = resume_digits(run, repair=True)
    assert repaired.weights_sha256 == final
    assert repaired.summary()["bytes_up"] is None  # unknown, so not made up
    assert (run / "metrics.jsonl.damaged").read_bytes() == bad
    records = bf.Journal.open(run).records
    assert records[:4] == before[:4]
    assert logged(records) == logged(before)
    assert [r.scalar_rms for r in records] == [r.scalar_rms for r in before]


def test_rows_cut_at_a_boundary_are_noticed(run: Path, where: list[Place], final: str) -> None:
    with (run / "rows.bin").open("r+b") as file:
        file.truncate(where[4].start)
    journal = bf.Journal.open(run)
    assert (len(journal.rows), journal.lost) == (4, len(where) - 4)
    assert resume_digits(run).weights_sha256 == final


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"lr": 0.05', '"lr": 0.06'),
        ('"num_directions"', '"num_directionz"'),
        ('"key": 0', '"key": 1'),
        ("0.98", "0.97"),
    ],
)
def test_an_edited_configuration_is_damage(run: Path, old: str, new: str) -> None:
    text = (run / "config.json").read_text()
    assert old in text
    (run / "config.json").write_text(text.replace(old, new))
    journal = bf.Journal.open(run)
    assert journal.damage is not None
    assert "config.json" in journal.damage
    assert "round 0 " in journal.damage
    assert journal.rows == []
    with pytest.raises(CorruptRunError, match=r"config\.json"):
        bf.Journal.open(run, write=True)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"num_directions": 4', '"num_directions": 0'),
        ('"snapshot_every"', '"snapshot_evert"'),
        ('"rounds": 8', '"rounds": "8"'),
        ('"format"', '"formal"'),
        ("{", "["),
    ],
)
def test_a_configuration_that_is_none_is_refused_by_name(run: Path, old: str, new: str) -> None:
    text = (run / "config.json").read_text()
    assert old in text
    (run / "config.json").write_text(text.replace(old, new, 1))
    with pytest.raises(CorruptRunError, match=r"config\.json"):
        bf.Journal.open(run)


def test_every_changed_byte_of_the_initial_weights_is_noticed(run: Path) -> None:
    file = run / "initial.safetensors"
    good = file.read_bytes()
    header = 8 + int.from_bytes(good[:8], "little")
    for position in [*range(header), *range(header, len(good), 97), len(good) - 1]:
        file.write_bytes(good)
        flip(file, position)
        try:
            damage = bf.Journal.open(run).damage
        except CorruptRunError as error:
            damage = str(error)
        if position >= header:
            assert damage is not None, position
        if damage is None:  # white space of the header
            assert (bf.Journal.open(run).initial == initial_weights()).all()
        else:
            assert "initial.safetensors" in damage


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


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "missing", tmp_path / "file"):
        with pytest.raises(JournalError, match=str(path)):
            bf.Journal.open(path)


# --- Snapshots


def test_only_the_newest_two_snapshots_are_kept(tmp_path: Path) -> None:
    def names() -> list[str]:
        return sorted(file.name for file in (tmp_path / "run/snapshots").iterdir())

    seen: dict[int, list[str]] = {}

    def look(record: Record) -> None:
        seen[record.round] = names()

    train_digits(tmp_path / "run", 6, snapshot_every=1, progress=look)
    assert seen[0] == ["00000001.safetensors"]
    assert seen[1] == ["00000001.safetensors", "00000002.safetensors"]
    for round in range(2, 7):
        assert seen[round] == [f"{round:08d}.safetensors", f"{round + 1:08d}.safetensors"]
    with safe_open(tmp_path / "run/snapshots/00000007.safetensors", "numpy") as file:
        assert set(file.keys()) == {"weights", "average", "slots.momentum"}


def count_replays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rounds that are replayed from here on."""
    rounds: list[int] = []

    def counted(state: State, table: Table, row: Row, execution: Execution, earlier: Callable[[int], State]) -> State:
        rounds.append(row.round)
        return replay(state, table, row, execution, earlier)

    monkeypatch.setattr("baffle.runfolder.journal.replay", counted)
    return rounds


def test_resuming_from_a_snapshot_equals_resuming_from_the_start(
    whole: Path, where: list[Place], final: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds = count_replays(monkeypatch)
    for name, snapshots, expected in (("with", True, [6]), ("without", False, [0, 1, 2, 3, 4, 5, 6])):
        path = copy_run(whole, tmp_path / name)
        with (path / "rows.bin").open("r+b") as file:
            file.truncate(where[-2].start)  # rows 0 to 6
        if not snapshots:
            for snapshot in (path / "snapshots").iterdir():
                snapshot.unlink()
        rounds.clear()
        assert resume_digits(path).weights_sha256 == final
        assert rounds == expected
    for name in ("rows.bin", "model.safetensors"):
        assert (tmp_path / "with" / name).read_bytes() == (tmp_path / "without" / name).read_bytes()


def test_snapshots_ahead_of_the_rows_do_not_push_out_the_new_ones(
    run: Path, where: list[Place], final: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (run / "rows.bin").open("r+b") as file:
        file.truncate(where[2].start)  # rows 0 and 1: both snapshots are ahead
    rounds = count_replays(monkeypatch)
    journal = bf.Journal.open(run, write=True)
    assert journal.state().round == 2
    assert rounds == [0, 1]
    journal.snapshot(journal.state())
    rounds.clear()
    assert journal.state().round == 2
    assert rounds == []
    journal.close()
    assert resume_digits(run).weights_sha256 == final


def snapshot_positions(file: Path) -> list[int]:
    data = file.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    return [*range(header), *range(header, len(data), 211)]


def test_every_damaged_snapshot_is_skipped(run: Path, final: str) -> None:
    states = {s.round: s for s in bf.Journal.open(run).states()}
    newest = run / "snapshots/00000009.safetensors"
    good = newest.read_bytes()
    for position in snapshot_positions(newest):
        for mask in (1, 0x20):
            newest.write_bytes(good)
            flip(newest, position, mask)
            journal = bf.Journal.open(run)
            assert journal.damage is None
            state = journal.state()
            assert state.round == ROUNDS + 1
            assert state_sha256(state) == state_sha256(states[ROUNDS + 1])
            assert sorted(state.slots) == ["momentum"], (position, mask)
            assert state.ema_weights.tobytes() == states[ROUNDS + 1].ema_weights.tobytes()
    for content in (b"", good[:4], good[:-1], b"\xff" * 64):
        newest.write_bytes(content)
        assert weights_sha256(bf.Journal.open(run).state().weights).hex() == final


def test_a_damaged_snapshot_falls_back_to_the_older_one(
    run: Path, where: list[Place], final: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    flip(run / "snapshots/00000009.safetensors", -1)
    rounds = count_replays(monkeypatch)
    assert resume_digits(run).weights_sha256 == final
    assert rounds == [6, 7, 8]
    flip(run / "snapshots/00000006.safetensors", -1)
    rounds.clear()
    assert resume_digits(run).weights_sha256 == final
    assert rounds == list(range(ROUNDS + 1))


def test_leftovers_of_a_kill_are_ignored(run: Path, final: str) -> None:
    (run / "snapshots/.00000012.safetensors.abcdef").write_bytes(b"half")
    (run / ".model.safetensors.abcdef").write_bytes(b"half")
    assert resume_digits(run).weights_sha256 == final


# --- One writer, one folder


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


def test_an_existing_folder_or_file_is_never_overwritten(run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    before = tree(tmp_path), (run / "config.json").read_bytes()
    for path in (run, tmp_path / "file", tmp_path / "empty"):
        with pytest.raises(RunExistsError, match=str(path)):
            train_digits(path, 1)
    assert (tree(tmp_path), (run / "config.json").read_bytes()) == before
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file/run", tmp_path / ("x" * 300), tmp_path / "a" / ("x" * 300)):
        with pytest.raises(JournalError, match=str(path)):
            train_digits(path, 1)
    assert not [p for p in tree(tmp_path) if "x" in Path(p).name]


def test_missing_parents_are_made(tmp_path: Path) -> None:
    train_digits(tmp_path / "a/b/run", 1)
    assert len(bf.Journal.open(tmp_path / "a/b/run").rows) == 2
    assert [p.name for p in (tmp_path / "a/b").iterdir()] == ["run"]


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


# --- Another engine, more rounds


def narrow() -> bf.LocalEngine:
    half = bf.Dataset(np.zeros((30, 32), np.float32), np.zeros(30, np.int64))
    runtime = TorchRuntime(linear(32), F.cross_entropy, threads=1)
    return bf.LocalEngine(runtime, bf.partition(half, 3))


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        (narrow, "same model"),
        (lambda: digits_engine(2), "same partition"),
        (lambda: digits_engine(4), "same partition"),
    ],
)
def test_another_model_or_partition_is_refused_and_changes_nothing(
    run: Path, where: list[Place], final: str, engine: Callable[[], bf.LocalEngine], words: str
) -> None:
    with (run / "rows.bin").open("r+b") as file:
        file.truncate(where[5].start)
    with pytest.raises(PlanError, match=words):
        bf.resume(run, engine(), rounds=20)
    assert json.loads((run / "config.json").read_text())["rounds"] == ROUNDS
    assert resume_digits(run).weights_sha256 == final


def test_more_rounds_equal_a_longer_run(run: Path, final: str, tmp_path: Path) -> None:
    longer = train_digits(tmp_path / "longer", ROUNDS + 4)
    assert longer.weights_sha256 != final
    resumed = resume_digits(run, rounds=ROUNDS + 4)
    assert resumed.weights_sha256 == longer.weights_sha256
    assert [r.round for r in resumed.records] == list(range(ROUNDS + 5))
    assert (run / "rows.bin").read_bytes() == (tmp_path / "longer/rows.bin").read_bytes()
    assert bf.Journal.open(run).config.rounds == ROUNDS + 4
    assert resumed.summary()["rounds"] == ROUNDS + 4
    costs = [(r.bytes_up, r.bytes_down, r.forward_passes, r.samples_forwarded) for r in resumed.records]
    assert costs == [(r.bytes_up, r.bytes_down, r.forward_passes, r.samples_forwarded) for r in longer.records]


@pytest.mark.parametrize("rounds", [0, -1])
def test_a_bad_number_of_rounds_is_refused_and_lets_go(run: Path, final: str, rounds: int) -> None:
    with pytest.raises(OptionError, match=f"rounds = {rounds}"):
        resume_digits(run, rounds=rounds)
    assert resume_digits(run).weights_sha256 == final


# --- Disk full


class Full:
    """Makes the n-th call of an ``os`` function fail for want of space, once."""

    def __init__(self, actual: Callable[..., int | None], at: int, *, partial: bool = False) -> None:
        self.actual, self.at, self.partial, self.calls = actual, at, partial, 0

    def __call__(self, descriptor: int, *data: memoryview) -> int | None:
        self.calls += 1
        if self.calls == self.at + 1 and self.partial and len(data[0]) > 1:
            return self.actual(descriptor, data[0][: len(data[0]) // 2])
        if self.calls == self.at + (2 if self.partial else 1):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.actual(descriptor, *data)


def trained_full(path: Path, function: str, at: int, *, partial: bool = False) -> str | None:
    """Train 4 rounds on a disk that is full once; the message, or None if it never came to the n-th call."""
    full = Full(getattr(os, function), at, partial=partial)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"baffle.runfolder.journal.os.{function}", full)
        try:
            train_digits(path, 4)
        except JournalError as error:
            assert full.calls > at
            return str(error)
    assert full.calls <= at
    return None


@pytest.mark.parametrize("partial", [False, True])
def test_a_full_disk_at_any_write_leaves_a_run_that_resumes(tmp_path: Path, partial: bool) -> None:
    expected = train_digits(None, 4)
    for at in range(10):  # two writes a round, rounds 0 to 4
        path = tmp_path / f"run-{at}"
        message = trained_full(path, "write", at, partial=partial)
        assert message is not None
        for word in (str(path), f"round {at // 2}", "No space left", "baffle resume"):
            assert word in message
        journal = bf.Journal.open(path)
        assert journal.damage is None
        assert logged(journal.records) == logged(list(expected.records))[: at // 2]
        assert (path / "metrics.jsonl").read_bytes().count(b"\n") == at // 2
        assert resume_digits(path).weights_sha256 == expected.weights_sha256
        assert replayed(path) == logged(list(expected.records))
    assert trained_full(tmp_path / "enough", "write", 10, partial=partial) is None


def test_a_full_disk_at_any_flush_leaves_nothing_or_a_run_that_resumes(tmp_path: Path) -> None:
    expected = train_digits(None, 4).weights_sha256
    kept = 0
    for at in range(100):
        folder = tmp_path / str(at)
        folder.mkdir()
        message = trained_full(folder / "run", "fsync", at)
        if message is None:
            break
        assert "No space left" in message
        assert {p.name for p in folder.iterdir()} <= {"run"}
        assert not [p for p in tree(folder) if Path(p).name.startswith(".")]
        if (folder / "run").exists():
            kept += 1
            assert bf.Journal.open(folder / "run").damage is None
            assert resume_digits(folder / "run").weights_sha256 == expected
    assert kept >= 10
    assert at - kept >= 8  # files of a new folder: nothing is left behind


def test_a_full_disk_while_a_folder_is_made_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    actual = tempfile.mkstemp
    for at in range(4):  # config, initial weights, rows, metrics
        calls = [0]

        def full(*, dir: Path, prefix: str, at: int = at, calls: list[int] = calls) -> tuple[int, str]:
            calls[0] += 1
            if calls[0] == at + 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return actual(dir=str(dir), prefix=prefix)

        with monkeypatch.context() as patch:
            patch.setattr("baffle.runfolder.journal.tempfile.mkstemp", full)
            with pytest.raises(JournalError, match="run: cannot create the run folder: No space left"):
                train_digits(tmp_path / "run", 1)
        assert list(tmp_path.iterdir()) == []


def test_a_full_disk_while_resuming_loses_nothing(run: Path, where: list[Place], final: str) -> None:
    before = logged(bf.Journal.open(run).records)
    with (run / "rows.bin").open("r+b") as file:
        file.truncate(where[6].end - 5)  # as a kill in round 6 leaves it
    for at in range(4):
        full = Full(os.write, at)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("baffle.runfolder.journal.os.write", full)
            with pytest.raises(JournalError, match="No space left"):
                resume_digits(run)
        journal = bf.Journal.open(run)
        assert journal.damage is None
        assert len(journal.rows) >= 6
        assert logged(journal.records) == before[: len(journal.rows)]
    assert resume_digits(run).weights_sha256 == final


def test_a_commit_that_failed_can_be_repeated(run: Path, where: list[Place], final: str) -> None:
    row, record = bf.Journal.open(run).rows[-1], bf.Journal.open(run).records[-1]
    with (run / "rows.bin").open("r+b") as file:
        file.truncate(where[-1].start)
    journal = bf.Journal.open(run, write=True)
    for at in (0, 1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("baffle.runfolder.journal.os.write", Full(os.write, at))
            with pytest.raises(JournalError, match=f"round {ROUNDS}"):
                journal.commit(row, record)
        assert len(journal.rows) == len(journal.records) == ROUNDS
    journal.commit(row, record)
    journal.close()
    assert replayed(run)[-1] == final
    assert len(replayed(run)) == ROUNDS + 1


LIMITED = """
import resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from helpers import digits_engine, train_digits
import baffle as bf
from baffle.errors import JournalError

def limited(size, work):
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        return work().weights_sha256
    except JournalError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))

folder = Path(sys.argv[2])
print(limited(1000, lambda: train_digits(folder / "none", 12, snapshot_every=1000)))
print(sorted(p.name for p in folder.iterdir()))
print(limited(3000, lambda: train_digits(folder / "run", 12, snapshot_every=1000)))
print(len(bf.Journal.open(folder / "run").rows), bf.Journal.open(folder / "run").damage)
print(limited(4100, lambda: bf.resume(folder / "run", digits_engine())))
print(len(bf.Journal.open(folder / "run").rows), bf.Journal.open(folder / "run").damage)
print(bf.resume(folder / "run", digits_engine()).weights_sha256)
"""


def test_a_real_limit_on_file_sizes(tmp_path: Path) -> None:
    expected = train_digits(None, 12)
    command = [sys.executable, "-c", LIMITED, str(Path(__file__).parents[1]), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    none, listing, first, held_first, second, held_second, last = done.stdout.splitlines()
    assert "none: cannot create the run folder: File too large" in none
    assert listing == "[]"
    for message, held in ((first, held_first), (second, held_second)):
        count, damage = held.split()
        assert f"cannot write round {count}: File too large" in message
        assert "baffle resume" in message
        assert damage == "None"
    assert 0 < int(held_first.split()[0]) < int(held_second.split()[0]) < 13
    assert last == expected.weights_sha256
    assert logged(bf.Journal.open(tmp_path / "run").records) == logged(list(expected.records))


# --- The same bits however they are computed

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
