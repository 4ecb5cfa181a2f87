"""Training has to learn: every family, difference and option reaches an accuracy on digits."""

from __future__ import annotations

import math

import msgspec
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import baffle as bf
from baffle.core.types import limit_of
from baffle.models import build
from baffle.runtimes.pytorch.runtime import TorchRuntime


def linear() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def run(rounds: int = 60, model: str = "mlp", **options: object) -> bf.Run:
    train, test = bf.load("digits")
    method = msgspec.structs.replace(
        bf.Method(num_directions=100, batch_size=16, optimizer=bf.adam(0.02, schedule=bf.cosine(rounds))), **options
    )
    parts = bf.partition(train, clients=10)
    return bf.fit(build(model, (1, 8, 8), 10), parts, loss=F.cross_entropy, test=test, rounds=rounds, method=method)


@pytest.mark.parametrize("family", ["rank1", "rademacher", "gaussian"])
def test_every_family_learns(family: str) -> None:
    done = run(family=family)
    assert done.accuracy is not None
    assert 0.86 < done.accuracy < 0.97


def test_central_differences_learn() -> None:
    assert (run(difference="central", num_directions=50).accuracy or 0) > 0.84


def test_own_directions_learn_faster() -> None:
    assert (run(sharing="per-client", num_directions=30).accuracy or 0) > 0.88


def test_local_steps_learn() -> None:
    train, test = bf.load("digits")
    method = bf.Method(num_directions=40, local_steps=4, batch_size=16, optimizer=bf.sgd(1.0), ema=0.5)
    done = bf.fit(linear(), bf.partition(train, 10), loss=F.cross_entropy, test=test, rounds=12, method=method)
    assert (done.accuracy or 0) > 0.85


def test_partial_participation_of_unlike_clients_learns() -> None:
    train, test = bf.load("digits")
    parts = bf.partition(train, clients=20, alpha=0.3)
    method = bf.Method(participation=0.5, batch_size=16, optimizer=bf.adam(0.02, schedule=bf.cosine(60)))
    done = bf.fit(build("mlp", (1, 8, 8), 10), parts, loss=F.cross_entropy, test=test, rounds=60, method=method)
    assert (done.accuracy or 0) > 0.80
    assert {r.participants for r in done.records} == {10}


def test_the_default_model_learns() -> None:
    assert (run(rounds=40, model="lenet-small", batch_size=8).accuracy or 0) > 0.75


def test_training_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    run(rounds=2)
    assert torch.equal(torch.get_rng_state(), before)


def test_load_into_brings_the_average_into_the_model() -> None:
    train, test = bf.load("digits")
    model = linear()
    done = bf.fit(model, bf.partition(train, 5), loss=F.cross_entropy, test=test, rounds=15)
    done.load_into(model)
    again = bf.LocalEngine(TorchRuntime(model, F.cross_entropy), [train])
    result = again.evaluate(TorchRuntime(model, F.cross_entropy).initial_weights(), test)
    assert result.correct is not None
    assert float(result.correct.mean()) == done.accuracy


@pytest.mark.parametrize("limit", [0.3, 1.0, 8.0])
def test_clipped_scalars_do_not_coarsen_the_scale(limit: float) -> None:
    done = run(rounds=40, client=(bf.clip_scalars(limit),))
    widest = math.ceil(math.log2(limit / limit_of(15)))
    assert max(r.exponent for r in done.records[1:]) <= widest
    assert all(r.scalar_rms > 0 for r in done.records)
    assert (done.accuracy or 0) > 0.8
