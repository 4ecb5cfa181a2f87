"""How many perturbed forward passes a second a runtime does."""

from __future__ import annotations

import time

from baffle.data import Dataset
from baffle.directions import Directions
from baffle.perturb import Perturbations
from baffle.runtimes import Runtime


def passes_per_second(runtime: Runtime, batch: Dataset, seconds: float) -> float:
    """Perturbed passes over a batch in a second, measured for at least ``seconds`` after a short warm-up.

    Examples:
        >>> from torch import nn
        >>> from baffle.data import load
        >>> from baffle.runtimes.pytorch import TorchRuntime
        >>> runtime = TorchRuntime(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), nn.functional.cross_entropy)
        >>> passes_per_second(runtime, load("digits")[0], seconds=0.01) > 0
        True
    """
    weights, directions = runtime.initial_weights(), Directions(runtime.table, "rank1", (0, 1))

    def run(passes: int) -> float:
        started = time.perf_counter()
        runtime.losses(weights, Perturbations(directions, passes, (1e-3,), baseline=False), batch)
        return time.perf_counter() - started

    run(4)  # memory and kernels are prepared
    passes, took = 8, run(8)
    while took < seconds:
        passes = max(2 * passes, min(64 * passes, int(passes * seconds / took)))
        took = run(passes)
    return passes / took
