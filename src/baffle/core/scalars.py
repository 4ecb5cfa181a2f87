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
from baffle.core.credit import part_of
from baffle.core.types import MAX_WEIGHT, Integers, Task

MAGNITUDE_UNITS = 256
"""Magnitudes are told in units of 2**exponent / 256, up to ``MOST_MAGNITUDE`` of them."""
MOST_MAGNITUDE = 2**24


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
    """A client's numbers as integers.

    Attributes:
        integers: int64[numbers].
        magnitudes: of each unit, the mean magnitude before rounding, in units of 2**(exponent - 8).
        clipped: how many were clipped.
        nonfinite: how many were not finite, and are 0 (with one bit: +1).
    """

    integers: Integers
    magnitudes: tuple[int, ...]
    clipped: int
    nonfinite: int


def encode(task: Task, numbers: npt.NDArray[np.float64]) -> Encoded:
    """Round each unit's numbers to its scale, clip, and count; half-way cases go to the even integer.

    With one bit only the sign is sent. The scale then says how large the numbers are, which the server keeps at their
    mean magnitude.

    Args:
        task: says each unit's scale, and the bits of a number.
        numbers: float64[numbers], unit after unit.
    """
    finite = np.isfinite(numbers)
    known = np.where(finite, numbers, 0.0)
    integers = np.empty(len(numbers), np.int64)
    magnitudes: list[int] = []
    clipped = 0
    for part, exponent in zip(part_of(task.sizes), task.exponents, strict=True):
        with np.errstate(over="ignore"):  # infinitely many units are clipped like any other excess
            scaled = np.ldexp(known[part], -exponent)
        units = np.rint(scaled)
        limit = float(task.limit)
        if task.clip is not None:
            limit = min(limit, float(np.floor(np.ldexp(task.clip, -exponent))))
        kept = np.clip(units, -limit, limit)
        clipped += int((kept != units).sum()) if task.bits > 1 else 0
        integers[part] = np.where(known[part] < 0, -1, 1) if task.bits == 1 else kept.astype(np.int64)
        size = float(np.minimum(np.abs(scaled), MOST_MAGNITUDE).mean()) if scaled.size else 0.0
        magnitudes.append(min(MOST_MAGNITUDE, round(size * MAGNITUDE_UNITS)))
    return Encoded(integers, tuple(magnitudes), clipped, int((~finite).sum()))


def weight_of(examples: int, examples_per_weight: int) -> int:
    """A client's integer weight, from 1 to 255: its number of examples, rounded to units (``quantum`` in a task).

    Examples:
        >>> [weight_of(n, examples_per_weight=4) for n in (1, 40, 42, 10**6)]
        [1, 10, 11, 255]
    """
    return max(1, min(MAX_WEIGHT, (examples + examples_per_weight // 2) // examples_per_weight))
