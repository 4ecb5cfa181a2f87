"""Optimizers against numbers worked by hand and against PyTorch; schedules; averages."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from baffle.core.optim import (
    Adam,
    AdamW,
    ClipUpdate,
    Constant,
    Cosine,
    Decay,
    Optimizer,
    Sgd,
    ema_decay,
    moving_average,
    update,
)
from baffle.core.types import Weights
from baffle.errors import OptionError

OPTIMIZERS: list[Optimizer] = [
    Sgd(lr=0.1),
    Sgd(lr=0.1, momentum=0.9),
    Sgd(lr=0.1, momentum=0.5, weight_decay=0.01),
    Adam(lr=0.02),
    Adam(lr=0.02, weight_decay=0.1),
    AdamW(lr=0.02, weight_decay=0.1),
]


def in_torch(optimizer: Optimizer, parameter: torch.Tensor) -> torch.optim.Optimizer:
    if isinstance(optimizer, Sgd):
        return torch.optim.SGD(
            [parameter], optimizer.lr, momentum=optimizer.momentum, weight_decay=optimizer.weight_decay
        )
    kind = torch.optim.AdamW if isinstance(optimizer, AdamW) else torch.optim.Adam
    return kind([parameter], optimizer.lr, weight_decay=optimizer.weight_decay)


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=repr)
def test_follows_pytorch(optimizer: Optimizer) -> None:
    rng = np.random.default_rng(0)
    weights: Weights = rng.normal(size=50).astype(np.float32)
    parameter = torch.from_numpy(weights.astype(np.float64)).requires_grad_()
    theirs, slots = in_torch(optimizer, parameter), optimizer.init(50)
    for step in range(1, 30):
        gradient = rng.normal(size=50).astype(np.float32)
        parameter.grad = torch.from_numpy(gradient.astype(np.float64))
        theirs.step()
        weights, slots = update(optimizer.name, weights, slots, gradient, optimizer.coefficients(step))
        assert weights.dtype == np.float32
        assert all(s.dtype == np.float32 for s in slots.values())
    assert np.abs(weights - parameter.detach().numpy()).max() < 5e-6


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=repr)
def test_descends_a_quadratic(optimizer: Optimizer) -> None:
    weights, slots = np.array([3.0, -2.0], np.float32), optimizer.init(2)
    for step in range(1, 400):
        weights, slots = update(optimizer.name, weights, slots, weights, optimizer.coefficients(step))
    assert np.abs(weights).max() < 0.05


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=repr)
def test_is_element_wise_and_changes_no_argument(optimizer: Optimizer) -> None:
    rng = np.random.default_rng(1)
    weights, gradient = rng.normal(size=(2, 33)).astype(np.float32)
    slots = {name: np.abs(rng.normal(size=33)).astype(np.float32) for name in optimizer.init(33)}
    before = [a.copy() for a in (weights, gradient, *slots.values())]
    whole, new = update(optimizer.name, weights, slots, gradient, optimizer.coefficients(7))
    assert all(np.array_equal(a, b) for a, b in zip(before, (weights, gradient, *slots.values()), strict=True))
    for i in range(33):
        part = slice(i, i + 1)
        cut = {name: s[part] for name, s in slots.items()}
        one, one_slots = update(optimizer.name, weights[part], cut, gradient[part], optimizer.coefficients(7))
        assert one.tobytes() == whole[part].tobytes()
        assert all(one_slots[name].tobytes() == new[name][part].tobytes() for name in new)


def test_sgd_with_momentum_by_hand() -> None:
    sgd = Sgd(lr=0.5, momentum=0.5)
    weights, slots = np.array([1.0], np.float32), sgd.init(1)
    weights, slots = update("sgd", weights, slots, np.array([2.0], np.float32), sgd.coefficients(1))
    assert weights.tolist() == [0.0]  # 1 - 0.5 * 2
    weights, slots = update("sgd", weights, slots, np.array([2.0], np.float32), sgd.coefficients(2))
    assert weights.tolist() == [-1.5]  # 0 - 0.5 * (0.5 * 2 + 2)


@given(st.integers(1, 10**6))
def test_coefficients_are_float32_numbers(step: int) -> None:
    for optimizer in OPTIMIZERS:
        for value in optimizer.coefficients(step).values():
            assert value == float(np.float32(value))
    assert ema_decay(0.98, step) == float(np.float32(ema_decay(0.98, step)))


def test_schedules() -> None:
    assert [Constant().factor(s) for s in (1, 1000)] == [1, 1]
    cosine = Cosine(rounds=10, warmup=2, final=0.1)
    factors = [cosine.factor(s) for s in range(1, 14)]
    assert factors[:2] == [pytest.approx(1 / 3), pytest.approx(2 / 3)]
    assert factors[2] == 1
    assert factors[2:11] == sorted(factors[2:11], reverse=True)
    assert factors[10:] == [pytest.approx(0.1)] * 3
    assert [Decay(3, 0.1).factor(s) for s in (1, 3, 4, 7)] == pytest.approx([1, 1, 0.1, 0.01])


def test_average_by_hand() -> None:
    assert moving_average(np.array([4.0], np.float32), np.array([8.0], np.float32), 0.75).tolist() == [5.0]
    assert ema_decay(0.98, 1) == pytest.approx(2 / 11)
    assert ema_decay(0.98, 10**4) == pytest.approx(0.98)


def test_clip_update_scales_to_the_max_norm() -> None:
    clip = ClipUpdate(0.5)
    assert clip.factor(np.array([0.5, -0.4], np.float32)) == 1.0
    assert clip.factor(np.array([0.1, -2.0], np.float32)) == 0.25
    assert clip.factor(np.zeros(0, np.float32)) == 1.0


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, "1", True, None])
def test_bad_learning_rates_are_refused(value: float) -> None:
    for kind in (Sgd, Adam, AdamW):
        with pytest.raises(OptionError, match="lr = "):
            kind(lr=value)


def test_other_bad_options_are_refused() -> None:
    for make in (
        lambda: Sgd(momentum=1.0),
        lambda: Sgd(weight_decay=-1),
        lambda: Adam(beta1=1.0),
        lambda: Adam(beta2=-0.1),
        lambda: Adam(eps=0),
        lambda: Cosine(rounds=0),
        lambda: Cosine(rounds=3, warmup=3),
        lambda: Decay(every=0),
        lambda: ClipUpdate(math.nan),
    ):
        with pytest.raises(OptionError):
            make()
