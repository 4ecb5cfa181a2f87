"""The baseline: exact gradients of the same mini-batches, the same optimizer, the same records."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import baffle as bf
from baffle.client.calibrate import DIRECTIONS, LADDER
from baffle.errors import DivergedError, JournalError, ModelError, OptionError, PlanError, RunExistsError
from baffle.report import read_run
from baffle.training.backprop import Kind, train_backprop
from helpers import digits_engine, initial_weights, invoke, linear

TRAIN, TEST = bf.load("digits")
SGD = bf.Method(batch_size=8, optimizer=bf.sgd(0.5), ema=0.5)
Vector = npt.NDArray[np.float64]


def run(method: bf.Method, kind: Kind = "fedsgd", rounds: int = 3, out: Path | None = None) -> bf.Run:
    engine = digits_engine(clients=4)
    return train_backprop(kind, method, engine, linear(), F.cross_entropy, rounds=rounds, test=TEST, out=out)


def slow_gradient(weights: Vector, batch: bf.Dataset) -> Vector:
    """Of softmax regression, by hand: (p - y) x and p - y, averaged."""
    x = batch.x.reshape(len(batch), -1).astype(np.float64)
    logits = x @ weights[:640].reshape(10, 64).T + weights[640:]
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    gap = p / p.sum(axis=1, keepdims=True) - np.eye(10)[batch.y.astype(int)]
    return np.concatenate([(gap.T @ x).ravel(), gap.sum(axis=0)]) / len(batch)


def slow_run(method: bf.Method, rounds: int) -> Vector:
    engine = digits_engine(clients=4)
    state = method.init(initial_weights())
    weights = state.weights.astype(np.float64)
    for round_ in range(1, rounds + 1):
        state = replace(state, round=round_)
        task, cohort = method.plan(state, engine.table, engine.sizes, 0, None)
        total = np.zeros_like(weights)
        for client, weight in cohort.items():
            local = weights.copy()
            for step in range(method.local_steps):
                gradient = slow_gradient(local, engine.batch(task, client, step))
                total += weight * gradient / (sum(cohort.values()) * method.local_steps)
                local -= task.local_lr * gradient
        weights -= 0.5 * total
    return weights


@pytest.mark.parametrize("participation", [1.0, 0.5])
def test_fedsgd_is_the_weighted_mean_of_the_gradients(participation: float) -> None:
    method = msgspec.structs.replace(SGD, participation=participation)
    assert np.allclose(run(method).weights, slow_run(method, 3), atol=1e-5)


def test_fedavg_is_the_mean_over_local_steps() -> None:
    method = msgspec.structs.replace(SGD, local_steps=3, local_lr=0.1)
    assert np.allclose(run(method, "fedavg").weights, slow_run(method, 3), atol=1e-5)


def test_plain_sgd_with_its_default_local_rate_is_federated_averaging() -> None:
    method = msgspec.structs.replace(SGD, local_steps=3)
    engine = digits_engine(clients=4)
    state = replace(method.init(initial_weights()), round=1)
    task, cohort = method.plan(state, engine.table, engine.sizes, 0, None)
    ends = []
    for client in cohort:
        local = initial_weights().astype(np.float64)
        for step in range(3):
            local -= task.local_lr * slow_gradient(local, engine.batch(task, client, step))
        ends.append(local)
    mean = np.average(ends, axis=0, weights=list(cohort.values()))
    assert np.allclose(run(method, "fedavg", rounds=1).weights, mean, atol=1e-5)


def test_forward_passes_estimate_what_the_baseline_computes() -> None:
    """Many directions: the update of one forward-only round points where the baseline's does."""
    method = msgspec.structs.replace(SGD, num_directions=20_000, family="rademacher", sigma=1e-3)
    forward = bf.train(method, digits_engine(clients=4), initial_weights(), rounds=1)
    true, guess = (r.weights.astype(np.float64) - initial_weights() for r in (run(method, rounds=1), forward))
    assert true @ guess / np.linalg.norm(true) / np.linalg.norm(guess) > 0.97


def test_records_count_passes_and_gradients_sent() -> None:
    done = run(SGD)
    assert [r.forward_passes for r in done.records] == [0, 4, 4, 4]
    assert [r.samples_forwarded for r in done.records] == [0, 32, 32, 32]
    assert [r.bytes_up for r in done.records] == [0] + [4 * 650 * 4] * 3
    assert [r.applied for r in done.records] == [False, True, True, True]
    assert done.records[0].loss is not None
    assert done.records[-1].loss == done.loss
    assert done.summary()["updates"] == 3


def test_the_model_handed_over_stays_as_it_is() -> None:
    model = linear()
    before = [p.clone() for p in model.parameters()]
    train_backprop("fedsgd", SGD, digits_engine(), model, F.cross_entropy, rounds=2)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_convolutions_that_are_viewed_are_trained() -> None:
    class Viewing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(1, 3, 3), nn.Linear(108, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.head(self.conv(x).view(len(x), -1))
            return out

    engine = bf.LocalEngine(bf.TorchRuntime(Viewing(), F.cross_entropy), bf.partition(TRAIN, 2))
    done = train_backprop("fedsgd", bf.Method(), engine, Viewing(), F.cross_entropy, rounds=20, test=TEST)
    assert done.accuracy is not None
    assert done.accuracy > 0.5


@pytest.mark.parametrize(("kind", "steps"), [("fedsgd", 2), ("fedavg", 1)])
def test_local_steps_belong_to_fedavg(kind: Kind, steps: int) -> None:
    with pytest.raises(PlanError, match=f"local_steps = {steps} with {kind}"):
        run(msgspec.structs.replace(SGD, local_steps=steps), kind)


def test_divergence_stops_with_a_line(tmp_path: Path) -> None:
    method = msgspec.structs.replace(SGD, optimizer=bf.sgd(3e38, weight_decay=999))
    with pytest.raises(
        DivergedError, match=r"round 1: the update .* would bring the weights near overflow or to NaN.*smaller lr"
    ):
        run(method, out=tmp_path / "run")
    assert [r.round for r in read_run(tmp_path / "run").records] == [0]


def test_the_folder_can_be_read_and_not_resumed(tmp_path: Path) -> None:
    done = run(SGD, out=tmp_path / "run")
    log = read_run(tmp_path / "run")
    assert log.backprop == "fedsgd"
    assert log.records == done.records
    with pytest.raises(JournalError, match=r"backpropagation baseline \(fedsgd\) has no journal"):
        bf.Journal.open(tmp_path / "run")
    with pytest.raises(RunExistsError):
        run(SGD, out=tmp_path / "run")
    for command in ("resume", "replay", "evaluate"):
        outcome = invoke(tmp_path, command, "run")
        assert outcome.code == 2
        assert "no journal" in outcome.err


def test_the_command_prints_the_same_names(tmp_path: Path) -> None:
    options = ("train", "--model", "mlp", "--rounds", "2", "--clients", "2", "--batch-size", "4", "--json")
    forward, fedsgd, fedavg = (
        invoke(tmp_path, *options, "--out", name, *more)
        for name, *more in (
            ("forward", "--num-directions", "2"),
            ("fedsgd", "--backprop", "fedsgd"),
            ("fedavg", "--backprop", "fedavg", "--local-steps", "2", "--local-lr", "0.1"),
        )
    )
    found = [json.loads(o.out.splitlines()[-1]) for o in (forward, fedsgd, fedavg)]
    assert list(found[0]) == list(found[1]) == list(found[2])
    assert [f["backprop"] for f in found] == [None, "fedsgd", "fedavg"]
    assert found[1]["sharing"] is None
    assert [(f["lattice"], f["sigma"] is None) for f in found] == [(0, False), (None, True), (None, True)]
    measured = len(LADDER) * (DIRECTIONS + 1)  # sigma, before round 0
    assert [f["forward_passes"] for f in found] == [measured + 2 * 3 * 3, 2 * 2, 2 * 2 * 2]
    wrong = invoke(tmp_path, *options, "--backprop", "fedavgs")
    assert wrong.code == 2
    assert "did you mean fedavg?" in wrong.err


def test_parameters_without_a_gradient_stay(tmp_path: Path) -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.spare, self.head = nn.Linear(3, 3), nn.Linear(64, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.head(x.flatten(1))
            return out

    model = Unused()
    engine = bf.LocalEngine(bf.TorchRuntime(model, F.cross_entropy), bf.partition(TRAIN, 2))
    done = train_backprop("fedsgd", SGD, engine, model, F.cross_entropy, rounds=2)
    assert (done.weights[:12] == engine_weights(model)[:12]).all()
    assert (done.weights[12:] != engine_weights(model)[12:]).any()


def test_what_cannot_be_differentiated_leaves_no_folder(tmp_path: Path) -> None:
    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(64, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                out: torch.Tensor = self.head(x.flatten(1))
            return out

    model = Detached()
    engine = bf.LocalEngine(bf.TorchRuntime(model, F.cross_entropy), bf.partition(TRAIN, 2))
    with pytest.raises(ModelError, match="cannot be differentiated"):
        train_backprop("fedsgd", SGD, engine, model, F.cross_entropy, rounds=2, out=tmp_path / "run")
    for field in ("rounds", "evaluate_every"):
        with pytest.raises(OptionError, match=f"{field} = 0"):
            train_backprop(
                "fedsgd",
                SGD,
                engine,
                model,
                F.cross_entropy,
                rounds=0 if field == "rounds" else 2,
                evaluate_every=0 if field == "evaluate_every" else 2,
                out=tmp_path / "run",
            )
    assert not (tmp_path / "run").exists()


def test_the_clip_factor_is_recorded() -> None:
    clipped = run(msgspec.structs.replace(SGD, server=(bf.clip_update(1e-4),)))
    assert [r.clip_factor < 0.1 for r in clipped.records] == [False, True, True, True]


def engine_weights(model: nn.Module) -> npt.NDArray[np.float32]:
    return bf.TorchRuntime(model, F.cross_entropy).initial_weights()
