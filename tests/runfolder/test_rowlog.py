"""The file of rows, cut and edited at every place that matters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch.nn.functional as F

import baffle as bf
from baffle.errors import CorruptRunError
from baffle.runtimes.pytorch.runtime import TorchRuntime
from helpers import (
    METHOD,
    Place,
    digits_engine,
    flip,
    initial_weights,
    linear,
)
from runfolder_helpers import ROUNDS, logged, replayed, resume_digits


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


def edit_length(run: Path, at: Place, byte: int) -> None:
    flip(run / "rows.bin", at.start + byte)


def edit_row(run: Path, at: Place, byte: int) -> None:
    flip(run / "rows.bin", at.row + byte if byte >= 0 else at.chain + byte)


def edit_chain(run: Path, at: Place, byte: int) -> None:
    flip(run / "rows.bin", at.chain + byte)


ROW_EDITS = (
    [(edit_length, byte) for byte in range(4)]
    + [(edit_row, byte) for byte in (0, 1, 60, 120, -1)]
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


def test_rows_cut_at_a_boundary_are_noticed(run: Path, where: list[Place], final: str) -> None:
    with (run / "rows.bin").open("r+b") as file:
        file.truncate(where[4].start)
    journal = bf.Journal.open(run)
    assert (len(journal.rows), journal.lost) == (4, len(where) - 4)
    assert resume_digits(run).weights_sha256 == final
