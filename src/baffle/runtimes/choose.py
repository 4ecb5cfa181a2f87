"""Choose the evaluation strategy that is fastest on this machine, by a short measurement.

The default candidate comes first and is kept unless another is faster by a margin well above the noise of timing:
kernels of other strategies round differently, so a choice that changed from run to run would change the bits of the
losses.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from baffle.core.directions import Directions
from baffle.core.types import Family
from baffle.data import Dataset, concatenate
from baffle.errors import MissingExtraError, ModelError, OptionError, PlanError
from baffle.runtimes import Runtime
from baffle.runtimes.perturb import Perturbations

STRATEGIES = ("copies", "stacked", "streaming")
"""Strategies of ``TorchRuntime``: materialised, batched and layer-wise perturbed weights (see its docstring)."""
MARGIN = 1.5
"""How many times faster than the default another candidate has to be."""
_MEASURED_ON = 16  # clients whose examples make up the trial batch
_TURNS = 4
_MOST_TURNS = 32
"""Upper limit, reached where a turn is so short that a single disturbance of the machine would decide it."""


@dataclass(frozen=True, eq=False)
class Choice:
    """The chosen runtime, its name, and the measured rates.

    Examples:
        >>> from typing import Any
        >>> runtime: Any = None
        >>> print(Choice(runtime, "copies", {"copies": 2370.4, "stacked": 13.333}))
        copies (passes a second: copies 2,370, stacked 13.3)
    """

    runtime: Runtime
    name: str
    rates: dict[str, float]
    """Perturbed passes per second of each candidate that works here; empty if there was only one."""

    def __str__(self) -> str:
        """The name, and the rates if it was measured."""
        rates = ", ".join(f"{n} {rate:,.0f}" if rate >= 100 else f"{n} {rate:.3g}" for n, rate in self.rates.items())
        return f"{self.name} (passes a second: {rates})" if rates else self.name


def choose(
    candidates: Mapping[str, Callable[[], Runtime]],
    batch: Dataset,
    *,
    num_directions: int = 100,
    family: Family = "rank1",
    margin: float = MARGIN,
    seconds: float = 0.1,
) -> Choice:
    """Measure the candidates in turn and take the fastest.

    Each candidate counts with its best turn. Where ``num_directions`` passes take much less than ``seconds``, there
    are more turns. Candidates other than the first that do not work here are left out.

    Args:
        candidates: A function that makes the runtime, by name. The first is the default.
        batch: Examples to measure on.
        num_directions: The largest number of passes in one call.
        family: Distribution of the perturbations.
        margin: How many times faster than the default another candidate has to be.
        seconds: About how long one turn of one candidate takes.

    Returns:
        The chosen runtime with the rates of all candidates that work.

    Raises:
        BaffleError: Whatever is wrong with the default candidate.

    Examples:
        >>> import torch.nn.functional as F
        >>> from torch import nn
        >>> from baffle.data import load
        >>> from baffle.runtimes.pytorch.runtime import TorchRuntime
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        >>> ways = {s: lambda s=s: TorchRuntime(model, F.cross_entropy, strategy=s) for s in ("copies", "stacked")}
        >>> sorted(choose(ways, load("digits")[0], seconds=0.01).rates)
        ['copies', 'stacked']
    """
    usual = next(iter(candidates))
    runtimes: dict[str, Runtime] = {}
    for name, make in candidates.items():
        try:
            runtimes[name] = make()
            seconds_of(runtimes[name], batch, 2, family)  # warm-up: allocates memory and prepares kernels
        except (MissingExtraError, ModelError, OptionError, PlanError):
            if name == usual:
                raise
            runtimes.pop(name, None)
    if len(runtimes) == 1:
        return Choice(runtimes[usual], usual, {})
    best: dict[str, float] = {}
    until = time.perf_counter() + _TURNS * seconds * len(runtimes)
    for turn in range(_MOST_TURNS):
        if turn >= _TURNS and time.perf_counter() >= until:
            break
        for name, runtime in runtimes.items():
            passes = min(num_directions, max(4, int(seconds / best[name]))) if name in best else min(num_directions, 8)
            took = seconds_of(runtime, batch, passes, family) / passes
            best[name] = min(took, best.get(name, took))
    fastest = min(best, key=lambda name: best[name])
    if best[usual] < margin * best[fastest]:
        fastest = usual
    return Choice(runtimes[fastest], fastest, {name: 1 / took for name, took in best.items()})


def trial_batch(clients: Sequence[Dataset], batch_size: int | None) -> Dataset:
    """Examples to measure on: one mini-batch of each of the first clients, or all their examples without a size."""
    return concatenate([c.take(np.arange(min(len(c), batch_size or len(c)))) for c in clients[:_MEASURED_ON]])


def seconds_of(runtime: Runtime, batch: Dataset, passes: int, family: Family = "rank1") -> float:
    """Seconds that one call of ``passes`` perturbed passes over a batch takes."""
    perturbations = Perturbations(Directions(runtime.table, family, (0, 1)), passes, (1e-3,), baseline=False)
    weights = runtime.initial_weights()
    started = time.perf_counter()
    runtime.losses(weights, perturbations, batch)
    return time.perf_counter() - started


def passes_per_second(runtime: Runtime, batch: Dataset, seconds: float) -> float:
    """Measure how many perturbed passes over a batch a runtime makes per second.

    Args:
        runtime: The runtime to measure.
        batch: The examples of each pass.
        seconds: The least time to measure for, after a short warm-up.

    Examples:
        >>> from torch import nn
        >>> from baffle.data import load
        >>> from baffle.runtimes.pytorch.runtime import TorchRuntime
        >>> runtime = TorchRuntime(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), nn.functional.cross_entropy)
        >>> passes_per_second(runtime, load("digits")[0], seconds=0.01) > 0
        True
    """
    seconds_of(runtime, batch, 4)  # warm-up: allocates memory and prepares kernels
    passes, took = 8, seconds_of(runtime, batch, 8)
    while took < seconds:
        passes = max(2 * passes, min(64 * passes, int(passes * seconds / took)))
        took = seconds_of(runtime, batch, passes)
    return passes / took
