"""What is shown while a run trains."""

from __future__ import annotations

from pathlib import Path

from helpers import Outcome


def test_progress_goes_to_stderr_and_nothing_else_is_left(trained: tuple[Path, Outcome]) -> None:
    path, outcome = trained
    assert outcome.err.splitlines()[-1].startswith("round 4/4 ")
    assert [p.name for p in path.parent.iterdir()] == ["run"]
