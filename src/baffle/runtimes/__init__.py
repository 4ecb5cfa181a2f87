"""The one thing a client must be able to do: evaluate losses. One module per inference engine.

Every inference engine is wrapped as a :class:`Runtime`, and one contract suite in the tests holds for all of them.
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
    """Losses of the unperturbed model, example by example."""

    losses: npt.NDArray[np.float32]
    """float32[examples]."""
    correct: npt.NDArray[np.bool_] | None
    """bool[examples]: whether the largest output is the label; None where targets are not class labels."""


class Evaluator(Protocol):
    """Anything that evaluates losses: a runtime, or one of its lanes (``runtime.lanes``), which is one thread of it."""

    def losses(self, weights: Weights, perturbations: Perturbations, batch: Dataset) -> Losses:
        """Evaluate the model once per perturbed copy of its weights.

        Args:
            weights: The unperturbed weights, float32[n]; never changed.
            perturbations: Which passes to make, and in which order.
            batch: The examples that every pass evaluates.

        Returns:
            Losses of every pass: float32[passes, examples].
        """
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
    """Forward passes of one model with its per-example loss, under any weights.

    Implemented by ``baffle.TorchRuntime``, ``baffle.OrtRuntime`` and ``baffle.OpenVinoRuntime``. An implementation of
    your own needs these members only.
    """

    @property
    def table(self) -> Table:
        """The trainable tensors: their names, shapes and places in the flat weights."""
        ...

    @property
    def plan(self) -> dict[str, str | int]:
        """How passes are evaluated (engine, precision, threads, ...), as it is recorded with a run."""
        ...

    def initial_weights(self) -> Weights:
        """The weights of the model that the runtime was made from: float32[n]."""
        ...

    def evaluate(self, weights: Weights, data: Dataset) -> Evaluation:
        """Losses and correct predictions of the unperturbed model on a whole data set."""
        ...
