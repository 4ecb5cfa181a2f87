"""Which way of evaluating is the fastest here: a short measurement.

The usual way comes first and stays, unless another is faster by a margin that no noise makes: kernels of another way
round differently, so a choice that changed from run to run would change the bits of the losses.
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
"""Of PyTorch's runtime."""
MARGIN = 1.5
"""How many times faster than the usual way another has to be."""
_MEASURED_ON = 16  # clients
_TURNS = 4
_MOST_TURNS = 32
"""Where a turn is too short to be without a disturbance."""


@dataclass(frozen=True, eq=False)
class Choice:
    """The runtime that was taken, its name, and perturbed passes a second of each candidate that works here.

    Examples:
        >>> from typing import Any
        >>> runtime: Any = None
        >>> print(Choice(runtime, "copies", {"copies": 2370.4, "stacked": 13.333}))
        copies (passes a second: copies 2,370, stacked 13.3)
    """

    runtime: Runtime
    name: str
    rates: dict[str, float]

    def __str__(self) -> str:
        """The name, and the rates if it was measured."""
        told = ", ".join(f"{n} {rate:,.0f}" if rate >= 100 else f"{n} {rate:.3g}" for n, rate in self.rates.items())
        return f"{self.name} (passes a second: {told})" if told else self.name


def choose(
    candidates: Mapping[str, Callable[[], Runtime]],
    batch: Dataset,
    *,
    num_directions: int = 100,
    family: Family = "rank1",
    margin: float = MARGIN,
    seconds: float = 0.1,
) -> Choice:
    """Measure each candidate on a batch for a few times ``seconds``, in turn, and take the fastest.

    The best turn of each counts; where ``num_directions`` passes take much less than ``seconds``, there are more turns.
    The first one is the usual way, which another has to beat by the ``margin``, and what goes wrong with it is raised;
    others that do not work here are left out.

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
            seconds_of(runtimes[name], batch, 2, family)  # memory and kernels are prepared
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
    """The first examples of the first clients, a mini-batch of each, to measure on; ``batch_size`` None: all."""
    return concatenate([c.take(np.arange(min(len(c), batch_size or len(c)))) for c in clients[:_MEASURED_ON]])


def seconds_of(runtime: Runtime, batch: Dataset, passes: int, family: Family = "rank1") -> float:
    """How long a call of so many perturbed passes over a batch takes."""
    asked = Perturbations(Directions(runtime.table, family, (0, 1)), passes, (1e-3,), baseline=False)
    weights = runtime.initial_weights()
    started = time.perf_counter()
    runtime.losses(weights, asked, batch)
    return time.perf_counter() - started


def passes_per_second(runtime: Runtime, batch: Dataset, seconds: float) -> float:
    """Perturbed passes over a batch in a second, measured for at least ``seconds`` after a short warm-up.

    Examples:
        >>> from torch import nn
        >>> from baffle.data import load
        >>> from baffle.runtimes.pytorch.runtime import TorchRuntime
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
