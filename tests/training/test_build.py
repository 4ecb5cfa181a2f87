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
    evaluated_as,
    load_start,
    model_of,
    splits,
    vocabulary_of,
)
from baffle.training.options import TrainConfig
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
