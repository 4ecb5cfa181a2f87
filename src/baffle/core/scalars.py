"""A client's scalars as fixed-point integers: clipped, rounded to the round's scale, weighted by integers.

Integers make everything that follows exact: sums in any order, secure aggregation, the rebuild (``docs/design.md``,
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
    """Clip each scalar (a directional derivative of the loss) to [-limit, limit] on the client.

    Attributes:
        limit: largest magnitude, in units of the loss per unit of the weights.

    Examples:
        >>> ClipScalars(limit=0)
        Traceback (most recent call last):
        baffle.errors.OptionError: clip_scalars.limit = 0.0: expected a finite number > 0
    """

    limit: float

    def __post_init__(self) -> None:
        keep_floats(self)
        require_positive("clip_scalars.limit", self.limit)


@dataclass(frozen=True)
class Encoded:
    """Fixed-point scalars of one local step.

    Attributes:
        integers: the scalars in units of 2**exponent, int64[K].
        clipped: how many were clipped.
        nonfinite: how many were NaN or infinite, and are sent as 0.
    """

    integers: Integers
    clipped: int
    nonfinite: int


def encode(task: Task, scalars: npt.NDArray[np.float64]) -> Encoded:
    """Clip scalars and round them to integers in units of 2**exponent; halves go to the even integer.

    Args:
        task: gives the exponent and the clipping norm.
        scalars: directional derivatives of the loss, float64[K]; those that are not finite become 0.

    Returns:
        The integers, each of magnitude at most ``LIMIT``, and how many scalars were clipped or not finite.
    """
    finite = np.isfinite(scalars)
    limit = float(LIMIT)
    if task.clip is not None:
        limit = min(limit, float(np.floor(np.ldexp(task.clip, -task.exponent))))
    with np.errstate(over="ignore"):  # infinitely many units are clipped like any other excess
        units = np.rint(np.ldexp(np.where(finite, scalars, 0.0), -task.exponent))
    integers = np.clip(units, -limit, limit)
    return Encoded(integers.astype(np.int64), int((integers != units).sum()), int((~finite).sum()))


def weight_of(examples: int, examples_per_weight: int) -> int:
    """A client's integer weight, from 1 to 255: its number of examples, rounded to units (``quantum`` in a task).

    Examples:
        >>> [weight_of(n, examples_per_weight=4) for n in (1, 40, 42, 10**6)]
        [1, 10, 11, 255]
    """
    return max(1, min(MAX_WEIGHT, (examples + examples_per_weight // 2) // examples_per_weight))
