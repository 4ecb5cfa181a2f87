"""The recorded plan as code reads it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from baffle.errors import OptionError
from baffle.runfolder.config import encode_config, read_config
from baffle.runtimes.evaluation_plan import EvaluationPlan
from baffle.training.build import evaluated_as
from baffle.training.options import TrainConfig

JOURNALS = sorted((Path(__file__).parents[1] / "fixtures/journals").iterdir())


def test_entries_that_code_depends_on_are_read() -> None:
    record: dict[str, str | int] = {"runtime": "ort", "threads": 3, "data": "ab", "frozen": "cd", "strategy": "stacked"}
    assert EvaluationPlan.of(record) == EvaluationPlan("ort", "stacked", 3, "ab", "cd")


def test_missing_entries_have_defaults_and_unknown_ones_are_ignored() -> None:
    assert EvaluationPlan.of({"onnxruntime": "1.2", "chunk_inputs": 7}) == EvaluationPlan()


def test_a_malformed_entry_is_left_to_the_options_made_from_it() -> None:
    plan = EvaluationPlan.of({"runtime": "torch", "threads": "many", "data": 1})
    assert (plan.threads, plan.data) == ("many", "1")
    with pytest.raises(OptionError, match="threads = 'many'"):
        evaluated_as(TrainConfig(), plan)


@pytest.mark.parametrize("folder", JOURNALS, ids=lambda folder: folder.name)
def test_the_plan_of_an_old_run_is_kept(folder: Path) -> None:
    config, recorded = read_config(folder), json.loads((folder / "config.json").read_bytes())
    assert json.dumps(json.loads(encode_config(config))["plan"]) == json.dumps(recorded["plan"])
    assert EvaluationPlan.of(config.plan).runtime == config.plan["runtime"]
