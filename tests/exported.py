"""Data sets to export models for, and the comparison of a bundle with its model."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from torch import Tensor, nn

from baffle.core.directions import Directions
from baffle.data import Dataset
from baffle.runtimes import Runtime
from baffle.runtimes.onnx.bundle import Bundle
from baffle.runtimes.onnx.ort import OrtRuntime
from baffle.runtimes.perturb import Perturbations
from baffle.runtimes.pytorch.runtime import TorchRuntime

Loss = Callable[..., Tensor]


def numbers(*shape: int, examples: int = 12, classes: int = 4, name: str = "data") -> Dataset:
    rng = np.random.default_rng(0)
    return Dataset(rng.normal(size=(examples, *shape)), rng.integers(0, classes, examples), name)


def tokens(length: int = 7, vocabulary: int = 9) -> Dataset:
    rng = np.random.default_rng(0)
    return Dataset(rng.integers(0, vocabulary, (12, length)), rng.integers(0, vocabulary, 12))


def graph_of(bundle: Bundle, file: str = "model.onnx") -> onnx.GraphProto:
    return onnx.load_from_string(bundle.files[file]).graph


def weight_inputs(bundle: Bundle) -> list[tuple[str, tuple[int, ...]]]:
    found = [i for i in graph_of(bundle).input if i.name not in ("x", "y")]
    return [(i.name, tuple(d.dim_value for d in i.type.tensor_type.shape.dim)) for i in found]


def losses(runtime: Runtime, data: Dataset, sigma: float = 0.01) -> np.ndarray:
    """Losses at the initial weights and at some around them."""
    asked = Perturbations(Directions(runtime.table, "rank1", (1, 1)), 3, (sigma, -sigma), baseline=True)
    return runtime.losses(runtime.initial_weights(), asked, data)


def assert_same(model: nn.Module, loss: Loss, data: Dataset, bundle: Bundle, atol: float = 5e-6) -> None:
    """The bundle gives the losses and hits of the model, at the initial weights and around them."""
    expected, runtime = TorchRuntime(model, loss, threads=1), OrtRuntime(bundle, threads=1)
    assert np.allclose(losses(runtime, data), losses(expected, data), rtol=0, atol=atol)
    weights = runtime.initial_weights()
    found, known = runtime.evaluate(weights, data), expected.evaluate(weights, data)
    assert np.allclose(found.losses, known.losses, rtol=0, atol=atol)
    assert (found.correct is None) == (known.correct is None)
    if atol < 1e-4 and found.correct is not None and known.correct is not None:
        assert np.array_equal(found.correct, known.correct)
