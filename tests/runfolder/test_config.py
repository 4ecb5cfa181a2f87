"""Making a run folder, and reading its settings."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

import pytest

import baffle as bf
from baffle.errors import CorruptRunError, JournalError, RunExistsError
from helpers import (
    train_digits,
    tree,
)


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


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "missing", tmp_path / "file"):
        with pytest.raises(JournalError, match=str(path)):
            bf.Journal.open(path)


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
            patch.setattr("baffle.runfolder.config.tempfile.mkstemp", full)
            with pytest.raises(JournalError, match="run: cannot create the run folder: No space left"):
                train_digits(tmp_path / "run", 1)
        assert list(tmp_path.iterdir()) == []
