"""Data sets and checks for pruned models."""

from __future__ import annotations

import copy

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from baffle.core.directions import Directions
from baffle.data import Dataset
from baffle.runtimes import Evaluation, Runtime
from baffle.runtimes.perturb import Perturbations

SHAPE = (1, 8, 8)


def batch(shape: tuple[int, ...] = SHAPE, examples: int = 20, vocabulary: int | None = None) -> Dataset:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(examples, *shape)) if vocabulary is None else rng.integers(0, vocabulary, (examples, *shape))
    return Dataset(x, np.arange(examples) % 10)


def with_weights(*layers: nn.Module, weights: list[list[list[float]]]) -> nn.Sequential:
    model = nn.Sequential(*layers)
    owners = [layer for layer in layers if isinstance(layer, nn.Linear)]
    for layer, values in zip(owners, weights, strict=True):
        layer.weight.data = torch.tensor(values)
    return model


def outputs(model: nn.Module, data: Dataset) -> npt.NDArray[np.float32]:
    with torch.inference_mode():
        return np.asarray(copy.deepcopy(model).eval()(torch.from_numpy(data.x)).numpy())


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


def assert_unchanged(model: nn.Module, before: dict[str, Tensor]) -> None:
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def examples(name: str, vocabulary: int | None) -> Dataset:
    return batch((6,), vocabulary=vocabulary) if vocabulary else batch()


def assert_trains(runtime: Runtime, data: Dataset) -> Evaluation:
    """Perturbed losses are finite, differ, and leave pruned weights at zero."""
    asked = Perturbations(Directions(runtime.table, "rank1", (3, 1)), 3, (0.01,), baseline=True)
    weights = runtime.initial_weights()
    losses = runtime.losses(weights, asked, data)
    assert np.isfinite(losses).all()
    assert np.ptp(losses, axis=0).max() > 1e-4
    for perturbed in asked.weights(weights, weights.copy()):
        for spec in runtime.table:
            assert spec.mask is None or not perturbed[spec.slice][~spec.mask].any()
    return runtime.evaluate(weights, data)
