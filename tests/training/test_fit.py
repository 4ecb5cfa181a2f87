"""``fit``: the shortest way to a trained model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import baffle as bf
from baffle.errors import DataError, RunExistsError
from baffle.training.fit import default_method
from helpers import linear

TRAIN, TEST = bf.load("digits")
CLIENTS = bf.partition(TRAIN, clients=3)


def test_fit_is_train_with_the_default_method_and_leaves_the_model_alone(tmp_path: Path) -> None:
    model = linear()
    before = [p.clone() for p in model.parameters()]
    run = bf.fit(model, CLIENTS, loss=F.cross_entropy, test=TEST, rounds=4, seed=3, out=tmp_path / "run")
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert run.config.method == default_method(4)
    strategy = run.config.plan["strategy"]  # measured, so it may differ from one time to another
    assert strategy in ("copies", "stacked")
    runtime = bf.TorchRuntime(model, F.cross_entropy, strategy=str(strategy))
    engine = bf.LocalEngine(runtime, CLIENTS)
    same = bf.train(default_method(4), engine, runtime.initial_weights(), rounds=4, test=TEST, seed=3)
    assert (same.weights_sha256, same.loss, same.accuracy) == (run.weights_sha256, run.loss, run.accuracy)


def test_a_method_of_ones_own_is_taken_as_it_is() -> None:
    method = bf.Method(num_directions=2, batch_size=4, optimizer=bf.sgd(0.1))
    assert bf.fit(linear(), CLIENTS, loss=F.cross_entropy, rounds=1, method=method).config.method == method


def test_what_cannot_be_trained_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        bf.fit(linear(), [TRAIN.take(np.arange(0))], loss=F.cross_entropy)
    (tmp_path / "run").mkdir()
    with pytest.raises(RunExistsError):
        bf.fit(linear(), CLIENTS, loss=F.cross_entropy, rounds=1, out=tmp_path / "run")
