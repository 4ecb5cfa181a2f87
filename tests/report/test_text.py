"""A run in words."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import msgspec

from baffle.report import read_run, totals
from baffle.report.figures import progress_charts
from baffle.report.text import settings
from helpers import METHOD


def test_settings_name_what_was_chosen(run: Path) -> None:
    chosen = settings(read_run(run))
    assert chosen["model"] == "linear"
    assert chosen["clients"] == 3
    assert chosen["directions K"] == METHOD.num_directions
    assert chosen["optimizer"] == "sgd (lr 0.05, momentum 0.5, weight_decay 0.0)"
    assert "alpha" not in chosen


def test_loss_on_validation_data_is_called_so(run: Path) -> None:
    log = read_run(run)
    held = replace(log, config=msgspec.structs.replace(log.config, command={"holdout": 100}))
    found = totals(held)
    assert found["accuracy"] == json.loads((run / "summary.json").read_text())["accuracy"]
    assert found["validation_accuracy"] == log.records[-1].accuracy
    assert "on the validation data" in progress_charts([held])[0].caption
    went_on = replace(held, records=held.records[:-1])
    assert "accuracy" not in totals(went_on)
