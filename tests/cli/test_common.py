"""What commands check of a run folder before they use it."""

from __future__ import annotations

from pathlib import Path

import pytest

import baffle as bf
from baffle.cli.common import require_rounds, warn_of_lost
from baffle.errors import CorruptRunError, OptionError
from helpers import flip, places, train_digits


def test_a_run_needs_rounds_and_for_some_commands_no_damage(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train_digits(run, rounds=3)
    flip(run / "rows.bin", places(run)[2].row)
    journal = bf.Journal.open(run)
    require_rounds(journal, whole=False)
    with pytest.raises(CorruptRunError, match="2 rounds before it are intact"):
        require_rounds(journal, whole=True)
    (run / "rows.bin").write_bytes(b"")
    (run / "metrics.jsonl").write_bytes(b"")
    with pytest.raises(OptionError, match="at least one round"):
        require_rounds(bf.Journal.open(run), whole=False)


def test_rows_that_were_lost_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    train_digits(run, rounds=3)
    warn_of_lost(bf.Journal.open(run))
    assert capsys.readouterr().err == ""
    with (run / "rows.bin").open("r+b") as file:
        file.truncate(places(run)[1].start)
    warn_of_lost(bf.Journal.open(run))
    assert "it holds 1 rows, metrics mention 3 more" in capsys.readouterr().err
