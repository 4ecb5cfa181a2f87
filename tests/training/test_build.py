"""From options to data, model, runtime and engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import baffle as bf
from baffle.core.types import table_size
from baffle.errors import DataError, ModelError, OptionError
from baffle.runtimes.evaluation_plan import EvaluationPlan
from baffle.training.build import (
    assemble,
    assemble_server,
    command_of,
    decide,
    evaluated_as,
    load_start,
    model_of,
    splits,
    vocabulary_of,
)
from baffle.training.options import TrainConfig, train_config
from helpers import linear, train_digits

SMALL = TrainConfig(model="mlp", clients=3, strategy="copies", threads=1)


def test_the_parts_of_a_run_fit_together() -> None:
    setup = assemble(SMALL)
    assert setup.engine.sizes == tuple(len(data) for data in setup.clients)
    assert len(setup.initial) == table_size(setup.engine.table)
    assert (setup.validation, setup.choice) == (None, None)
    assert EvaluationPlan.of(setup.engine.plan).strategy == "copies"


def test_held_out_examples_are_taken_from_the_training_data() -> None:
    train, held, test = splits(TrainConfig(holdout=5))
    assert held is not None
    assert len(held) == 50
    assert len(train) + 50 == len(splits(TrainConfig())[0])
    assert len(test) == len(splits(TrainConfig())[2])


def test_a_server_must_name_its_runtime() -> None:
    with pytest.raises(OptionError, match="runtime = 'auto'"):
        assemble_server(TrainConfig(runtime="auto"))


def test_a_run_that_is_continued_is_evaluated_as_before() -> None:
    options = evaluated_as(TrainConfig(threads=7), EvaluationPlan("torch", "stacked", 2))
    assert (options.runtime, options.strategy, options.threads) == ("torch", "stacked", 2)
    options = evaluated_as(TrainConfig(), EvaluationPlan("ort", "copies", 3))
    assert (options.runtime, options.strategy, options.threads) == ("ort", "auto", 3)


def test_a_run_from_python_has_no_options(tmp_path: Path) -> None:
    train_digits(tmp_path / "run", rounds=1)
    with pytest.raises(OptionError, match=r"bf\.resume"):
        command_of(bf.Journal.open(tmp_path / "run"))


def test_a_model_is_pruned_and_frozen_as_options_say() -> None:
    train, _, _ = splits(SMALL)
    model, masks = model_of(TrainConfig(model="mlp", prune=0.5, trainable="*.weight"), train, None, train)
    assert masks is not None
    assert masks.keys() <= {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(name.endswith(".weight") == p.requires_grad for name, p in model.named_parameters())


def test_a_start_is_the_average_of_a_run(tmp_path: Path) -> None:
    run = train_digits(tmp_path / "run", rounds=2)
    model = linear(seed=1)
    load_start(model, tmp_path / "run")
    assert np.array_equal(torch.cat([p.detach().reshape(-1) for p in model.parameters()]).numpy(), run.average)
    with pytest.raises(ModelError, match="no tensor of the model"):
        load_start(
            torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1)).requires_grad_(False).append(linear()), tmp_path / "run"
        )


def test_the_vocabulary_is_one_more_than_the_largest_token() -> None:
    tokens = bf.Dataset(np.array([[0, 4], [2, 7]]), np.array([0, 1]))
    assert vocabulary_of(tokens, None) == 8
    assert vocabulary_of(bf.load("digits")[0]) is None
    with pytest.raises(DataError, match="a token -1"):
        vocabulary_of(bf.Dataset(np.array([[-1, 4]]), np.array([0])))


class Refusing:
    """Makes something of options, as long as they ask for one of some kinds of credit."""

    def __init__(self, *kinds: str) -> None:
        self.kinds, self.asked = kinds, list[tuple[str, str | None]]()

    def __call__(self, options: TrainConfig) -> str:
        self.asked.append((options.credit, options.head))
        if options.credit not in self.kinds:
            raise ModelError(f"no {options.credit}")
        return options.credit


@pytest.mark.parametrize(
    ("has", "asked", "numbers"),
    [
        (("local", "global"), 1, (5, 8, 8, 0.03)),
        (("feature",), 2, (5, 8, 8, 0.03)),
        (("global",), 3, (20, 8, 8, 0.03)),
    ],
)
def test_the_first_kind_of_numbers_that_the_model_has_is_taken(
    has: tuple[str, ...], asked: int, numbers: tuple[int, int, int, float]
) -> None:
    make = Refusing(*has)
    options, made, plan = decide(TrainConfig(), make, examples=100)
    assert len(make.asked) == asked
    assert (made, options.credit, options.head) == (has[0], has[0], "exact")
    assert (options.num_directions, options.slices, options.bits, options.lr) == numbers
    assert ("no rows: no local" in plan) == (asked > 1)


def test_what_is_set_is_kept_and_slices_fit_the_smallest_client() -> None:
    options, _, _ = decide(TrainConfig(num_directions=3, lr=0.5), Refusing("local"), examples=6)
    assert (options.num_directions, options.slices, options.bits, options.lr) == (3, 6, 8, 0.5)
    options, _, _ = decide(TrainConfig(optimizer="sgd", batch_size=4), Refusing("local"))
    assert (options.slices, options.lr) == (4, 0.01)


@pytest.mark.parametrize(
    "changes", [{"credit": "global"}, {"strategy": "copies"}, {"head": "directions"}, {"memory": "1GB"}]
)
def test_options_about_one_scalar_per_direction_choose_it(changes: dict[str, str]) -> None:
    options, _, _ = decide(train_config(None, dict(changes)), Refusing("local", "feature", "global"))
    assert (options.credit, options.head) == ("global", "directions")
    assert (options.num_directions, options.slices, options.bits, options.lr) == (100, 1, 15, 0.01)


@pytest.mark.parametrize("changes", [{"strategy": "stacked"}, {"memory": "1GB"}, {"head": "directions"}])
def test_the_plan_says_which_option_left_no_rows(changes: dict[str, str]) -> None:
    [(name, value)] = changes.items()
    _, _, plan = decide(train_config(None, dict(changes)), Refusing("global"))
    assert plan == f"a scalar per direction (no rows: {name} = {value} is about that alone)"
    _, _, plan = decide(train_config(None, {"credit": "global", **changes}), Refusing("global"))
    assert plan == "a scalar per direction"  # nothing was left open


def test_a_kind_that_is_set_and_that_the_model_has_not_is_refused() -> None:
    with pytest.raises(ModelError, match="no local"):
        decide(TrainConfig(credit="local"), Refusing("global"))


def test_a_decision_is_kept_as_it_was_made() -> None:
    setup = assemble(TrainConfig(model="mlp", clients=3, threads=1))
    assert (setup.options.credit, setup.options.head, setup.options.num_directions) == ("local", "exact", 5)
    assert assemble(setup.options).engine.table == setup.engine.table
    assert setup.plan.startswith("a number per row, through a head on each layer; 6 passes over each example")
