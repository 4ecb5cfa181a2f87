"""Small models of every kind, and their losses under the strategies of PyTorch's runtime and in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baffle.core.directions import Directions
from baffle.core.types import Family, Losses, Masks
from baffle.data import Dataset
from baffle.runtimes.perturb import Perturbations
from baffle.runtimes.pytorch.runtime import TorchRuntime

CLASSES = 3


Make = Callable[[], nn.Module]


Shape = tuple[int, ...]


class With(nn.Module):
    """A model of some modules and parameters, which ``run(model, x)`` uses."""

    def __init__(self, run: Callable[..., object], **parts: object) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.run = run

    def forward(self, x: Tensor) -> object:
        return self.run(self, x)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.rand(shape) + 0.5)


def frozen(module: nn.Module) -> nn.Module:
    return module.requires_grad_(False)


def only(name: str, module: nn.Module) -> nn.Module:
    """Of a module's parameters one is trained."""
    for n, p in module.named_parameters():
        p.requires_grad_(n == name)
    return module


def data_of(shape: Shape, examples: int = 10, tokens: bool = False) -> Dataset:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 7, (examples, *shape)) if tokens else rng.normal(size=(examples, *shape))
    return Dataset(x, rng.integers(0, CLASSES, examples))


def runtime_of(model: nn.Module, strategy: str, precision: str = "fp32", masks: Masks | None = None) -> TorchRuntime:
    return TorchRuntime(model, F.cross_entropy, 1, precision=precision, strategy=strategy, masks=masks)


def asked_of(
    runtime: TorchRuntime,
    steps: tuple[float, ...] = (0.02, -0.02),
    baseline: int = 1,
    family: Family = "rank1",
    lattice: int = 0,
    k: int = 3,
) -> Perturbations:
    return Perturbations(Directions(runtime.table, family, (3, 1)), k, steps, baseline, lattice=lattice)


def losses_of(runtime: TorchRuntime, data: Dataset, asked: Perturbations) -> Losses:
    return runtime.losses(runtime.initial_weights(), asked, data)


def exact_losses(
    model: nn.Module, runtime: TorchRuntime, data: Dataset, asked: Perturbations
) -> npt.NDArray[np.float64]:
    """In float64, one pass after another, by PyTorch's own functional call."""
    double, weights = copy.deepcopy(model).double(), runtime.initial_weights()
    x = torch.from_numpy(np.array(data.inputs()))
    rows = []
    for w in asked.weights(weights, weights.copy()):
        flat = torch.from_numpy(w.astype(np.float64))
        own = {s.name: flat[s.slice].view(s.shape) for s in runtime.table}
        with torch.no_grad():
            output = torch.func.functional_call(double, own, (x.double() if x.is_floating_point() else x,))
        rows.append(F.cross_entropy(output, torch.from_numpy(data.y.copy()), reduction="none").numpy())
    return np.stack(rows)


def convolutional(conv: Callable[[], nn.Module], before: nn.Module | None = None) -> nn.Module:
    first = [before] if before is not None else []
    return nn.Sequential(*first, conv(), nn.Tanh(), nn.Flatten(), nn.LazyLinear(CLASSES))


def lazily(make: Make, shape: Shape) -> nn.Module:
    model = make()
    with torch.no_grad():
        model(torch.zeros(2, *shape))
    return model


def twice() -> nn.Module:
    return With(lambda m, x: m.out(m.same(torch.tanh(m.same(x)))), same=nn.Linear(6, 6), out=nn.Linear(6, CLASSES))


def tied() -> nn.Module:
    model = With(lambda m, x: m.b(torch.tanh(m.a(x))), a=nn.Linear(6, 6), b=nn.Linear(6, 6))
    model.get_submodule("b").register_parameter("weight", model.get_parameter("a.weight"))
    return model


def layer(i: int = 6, o: int = CLASSES) -> nn.Linear:
    return nn.Linear(i, o)


def conv2(*args: object, **kwargs: object) -> Make:
    return partial(convolutional, partial(nn.Conv2d, *args, **kwargs))  # type: ignore[arg-type]  # any arguments


def conv1(*args: object, **kwargs: object) -> Make:
    return partial(convolutional, partial(nn.Conv1d, *args, **kwargs))  # type: ignore[arg-type]  # any arguments


def behind(make: Callable[[], nn.Module], i: int, shape: Shape) -> Make:
    """A trained layer comes first, so that the module sees a stack."""
    return lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(i, i), nn.Tanh(), nn.Unflatten(1, shape), make(), nn.Flatten(), nn.LazyLinear(CLASSES)
    )


def by(run: Callable[..., object], **parts: Callable[[], object]) -> Make:
    return lambda: With(run, **{name: part() for name, part in parts.items()})


IMAGE, TOKENS = (2, 6, 6), (4, 6)


# fmt: off
# ruff: noqa: E501
STACKABLE: dict[str, tuple[Make, Shape]] = {
    "linear": (layer, (6,)),
    "linear without bias": (lambda: nn.Linear(6, CLASSES, bias=False), (6,)),
    "mlp": (lambda: nn.Sequential(layer(6, 5), nn.Tanh(), nn.Linear(5, 4, bias=False), nn.Tanh(), layer(4)), (6,)),
    "linear of tokens": (by(lambda m, x: m.b(torch.tanh(m.a(x))).mean(1), a=lambda: layer(6, 5), b=lambda: layer(5)), TOKENS),
    "linear of tokens, no bias": (by(lambda m, x: m.b(m.a(x)).mean(1), a=lambda: nn.Linear(6, 5, bias=False), b=lambda: layer(5)), TOKENS),
    "keywords": (by(lambda m, x: F.linear(input=x, weight=m.w, bias=m.b), w=lambda: parameter(3, 6), b=lambda: parameter(3)), (6,)),
    "conv2d": (conv2(2, 3, 3), IMAGE),
    "conv2d strides": (conv2(2, 3, 3, stride=2, padding=1), IMAGE),
    "conv2d same, dilation": (conv2(2, 3, 3, padding="same", dilation=2), IMAGE),
    "conv2d no bias": (conv2(2, 3, 3, bias=False), IMAGE),
    "conv2d groups": (conv2(2, 4, 3, groups=2), IMAGE),
    "conv2d circular": (conv2(2, 3, 3, padding=1, padding_mode="circular"), IMAGE),
    "conv1d": (conv1(2, 3, 3, stride=2, padding=1), (2, 9)),
    "conv1d groups": (conv1(2, 4, 3, groups=2, dilation=2, bias=False), (2, 9)),
    "two convs": (lambda: convolutional(lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Conv2d(4, 4, 3, groups=2, padding="same"))), IMAGE),
    "frozen conv, trained bias": (lambda: convolutional(lambda: only("bias", nn.Conv2d(2, 3, 3))), IMAGE),
    "trained conv, frozen bias": (lambda: convolutional(lambda: only("weight", nn.Conv2d(2, 3, 3))), IMAGE),
    "layer norm first": (lambda: nn.Sequential(nn.LayerNorm(6), nn.Flatten(), layer(24)), TOKENS),
    "layer norm behind": (behind(lambda: nn.LayerNorm(6), 24, TOKENS), TOKENS),
    "layer norm of tokens": (behind(lambda: nn.LayerNorm([4, 6]), 24, TOKENS), TOKENS),
    "layer norm, trained bias": (behind(lambda: only("bias", nn.LayerNorm(6)), 24, TOKENS), TOKENS),
    "group norm": (behind(lambda: nn.GroupNorm(2, 4), 24, (4, 3, 2)), (24,)),
    "group norm first": (lambda: nn.Sequential(nn.GroupNorm(2, 4), nn.Flatten(), layer(24)), (4, 3, 2)),
    "batch norm": (behind(lambda: nn.BatchNorm2d(4).eval(), 24, (4, 3, 2)), (24,)),
    "batch norm first": (lambda: nn.Sequential(nn.BatchNorm2d(4).eval(), nn.Flatten(), layer(24)), (4, 3, 2)),
    "batch norm of vectors": (behind(lambda: only("weight", nn.BatchNorm1d(6).eval()), 6, (6,)), (6,)),
    "gate": (by(lambda m, x: m.a(x * m.p), a=layer, p=lambda: parameter(6)), (6,)),
    "gate behind": (by(lambda m, x: m.a(x) * m.p, a=layer, p=lambda: parameter(3)), (6,)),
    "number": (by(lambda m, x: m.a(x) * m.p, a=layer, p=lambda: parameter()), (6,)),
    "position": (by(lambda m, x: m.a(m.p + x).mean(1), a=layer, p=lambda: parameter(1, 4, 6)), TOKENS),
    "position behind": (by(lambda m, x: (m.a(x) + m.p).tanh().mean(1), a=layer, p=lambda: parameter(4, 3)), TOKENS),
    "differences": (by(lambda m, x: m.q - m.a(m.p - x), a=layer, p=lambda: parameter(6), q=lambda: parameter(1)), (6,)),
    "quotient": (by(lambda m, x: m.a(x / m.p) / m.q, a=layer, p=lambda: parameter(6), q=lambda: parameter(1, 3)), (6,)),
    "in place": (by(lambda m, x: m.a(x).mul_(m.p).add_(m.p), a=layer, p=lambda: parameter(3)), (6,)),
    "add twice": (by(lambda m, x: torch.add(m.a(x), m.p, alpha=2), a=layer, p=lambda: parameter(3)), (6,)),
    "residual behind": (by(lambda m, x: m.c((h := m.a(x)) + torch.tanh(m.b(h))), a=lambda: layer(6, 5), b=lambda: layer(5, 5), c=lambda: layer(5)), (6,)),
    "frozen first": (lambda: nn.Sequential(frozen(layer(6, 5)), nn.Tanh(), layer(5)), (6,)),
    "frozen between": (lambda: nn.Sequential(layer(6, 5), frozen(layer(5, 5)), nn.Tanh(), layer(5)), (6,)),
    "frozen last": (lambda: nn.Sequential(layer(6, 5), nn.Tanh(), frozen(layer(5))), (6,)),
    "trained bias": (lambda: nn.Sequential(only("bias", layer(6, 5)), nn.Tanh(), only("bias", layer(5))), (6,)),
    "trained weight": (lambda: nn.Sequential(only("weight", layer(6, 5)), nn.Tanh(), only("weight", layer(5))), (6,)),
    "used twice": (twice, (6,)),
    "tied": (tied, (6,)),
    "a list": (by(lambda m, x: F.linear(x, m.p[0]) + m.p[1], p=lambda: nn.ParameterList([parameter(3, 6), parameter(3)])), (6,)),
}


REFUSED: dict[str, tuple[Make, Shape, str]] = {
    "attention": (by(lambda m, x: m.b(m.a(x, x, x)[0].mean(1)), a=lambda: nn.MultiheadAttention(6, 2, batch_first=True), b=layer), TOKENS, "multi_head_attention_forward()"),
    "lstm": (by(lambda m, x: m.b(m.a(x)[0][:, -1]), a=lambda: nn.LSTM(6, 5, batch_first=True), b=lambda: layer(5)), TOKENS, "lstm()"),
    "transposed": (by(lambda m, x: x @ m.w.t(), w=lambda: parameter(3, 6)), (6,), "t()"),
    "matmul": (by(lambda m, x: torch.matmul(x, m.w), w=lambda: parameter(6, 3)), (6,), "matmul()"),
    "alone": (by(lambda m, x: m.a(x) * (2 * m.p), a=layer, p=lambda: parameter(3)), (6,), "alone"),
    "residual from before": (by(lambda m, x: m.b(x + m.a(x)), a=lambda: layer(6, 6), b=layer), (6,), "size of tensor"),
    "data": (by(lambda m, x: F.linear(x, m.w.data), w=lambda: parameter(3, 6)), (6,), "get()"),
}


# fmt: on
def made(make: Make, shape: Shape) -> nn.Module:
    torch.manual_seed(0)
    return lazily(make, shape)


def in_place(m: Any, x: Tensor) -> object:
    h = m.a(x)
    h.mul_(2)
    return m.b(h)
