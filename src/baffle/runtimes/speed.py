"""How many perturbed forward passes a second a runtime does."""

from __future__ import annotations

from baffle.data import Dataset
from baffle.runtimes import Runtime
from baffle.runtimes.plan import seconds_of


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
    seconds_of(runtime, batch, 4)  # memory and kernels are prepared
    passes, took = 8, seconds_of(runtime, batch, 8)
    while took < seconds:
        passes = max(2 * passes, min(64 * passes, int(passes * seconds / took)))
        took = seconds_of(runtime, batch, passes)
    return passes / took
