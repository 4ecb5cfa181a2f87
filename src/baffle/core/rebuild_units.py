"""The rebuild of rows that are credited one by one, and of gradients that travel as they are; exact as the other.

A row r of a layer has its own scalar s_kr for each direction k: g_r = 1/D sum_k s_kr d_kr. Integers times integers,
summed in float64 below 2**53 (``rebuild.check_exact``): no order of summation changes a bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from baffle.core.credit import Unit, numbers_of_rows
from baffle.core.directions import Directions
from baffle.core.types import Integers, Table

Floats: TypeAlias = npt.NDArray[np.floating]
_AT_ONCE = 2**20  # entries of directions that a thread draws at once: two megabytes


def rebuild_rows(
    unit: Unit, terms: Sequence[tuple[Directions, Integers]], factor: float, out: Floats, threads: int
) -> None:
    """Write factor x the sum of the terms into the unit's tensors in ``out`` (float32[n]).

    Args:
        unit: tensors that are credited row by row.
        terms: directions, and the unit's integers int64[directions x numbers].
        factor: multiplies the exact sum.
        out: the flat gradient; only the unit's tensors are written.
        threads: tensors rebuilt side by side.
    """

    def work(tensor: int) -> None:
        spec = terms[0][0].table[tensor]
        rows = numbers_of_rows(spec)
        total = np.zeros((len(rows), spec.size // max(1, len(rows))))
        for directions, integers in terms:
            scalars = integers.reshape(-1, unit.numbers)[:, rows].astype(np.float64)
            at_once = max(1, _AT_ONCE // max(1, spec.size))
            for start in range(0, len(scalars), at_once):
                ks = slice(start, min(start + at_once, len(scalars)))
                entries = directions.entries(tensor, ks).reshape(-1, *total.shape)  # pruned ones are 0
                for scalar, direction in zip(scalars[ks], entries, strict=True):
                    total += scalar[:, None] * direction
        out[spec.slice] = (total * factor).reshape(-1)

    if threads == 1 or len(unit.tensors) == 1:
        for tensor in unit.tensors:
            work(tensor)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, unit.tensors))


def rebuild_exact(table: Table, unit: Unit, terms: Sequence[Integers], factor: float, out: Floats) -> None:
    """Write factor x the sum of numbers that are the gradient itself into the unit's tensors in ``out``."""
    total = np.sum(np.stack(terms), axis=0).astype(np.float64) * factor
    start = 0
    for tensor in unit.tensors:
        spec = table[tensor]
        values = total[start : start + spec.size]
        out[spec.slice] = values if spec.mask is None else np.where(spec.mask, values, 0)
        start += spec.size
