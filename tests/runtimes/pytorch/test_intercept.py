"""Functions that read trained tensors in unusual ways are evaluated correctly, or refused as a stack."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

from baffle.core.types import Losses
from baffle.errors import ModelError
from baffle.runtimes.pytorch.runtime import STRATEGIES, TorchRuntime
from strategies import Make, asked_of, by, data_of, exact_losses, frozen, in_place, layer, losses_of, parameter


def writes_on_input(m: Any, x: Tensor) -> object:
    x += 1
    return m.a(x)


def without_grad(m: Any, x: Tensor) -> object:
    with torch.no_grad():
        return m.a(x)


class Doubled(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w * 2


def doubled() -> nn.Module:
    model = layer()
    parametrize.register_parametrization(model, "weight", Doubled())
    return model


class Product(torch.autograd.Function):
    @staticmethod
    def forward(_: object, x: Tensor, w: Tensor) -> Tensor:
        return x @ w.t()


apply: Callable[..., Tensor] = Product.apply


def mapped(m: Any, x: Tensor) -> object:
    return torch.vmap(lambda v: m.w @ v)(x)


# fmt: off
# ruff: noqa: E501
ODD: dict[str, Make] = {
    "writes on its input": by(writes_on_input, a=layer),
    "relu in place": lambda: nn.Sequential(nn.ReLU(inplace=True), layer()),
    "relu in place behind": lambda: nn.Sequential(layer(6, 5), nn.ReLU(inplace=True), layer(5)),
    "in place on frozen": by(in_place, a=lambda: frozen(layer(6, 6)), b=layer),
    "data": by(lambda m, x: F.linear(x, m.w.data), w=lambda: parameter(3, 6)),
    "detach": by(lambda m, x: F.linear(x, m.w.detach()), w=lambda: parameter(3, 6)),
    "no grad": by(without_grad, a=layer),
    "keywords": by(lambda m, x: F.linear(input=x, weight=m.w), w=lambda: parameter(3, 6)),
    "parametrized": doubled,
    "weight norm": lambda: parametrizations.weight_norm(layer()),
    "checkpoint": by(lambda m, x: m.b(checkpoint(m.a, x, use_reentrant=False)), a=lambda: layer(6, 5), b=lambda: layer(5)),
    "function": by(lambda m, x: apply(x, m.w), w=lambda: parameter(3, 6)),
    "vmap": by(mapped, w=lambda: parameter(3, 6)),
    "a number of it": by(lambda m, x: m.a(x) * float(m.p), a=layer, p=lambda: parameter()),
    "a decision": by(lambda m, x: m.a(x) if m.p > 1 else -m.a(x), a=layer, p=lambda: parameter()),
}


# fmt: on
STACKS = {n for n in ODD if " place" in n} | {"writes on its input", "no grad", "keywords", "checkpoint"}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_odd_models_are_evaluated_right_or_refused_as_a_stack(name: str, strategy: str) -> None:
    torch.manual_seed(0)
    model, data = ODD[name](), data_of((6,), 200)
    runtime = TorchRuntime(model, F.cross_entropy, 1, strategy=strategy)
    asked, before, x = asked_of(runtime), copy.deepcopy(model.state_dict()), data.x.copy()
    exact = exact_losses(model, runtime, data, asked)

    def evaluate() -> list[Losses]:
        evaluated = runtime.evaluate(runtime.initial_weights(), data).losses
        return [losses_of(runtime, data, asked), losses_of(runtime, data, asked), evaluated]

    if strategy == "stacked" and name not in STACKS:
        with pytest.raises(ModelError, match="expected copies or streaming"):
            evaluate()
        return
    found = evaluate()
    for losses, expected in zip(found, (exact, exact, exact[0]), strict=True):
        assert np.abs(losses - expected).max() < 3e-6 * max(1, exact.max())
    assert np.array_equal(data.x, x)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
