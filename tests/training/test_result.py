"""The result of training: weights, totals, and evaluation."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import torch

import baffle as bf
from baffle.core.state import weights_sha256
from baffle.data import Dataset
from baffle.runtimes import Evaluation
from helpers import METHOD, digits_engine, initial_weights, linear, train_digits

_, TEST = bf.load("digits")


class Constant:
    """An engine whose evaluation is known."""

    def __init__(self, losses: list[float], correct: list[bool] | None) -> None:
        self._evaluation = Evaluation(
            np.array(losses, np.float32), None if correct is None else np.array(correct, np.bool_)
        )

    def evaluate(self, weights: object, data: Dataset) -> Evaluation:
        return self._evaluation


def test_totals_are_sums_over_the_records_and_are_written(tmp_path: Path) -> None:
    run = train_digits(tmp_path / "run", rounds=3)
    summary = run.summary()
    for name in ("forward_passes", "samples_forwarded", "bytes_up", "bytes_down"):
        assert summary[name] == sum(getattr(record, name) for record in run.records)
    assert (summary["rounds"], summary["updates"], summary["rollbacks"]) == (3, 3, 0)
    assert summary["parameters"] == len(run.weights) == len(run.average)
    assert summary["weights_sha256"] == run.weights_sha256 == weights_sha256(run.weights).hex()
    assert json.loads((tmp_path / "run/summary.json").read_text())["weights_sha256"] == run.weights_sha256


def test_with_validation_data_the_test_is_taken_once_at_the_end() -> None:
    seen: list[int] = []

    class Counted(bf.LocalEngine):
        def evaluate(self, weights: np.ndarray, data: Dataset) -> Evaluation:
            seen.append(len(data))
            return super().evaluate(weights, data)

    engine = digits_engine()
    engine.__class__ = Counted
    held = TEST.take(np.arange(50))
    run = bf.train(METHOD, engine, initial_weights(), rounds=4, test=TEST, validation=held, evaluate_every=2)
    assert seen == [1, 50, 50, 50, len(TEST)]  # a single example first, to refuse what cannot be evaluated
    assert run.validation_loss is not None
    assert run.loss == bf.evaluate(engine, run.average, TEST)[0]


def test_an_evaluation_is_the_mean_of_its_examples() -> None:
    weights = np.zeros(1, np.float32)
    assert bf.evaluate(Constant([1.0, 3.0], [True, False]), weights, TEST) == (2.0, 0.5)  # type: ignore[arg-type]
    assert bf.evaluate(Constant([math.nan], None), weights, TEST) == (math.inf, None)  # type: ignore[arg-type]
    assert bf.evaluate(Constant([], None), weights, None) == (None, None)  # type: ignore[arg-type]


def test_the_average_is_copied_into_a_model() -> None:
    run, model = train_digits(None, rounds=2), linear(seed=5)
    run.load_into(model)
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    assert np.array_equal(flat.numpy(), run.average)
