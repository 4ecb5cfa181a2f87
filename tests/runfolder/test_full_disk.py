"""Disks that are full, at any write."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import baffle as bf
from baffle.errors import JournalError
from helpers import (
    Place,
    train_digits,
    tree,
)
from runfolder_helpers import ROUNDS, logged, replayed, resume_digits


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
