"""A client's scalars as fixed-point integers: clipped, rounded to the round's scale, weighted by integers.

Integers make everything after them exact: sums in any order, secure aggregation, the rebuild (``docs/design.md``,
section 3).
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt

from baffle.core.checks import keep_floats, require_positive
from baffle.core.types import LIMIT, MAX_WEIGHT, Integers, Task


class ClipScalars(msgspec.Struct, frozen=True, tag="clip_scalars"):
    """Clip each scalar (a directional derivative of the loss) to [-limit, limit] on the client."""

    limit: float

    def __post_init__(self) -> None:
        keep_floats(self)
        require_positive("clip_scalars.limit", self.limit)


@dataclass(frozen=True)
class Encoded:
    """Fixed-point scalars int64[K] and how many were clipped, or not finite and sent as 0."""

    integers: Integers
    clipped: int
    nonfinite: int


def encode(task: Task, scalars: npt.NDArray[np.float64]) -> Encoded:
    """Round to the task's scale, clip, and count; non-finite scalars become 0.

    Half-way cases go to the even integer.
    """
    finite = np.isfinite(scalars)
    limit = float(LIMIT)
    if task.clip is not None:
        limit = min(limit, float(np.floor(np.ldexp(task.clip, -task.exponent))))
    with np.errstate(over="ignore"):  # infinitely many units are clipped like any other excess
        units = np.rint(np.ldexp(np.where(finite, scalars, 0.0), -task.exponent))
    integers = np.clip(units, -limit, limit)
    return Encoded(integers.astype(np.int64), int((integers != units).sum()), int((~finite).sum()))


def weight_of(examples: int, quantum: int) -> int:
    """A client's integer weight: its examples in units of ``quantum``, from 1 to 255.

    Examples:
        >>> [weight_of(n, quantum=4) for n in (1, 40, 42, 10**6)]
        [1, 10, 11, 255]
    """
    return max(1, min(MAX_WEIGHT, (examples + quantum // 2) // quantum))
