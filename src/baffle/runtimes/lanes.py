"""A runtime one thread at a time: lanes evaluate alone, and all of them may do so at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

from baffle.core.types import Losses, Weights
from baffle.data import Dataset
from baffle.runtimes.perturb import Perturbations

Worker = TypeVar("Worker")
Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class Lane(Generic[Worker]):
    """One worker of a runtime, which has what a thread needs for itself.

    ``on(lanes, weights, perturbations, batch)`` is the runtime's way to share passes among some of its lanes.
    """

    on: Callable[[Sequence[Lane[Worker]], Weights, Perturbations, Dataset], Losses]
    worker: Worker

    def losses(self, weights: Weights, perturbations: Perturbations, batch: Dataset) -> Losses:
        """Losses of every pass: float32[passes, examples]."""
        return self.on([self], weights, perturbations, batch)


def side_by_side(work: Callable[[int], Result], parts: int) -> list[Result]:
    """Results of ``work(0)`` to ``work(parts - 1)``, each on a thread of its own.

    Examples:
        >>> side_by_side(lambda i: i * i, 3)
        [0, 1, 4]
    """
    if parts == 1:
        return [work(0)]
    with ThreadPoolExecutor(parts) as pool:
        return list(pool.map(work, range(parts)))
