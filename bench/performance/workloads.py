"""What the performance suite measures: four models, random examples of their shapes, and our ways to evaluate them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from baffle.core.directions import Directions
from baffle.data import Dataset
from baffle.errors import MissingExtraError, ModelError, OptionError
from baffle.models.lenet import lenet
from baffle.models.transformer import transformer
from baffle.models.wrn import wrn_10_2
from baffle.runtimes import Runtime
from baffle.runtimes.onnx.bundle import Bundle
from baffle.runtimes.perturb import Perturbations
from baffle.runtimes.pytorch.runtime import TorchRuntime

SIGMA = 1e-3


@dataclass(frozen=True)
class Workload:
    """A model and the shape of one example. Ten classes."""

    title: str
    shape: tuple[int, ...]
    builder: Callable[[], nn.Module]

    def model(self) -> nn.Module:
        """The same weights each time; PyTorch's global generator is left as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.builder()

    def examples(self, count: int) -> Dataset:
        """Random examples: neither time nor memory depends on what they show."""
        rng = np.random.default_rng(0)
        return Dataset(rng.standard_normal((count, *self.shape), np.float32), rng.integers(0, 10, count))


def _perceptron() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 256), nn.Hardswish(), nn.Linear(256, 10))


WORKLOADS = {
    "lenet": Workload("LeNet", (1, 28, 28), lambda: lenet((1, 28, 28), 10)),
    "wrn-10-2": Workload("WRN-10-2", (3, 32, 32), lambda: wrn_10_2((3, 32, 32), 10)),
    "transformer": Workload("transformer", (64, 48), lambda: transformer((64, 48), 10, width=256, depth=4, heads=4)),
    "mlp": Workload("MLP 784-256-10", (1, 28, 28), _perceptron),
}
"""By name. The transformer has 4 layers, d = 256, and sees 64 tokens."""


def asked(runtime: Runtime, num_directions: int, baseline: int = 0) -> Perturbations:
    """So many perturbed passes, after so many unperturbed ones."""
    return Perturbations(Directions(runtime.table, "rank1", (0, 1)), num_directions, (SIGMA,), baseline)


def unperturbed(runtime: Runtime, passes: int) -> Perturbations:
    """So many passes at the weights themselves."""
    return Perturbations(Directions(runtime.table, "rank1", (0, 1)), 0, (), passes)


def seconds(runtime: Runtime, perturbations: Perturbations, batch: Dataset) -> float:
    """How long one call takes."""
    weights = runtime.initial_weights()
    started = time.perf_counter()
    runtime.losses(weights, perturbations, batch)
    return time.perf_counter() - started


@cache
def exported(workload: Workload) -> Bundle:
    """The model as a graph; exporting takes seconds, so it is done once."""
    from baffle.exporter import export

    return export(workload.model(), cross_entropy, workload.examples(8))


def runtimes(workload: Workload, precision: str, threads: int | None = None) -> dict[str, Runtime]:
    """Our runtimes and strategies that this machine has in a precision, on all cores unless told otherwise."""
    made: dict[str, Runtime] = {}
    for strategy in ("copies", "stacked"):
        made[f"torch, {strategy}"] = TorchRuntime(
            workload.model(), cross_entropy, threads, precision=precision, strategy=strategy
        )
    try:
        from baffle.runtimes.onnx.openvino import OpenVinoRuntime

        made["openvino"] = OpenVinoRuntime(exported(workload), threads, precision)
    except (MissingExtraError, OptionError):
        pass
    return made


def shortlist(
    made: dict[str, Runtime], ask: Callable[[Runtime, int], Perturbations], batch: Dataset, passes: int = 32
) -> dict[str, float]:
    """Seconds of a pass by runtime, those of a short measurement, the fastest first; without what cannot do it."""
    found: dict[str, float] = {}
    for name, runtime in made.items():
        try:
            seconds(runtime, ask(runtime, 2), batch)  # memory and kernels are prepared
        except ModelError:
            continue  # a strategy that this model is not made for
        found[name] = min(seconds(runtime, ask(runtime, passes), batch) for _ in range(2)) / passes
    return dict(sorted(found.items(), key=lambda item: item[1]))


def precisions() -> tuple[str, ...]:
    """fp32, and what this processor has instructions for, as OpenVINO tells it."""
    try:
        from bench.performance.graphs import capabilities
    except MissingExtraError:
        return ("fp32",)
    has = capabilities()
    return ("fp32", *(p for p, capability in (("bf16", "BF16"), ("fp16", "FP16")) if capability in has))
