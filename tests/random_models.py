"""Models with random weights, their examples and outputs, compared with plain numpy."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

import reference
from baffle.models import MODELS, build

REFERENCES: dict[str, Callable[[reference.Parameters, reference.Array, str, str], reference.Array]] = {
    "lenet": reference.lenet,
    "lenet-small": reference.lenet_small,
    "mlp": reference.mlp,
    "transformer": reference.transformer,
    "wrn-10-2": reference.wrn_10_2,
}


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def stirred(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model with weights that are nowhere zero or alike, so that every one of them shows in the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def examples(shape: tuple[int, ...], vocabulary: int | None = None, count: int = 3) -> npt.NDArray[np.generic]:
    rng = np.random.default_rng(0)
    if vocabulary is None:
        return rng.normal(size=(count, *shape)).astype(np.float32)
    return rng.integers(0, vocabulary, (count, *shape))


def logits(model: nn.Module, x: npt.NDArray[np.generic]) -> npt.NDArray[np.float32]:
    with torch.inference_mode():
        return np.asarray(model(torch.from_numpy(x)).numpy())


def assert_follows_reference(
    name: str,
    shape: tuple[int, ...],
    *,
    activation: str | None = None,
    norm: str | None = None,
    vocabulary: int | None = None,
) -> None:
    model = stirred(build(name, shape, 7, 1, activation=activation, norm=norm, vocabulary=vocabulary))
    x = examples(shape, vocabulary)
    parameters = {n: p.detach().double().numpy() for n, p in model.named_parameters()}
    expected = REFERENCES[name](parameters, x.astype(np.float64), activation or "hardswish", norm or MODELS[name].norm)
    assert expected.shape == (len(x), 7)
    assert expected.std(0).max() > 0.01  # the examples differ
    assert np.abs(logits(model, x) - expected).max() < 2e-6 * np.abs(expected).max()


def fresh(seed: int, *layers: Callable[[], nn.Module]) -> list[Tensor]:
    """The parameters that PyTorch gives these layers under a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return [p for layer in layers for p in layer().parameters()]


def assert_uniform(values: Tensor, bound: float) -> None:
    """Within the bound, up to it, and with the spread of a uniform distribution."""
    flat = values.detach().double().numpy().ravel()
    assert np.abs(flat).max() <= bound * (1 + 1e-6)
    assert np.abs(flat).max() > bound * (1 - 20 / flat.size)
    assert flat.std() == pytest.approx(bound / math.sqrt(3), rel=4 / math.sqrt(flat.size))
    assert abs(flat.mean()) < 5 * bound / math.sqrt(3 * flat.size)
