"""The one thing a client must be able to do: evaluate losses. One file an inference engine.

Whatever runs forward passes implements :class:`Runtime`; one contract suite in the tests holds for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from baffle.core.types import Losses, Table, Weights
from baffle.data import Dataset
from baffle.runtimes.perturb import Perturbations


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Per-example losses float32[examples]; ``correct`` bool[examples] where targets are class labels."""

    losses: npt.NDArray[np.float32]
    correct: npt.NDArray[np.bool_] | None


class Evaluator(Protocol):
    """What gives losses: a runtime, or one of its lanes (``runtime.lanes``), which is one thread of it."""

    def losses(self, weights: Weights, perturbations: Perturbations, batch: Dataset) -> Losses:
        """Losses of every pass: float32[passes, examples]. ``weights`` is not changed."""
        ...


@runtime_checkable
class CreditEvaluator(Protocol):
    """An evaluator of models whose tensors are credited otherwise than by one scalar per direction."""

    def credits(
        self,
        weights: Weights,
        perturbations: Perturbations,
        batch: Dataset,
        groups: npt.NDArray[np.int64],
        bounds: Sequence[int],
    ) -> npt.NDArray[np.float64]:
        """The numbers of each unit of a table whose tensors are credited otherwise than by one scalar per direction.

        Args:
            weights: float32[n].
            perturbations: the directions of slice 0, and the steps; slice j has those j x num_directions further on.
            batch: examples, those of a slice together.
            groups: to whom (0, 1, ...) each example belongs, int64[examples].
            bounds: where the slices begin, and the end of the last.

        Returns:
            float64[groups, numbers]: means over the examples of a group and slice; where numbers are exact, means over
            all examples of a group.
        """
        ...


class Runtime(Evaluator, Protocol):
    """Forward passes of one model and per-example loss, under any weights."""

    @property
    def table(self) -> Table:
        """The trainable tensors."""
        ...

    @property
    def plan(self) -> dict[str, str | int]:
        """How passes are evaluated (engine, precision, threads): recorded with a run."""
        ...

    def initial_weights(self) -> Weights:
        """The model's weights as it was handed over: float32[n]."""
        ...

    def evaluate(self, weights: Weights, data: Dataset) -> Evaluation:
        """Losses and hits of the unperturbed model on a whole data set."""
        ...
