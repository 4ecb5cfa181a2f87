"""Lanes: a runtime divided into threads, each of which can evaluate losses on its own while the others do the same.

A *lane* is one thread's evaluator. What it owns for itself, a copy of the model or a set of input buffers, is its
*replica*; each engine has its own kind. The public option ``threads=`` is the number of lanes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

from baffle.core.types import Losses, Weights
from baffle.data import Dataset
from baffle.runtimes.perturb import Perturbations

Replica = TypeVar("Replica")
Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class Lane(Generic[Replica]):
    """One thread's evaluator, an :class:`baffle.runtimes.Evaluator`."""

    on: Callable[[Sequence[Lane[Replica]], Weights, Perturbations, Dataset], Losses]
    """``on(lanes, weights, perturbations, batch)``: the runtime's way to divide passes among some of its lanes."""
    replica: Replica
    """What the lane owns: no other thread uses it."""

    def losses(self, weights: Weights, perturbations: Perturbations, batch: Dataset) -> Losses:
        """Losses of every pass, evaluated on this lane alone: float32[passes, examples]."""
        return self.on([self], weights, perturbations, batch)


def side_by_side(work: Callable[[int], Result], parts: int) -> list[Result]:
    """Call ``work(0)`` to ``work(parts - 1)``, each on a thread of its own, and return their results in that order.

    Examples:
        >>> side_by_side(lambda i: i * i, 3)
        [0, 1, 4]
    """
    if parts == 1:
        return [work(0)]
    with ThreadPoolExecutor(parts) as pool:
        return list(pool.map(work, range(parts)))
