"""Every runtime that the contract tests evaluate, by engine, precision, strategy and model, with float64 references."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import openvino
import torch
import torch.nn.functional as F
from torch import nn

from baffle.core.directions import Directions
from baffle.core.types import Family, Weights
from baffle.data import Dataset
from baffle.exporter import export
from baffle.models import MODELS, build
from baffle.runtimes import Runtime
from baffle.runtimes.onnx.bundle import Bundle, Precision
from baffle.runtimes.onnx.openvino import OpenVinoRuntime
from baffle.runtimes.onnx.ort import OrtRuntime
from baffle.runtimes.onnx.runtime import GraphRuntime
from baffle.runtimes.perturb import Perturbations
from baffle.runtimes.pytorch.runtime import TorchRuntime

SHAPE, CLASSES, SIGMA = (1, 8, 8), 10, 3e-3


ALL = " ".join(sorted(MODELS))


SOME = "mlp lenet-small transformer wrn-10-2"


HAS_BF16 = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Kind:
    """A way to compute, and how far it may be from float64: losses (absolute), scalars of sigma 3e-3 (relative)."""

    engine: str
    precision: str
    branches: bool
    losses: float
    forward: float
    central: float
    models: str
    strategy: str = "copies"
    """Of engine torch."""

    def __str__(self) -> str:
        which = [self.strategy] * (self.strategy != "copies") + ["branches"] * self.branches
        return "-".join([self.engine, self.precision, *which])

    @property
    def exact(self) -> bool:
        return self.precision == "fp32"


# fmt: off
KINDS = (
    #    engine      precision       branches  losses  forward  central  models
    Kind("torch",    "fp32",         False,    5e-6,   0.002,   0.002,   ALL),
    Kind("torch",    "fp32",         False,    5e-6,   0.002,   0.002,   SOME, "stacked"),
    Kind("torch",    "fp32",         False,    5e-6,   0.002,   0.002,   "lenet-small", "streaming"),
    Kind("ort",      "fp32",         False,    5e-6,   0.002,   0.002,   ALL),
    Kind("openvino", "fp32",         False,    5e-6,   0.002,   0.002,   ALL),
    Kind("ort",      "fp32",         True,     5e-6,   0.002,   0.002,   "lenet-small transformer"),
    Kind("openvino", "fp32",         True,     5e-6,   0.002,   0.002,   "lenet-small"),
    Kind("torch",    "fp16",         False,    1e-3,   0.02,    0.01,    "mlp"),
    Kind("torch",    "fp16",         False,    1e-3,   0.02,    0.01,    "mlp", "stacked"),
    Kind("torch",    "fp16",         False,    1e-3,   0.02,    0.01,    "mlp", "streaming"),
    Kind("ort",      "fp16",         False,    1e-3,   0.02,    0.01,    "mlp lenet-small"),
    Kind("openvino", "fp16",         False,    1e-3,   0.02,    0.01,    "mlp"),
    Kind("torch",    "bf16",         False,    0.02,   0.2,     0.08,    "mlp lenet-small transformer"),
    Kind("torch",    "bf16",         False,    0.02,   0.2,     0.08,    "mlp", "stacked"),
    Kind("torch",    "bf16",         False,    0.02,   0.2,     0.08,    "mlp", "streaming"),
    Kind("openvino", "bf16",         False,    0.02,   0.2,     0.08,    "mlp lenet-small transformer"),
    Kind("openvino", "bf16",         True,     0.02,   0.2,     0.08,    "lenet-small"),
    Kind("ort",      "int8-weights", False,    0.03,   0.1,     0.09,    "mlp transformer"),
    Kind("openvino", "int8-weights", False,    0.03,   0.1,     0.09,    "mlp"),
    Kind("ort",      "int8-weights", True,     0.03,   0.015,   0.015,   "mlp wrn-10-2"),
    Kind("openvino", "int8-weights", True,     0.03,   0.015,   0.015,   "mlp"),
    Kind("ort",      "int8",         False,    0.05,   0.25,    0.12,    "mlp lenet-small transformer"),
    Kind("openvino", "int8",         False,    0.05,   0.25,    0.12,    "mlp lenet-small"),
    Kind("ort",      "int8",         True,     0.05,   0.25,    0.12,    "mlp lenet-small"),
    Kind("openvino", "int8",         True,     0.05,   0.25,    0.12,    "mlp"),
    Kind("ort",      "int8",         False,    0.1,    0.4,     0.3,     "wrn-10-2"),
)


# fmt: on
HERE = tuple(k for k in KINDS if HAS_BF16 or (k.engine, k.precision) != ("openvino", "bf16"))


def batch(examples: int = 40, seed: int = 0) -> Dataset:
    rng = np.random.default_rng(seed)
    return Dataset(rng.normal(size=(examples, *SHAPE)), rng.integers(0, CLASSES, examples))


@cache
def model_of(name: str) -> nn.Module:
    return build(name, SHAPE, CLASSES, seed=1)


@cache
def bundle_of(name: str, precision: Precision = "fp32", branches: bool = False) -> Bundle:
    """Exporting takes a second or more: once a kind of bundle."""
    return export(model_of(name), F.cross_entropy, batch(), precision=precision, branches=branches)


@cache
def runtime_of(kind: Kind, name: str, threads: int = 1) -> TorchRuntime | GraphRuntime:
    if kind.engine == "torch":
        how: dict[str, Any] = {"precision": kind.precision, "strategy": kind.strategy}
        return TorchRuntime(model_of(name), F.cross_entropy, threads, **how)
    if kind.precision == "bf16":
        return OpenVinoRuntime(bundle_of(name, "fp32", kind.branches), threads, "bf16")
    bundle = bundle_of(name, msgspec.convert(kind.precision, Precision), kind.branches)
    return OrtRuntime(bundle, threads) if kind.engine == "ort" else OpenVinoRuntime(bundle, threads)


def passes(
    runtime: Runtime,
    steps: tuple[float, ...] = (SIGMA,),
    baseline: bool = True,
    k: int = 6,
    lattice: int = 0,
    family: Family = "rank1",
) -> Perturbations:
    return Perturbations(Directions(runtime.table, family, (3, 1)), k, steps, baseline, lattice=lattice)


def reference(model: nn.Module, runtime: Runtime, weights: Weights, data: Dataset) -> Float64:
    """Losses in float64 under flat weights, by PyTorch's own functional call: float64[examples]."""
    double = copy.deepcopy(model).double()
    flat = torch.from_numpy(weights.astype(np.float64))
    parameters = {s.name: flat[s.slice].view(s.shape) for s in runtime.table}
    x = torch.from_numpy(np.array(data.inputs()))
    with torch.inference_mode():
        output = torch.func.functional_call(double, parameters, (x.double() if x.is_floating_point() else x,))
        return F.cross_entropy(output, torch.from_numpy(data.y.copy()), reduction="none").numpy()


def references(model: nn.Module, runtime: Runtime, weights: Weights, asked: Perturbations, data: Dataset) -> Float64:
    """Losses in float64 of every pass: float64[passes, examples]."""
    return np.stack([reference(model, runtime, w, data) for w in asked.weights(weights, weights.copy())])


def linear(**extra: nn.Module) -> nn.Sequential:
    layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    for name, module in extra.items():
        layers.add_module(name, module)
    return layers
