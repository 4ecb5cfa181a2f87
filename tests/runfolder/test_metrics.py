"""Lines of metrics: without their rows, edited, and rebuilt from the rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import baffle as bf
from baffle.errors import CorruptRunError
from helpers import (
    Place,
    flip,
)
from runfolder_helpers import ROUNDS, logged, replayed, resume_digits


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


def set_metric(run: Path, round: int, change: Callable[[bytes], bytes]) -> None:
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    assert change(lines[round]) != lines[round]
    lines[round] = change(lines[round])
    (run / "metrics.jsonl").write_bytes(b"".join(lines))


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
