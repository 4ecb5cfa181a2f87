"""Outputs of the frozen prefix are computed once per batch, and only where that changes nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baffle.data import Dataset
from baffle.runtimes.pytorch.runtime import TorchRuntime
from strategies import (
    Make,
    asked_of,
    by,
    data_of,
    exact_losses,
    frozen,
    in_place,
    layer,
    losses_of,
    parameter,
)

CALLS = list[int]()


class Spy(nn.Module):
    """A frozen linear layer that counts the examples it is given, and has a buffer."""

    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inner = frozen(layer(6, 6))
        self.register_buffer("shift", torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        CALLS.append(len(x))
        return torch.tanh(self.inner(x)) + self.shift


def calls_of(runtime: TorchRuntime, data: Dataset, k: int) -> list[int]:
    """Sizes of the calls of spies in one evaluation, when all that is tried once was."""
    losses_of(runtime, data, asked_of(runtime, k=k))
    CALLS.clear()
    losses_of(runtime, data, asked_of(runtime, k=k))
    return CALLS.copy()


def writes_first(m: Any, x: Tensor) -> object:
    h = m.a(x)
    return m.c(h + m.b(h))


class WritesInput(nn.Module):
    """A frozen module that changes what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = frozen(layer(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.inner(x.add_(1))
        return found


class TestFrozenPrefix:
    @pytest.mark.parametrize("strategy", ["copies", "stacked"])
    @pytest.mark.parametrize("k", [1, 5])
    def test_it_is_evaluated_once_a_chunk(self, strategy: str, k: int) -> None:
        model = nn.Sequential(Spy(), layer())
        runtime = TorchRuntime(model, F.cross_entropy, 1, strategy=strategy)
        baseline = [128, 72] if strategy == "stacked" else []  # evaluated apart
        assert calls_of(runtime, data_of((6,), 200), k) == [*baseline, 128, 72]

    @pytest.mark.parametrize("strategy", ["copies", "stacked"])
    def test_nothing_is_ever_stale(self, strategy: str) -> None:
        model = nn.Sequential(Spy(), layer())
        runtime = TorchRuntime(model, F.cross_entropy, 1, strategy=strategy)
        asked, rng = asked_of(runtime), np.random.default_rng(5)
        for examples in (150, 150, 40, 200):
            data = Dataset(rng.normal(size=(examples, 6)), rng.integers(0, 3, examples))
            for _ in range(2):
                exact = exact_losses(model, runtime, data, asked)
                assert np.abs(losses_of(runtime, data, asked) - exact).max() < 2e-6
                assert np.abs(runtime.evaluate(runtime.initial_weights(), data).losses - exact[0]).max() < 2e-6
                data.x[:] = rng.normal(size=data.x.shape)

    @pytest.mark.parametrize(
        "make",
        [
            pytest.param(lambda: nn.Sequential(layer(6, 6), Spy(), layer()), id="behind a trained layer"),
            pytest.param(by(lambda m, x: m.b(m.a(m.a(x))), a=Spy, b=layer), id="called twice"),
            pytest.param(by(lambda m, x: m.b(m.a(x) * m.p), a=Spy, b=layer, p=lambda: parameter(6)), id="gate"),
            pytest.param(
                by(lambda m, x: m.b(m.a(x * m.p)), a=Spy, b=layer, p=lambda: parameter(6)), id="behind a gate"
            ),
            pytest.param(by(in_place, a=Spy, b=layer), id="its output is written on"),
            pytest.param(by(writes_first, a=Spy, b=WritesInput, c=layer), id="writes on its input"),
            pytest.param(lambda: nn.Sequential(torch.jit.script(layer(6, 6)), Spy(), layer()), id="behind a script"),
            pytest.param(lambda: nn.Sequential(nn.Sequential(Spy(), layer(6, 6)), Spy(), layer()), id="nested"),
        ],
    )
    @pytest.mark.parametrize("k", [2, 5])
    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_losses_are_right_wherever_it_stands(self, make: Make, k: int) -> None:
        torch.manual_seed(0)
        model = make()
        runtime, data = TorchRuntime(model, F.cross_entropy, 1), data_of((6,), 20)
        asked, weights = asked_of(runtime, k=k), runtime.initial_weights()
        alone = []
        for w in asked.weights(weights, weights.copy()):
            alone.append(TorchRuntime(model, F.cross_entropy, 1).evaluate(w.copy(), data).losses)
        assert np.array_equal(losses_of(runtime, data, asked), np.stack(alone))

    @pytest.mark.parametrize(
        "make",
        [
            pytest.param(lambda: nn.Sequential(layer(6, 6), Spy(), layer()), id="behind a trained layer"),
            pytest.param(by(lambda m, x: m.b(m.a(m.a(x))), a=Spy, b=layer), id="called twice"),
            pytest.param(by(in_place, a=Spy, b=layer), id="its output is written on"),
        ],
    )
    def test_it_is_not_taken_where_it_changes(self, make: Make) -> None:
        runtime = TorchRuntime(make(), F.cross_entropy, 1)
        few, many = (len(calls_of(runtime, data_of((6,)), k)) for k in (1, 4))
        assert many > few

    def test_within_little_memory_less_is_kept_and_the_losses_are_the_same(self) -> None:
        model, data = nn.Sequential(Spy(), layer()), data_of((6,), 200)
        all_of_it, little = (TorchRuntime(model, F.cross_entropy, 1, memory=m) for m in (10**8, 70_000))
        assert len(calls_of(all_of_it, data, 5)) == 2
        assert len(calls_of(little, data, 5)) > 20
        asked = asked_of(little)
        assert np.abs(losses_of(little, data, asked) - losses_of(all_of_it, data, asked)).max() < 1e-6
