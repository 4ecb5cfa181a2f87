"""``baffle evaluate``."""

from __future__ import annotations

from pathlib import Path

from cli_helpers import last_json
from helpers import Outcome, invoke


def test_evaluate_agrees_with_train(trained: tuple[Path, Outcome], tmp_path: Path) -> None:
    path, outcome = trained
    summary, result = last_json(outcome), last_json(invoke(tmp_path, "evaluate", path, "--json"))
    assert (result["accuracy"], result["loss"]) == (summary["accuracy"], summary["loss"])
    assert result["round"] == 4
    assert isinstance(result["raw_accuracy"], float)
    assert result["raw_loss"] != result["loss"]
    table = invoke(tmp_path, "evaluate", path)
    assert table.code == 0
    assert f"{summary['accuracy']:.4f}" in table.out
