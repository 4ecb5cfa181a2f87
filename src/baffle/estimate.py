"""The server's rebuild: integers and regenerated directions -> gradient estimate, exactly.

BAFFLE (arXiv 2301.12195), eq. 5: g = 1/K sum_k s_k d_k. Scalars and entries are integers, so the sum is exact
in float64 whatever its order, as long as no partial sum can reach 2**53 (``check_exact``). Rank-1 directions
are one matrix product a tensor, sign vectors a table look-up of eight directions at a time.
``combine_slowly`` is the obvious loop that all of it must equal bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from baffle.directions import Bytes, Directions
from baffle.errors import PlanError
from baffle.philox import BLOCK_BITS
from baffle.types import LIMIT, Integers, Row, Table, Weights, table_size

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Execution:
    """How to compute a rebuild; no choice changes a bit of the result.

    ``block`` is the number of entries worked on at once, ``slow`` takes the reference loop.
    """

    threads: int = 1
    block: int = 2**16
    slow: bool = False


FAST = Execution()


def combine(directions: Directions, scalars: Integers, execution: Execution = FAST) -> Float64:
    """sum_k scalars[k] * d_k in units of the entries, exact: int64[K] -> float64[n].

    Examples:
        >>> from baffle.types import make_table
        >>> d = Directions(make_table({"w": (2, 3)}), "rank1", key=(7, 1))
        >>> combine(d, np.array([10, 1])).tolist()
        [-9.0, -11.0, 9.0, 11.0, 9.0, -11.0]
    """
    if execution.slow:
        return combine_slowly(directions, scalars)
    table, ks = directions.table, slice(0, len(scalars))
    out = np.zeros(table_size(table), np.float64)
    factors = directions.factors(ks)
    with ThreadPoolExecutor(execution.threads) as pool:
        for i, spec in enumerate(table):
            part = out[spec.slice]
            if i in factors:
                jobs = _matrix_jobs(part.reshape(spec.matrix or (0, 0)), *factors[i], scalars, execution.block)
            else:
                jobs = _dense_jobs(directions, i, part, scalars, execution.block)
            for _ in (job() for job in jobs) if execution.threads == 1 else pool.map(lambda job: job(), jobs):
                pass
            if spec.mask is not None:
                part[~spec.mask] = 0
    return out


def combine_slowly(directions: Directions, scalars: Integers) -> Float64:
    """The same sum, one direction after another in int64: the reference for :func:`combine`."""
    total = np.zeros(table_size(directions.table), np.int64)
    for k, scalar in enumerate(scalars):
        for i, spec in enumerate(directions.table):
            total[spec.slice] += scalar * directions.entries(i, slice(k, k + 1))[0].astype(np.int64)
    return total.astype(np.float64)


def estimate(table: Table, row: Row, execution: Execution = FAST) -> Weights:
    """The gradient estimate of a row, before clipping: float32[n], rounded once from float64.

    With local steps it is the mean over the steps of the clients' averaged estimates.
    """
    total = np.zeros(table_size(table), np.float64)
    unit = 1.0
    for vector, steps in enumerate(row.integers):
        client = 0 if row.sharing == "shared" else row.participants[vector] + 1
        for step, scalars in enumerate(steps):
            directions = Directions(table, row.family, (row.key, row.round), client, step)
            total += combine(directions, scalars, execution)
            unit = directions.unit
    factor = unit * 2.0**row.exponent / (row.num_directions * row.local_steps * max(row.weight_sum, 1))
    return (total * factor).astype(np.float32)


def check_exact(directions: Directions, num_directions: int, local_steps: int, weight_sum: int) -> None:
    """Raise PlanError unless every partial sum of a round stays below 2**53 in float64."""
    bound = num_directions * local_steps * weight_sum * LIMIT * directions.largest
    if bound >= 2**53:
        raise PlanError(
            f"num_directions = {num_directions} x local_steps = {local_steps} x sum of weights = {weight_sum} "
            f"x scalar limit {LIMIT} x largest entry {directions.largest} = {bound:.3g}: expected < 2**53, "
            "so that the rebuild is exact; use fewer directions, steps or participants"
        )


def _matrix_jobs(
    out: Float64, a: npt.NDArray[np.int8], b: npt.NDArray[np.int8], scalars: Integers, block: int
) -> list[Callable[[], None]]:
    """A^T diag(s) B by tiles of at most ``block`` entries."""
    weighted = b.astype(np.float64) * scalars[:, None].astype(np.float64)
    width = min(out.shape[1], block)
    height = max(1, block // width)

    def tile(row: int, column: int) -> None:
        rows, columns = slice(row, row + height), slice(column, column + width)
        np.matmul(a[:, rows].T.astype(np.float64), weighted[:, columns], out=out[rows, columns])

    return [partial(tile, r, c) for r in range(0, out.shape[0], height) for c in range(0, out.shape[1], width)]


def _dense_jobs(
    directions: Directions, tensor: int, out: Float64, scalars: Integers, block: int
) -> list[Callable[[], None]]:
    """Blocks of entries: Gaussian ones as small matrix products, signs by look-up."""
    ks = slice(0, len(scalars))

    def gaussian(start: int, stop: int) -> None:
        for k in range(0, len(scalars), 64):
            part = slice(k, min(k + 64, len(scalars)))
            entries = directions.entries(tensor, part, start, stop).astype(np.float64)
            out[start:stop] += scalars[part].astype(np.float64) @ entries

    def signs(start: int, stop: int) -> None:
        first, blocks = start // BLOCK_BITS, -(-(stop - start) // BLOCK_BITS)
        bits = directions.sign_bits(tensor, ks, first, blocks)
        out[start:stop] = _look_up(bits, scalars)[: stop - start]

    work = gaussian if directions.family == "gaussian" else signs
    size = directions.table[tensor].size
    step = max(BLOCK_BITS, block // BLOCK_BITS * BLOCK_BITS)
    return [partial(work, start, min(start + step, size)) for start in range(0, size, step)]


_PLUS_MINUS = (np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little") * 2.0) - 1.0


def _look_up(bits: Bytes, scalars: Integers) -> Float64:
    """sum_k s_k (+-1) for packed bits uint8[K, m] -> float64[8 m]: a table of 256 sums for eight directions."""
    count = bits.shape[1] * 8
    total, gathered = np.zeros(count), np.empty(count)
    for k in range(0, len(scalars), 8):
        group = np.zeros((8, bits.shape[1]), np.uint8)
        group[: len(bits[k : k + 8])] = bits[k : k + 8]
        values = np.zeros(8)
        values[: len(scalars[k : k + 8])] = scalars[k : k + 8]
        np.take(_PLUS_MINUS @ values, _transpose_bits(group), out=gathered)
        total += gathered
    return total


def _transpose_bits(group: Bytes) -> Bytes:
    """Eight directions' bytes uint8[8, m] -> for each entry, its bits in the eight directions: uint8[8 m].

    Each column is an 8 x 8 bit matrix; Warren, Hacker's Delight, section 7-3.
    """
    x = np.ascontiguousarray(group.T).view("<u8")[:, 0].astype(np.uint64)
    for shift, mask in ((7, 0x00AA00AA00AA00AA), (14, 0x0000CCCC0000CCCC), (28, 0x00000000F0F0F0F0)):
        t = (x ^ (x >> np.uint64(shift))) & np.uint64(mask)
        x ^= t ^ (t << np.uint64(shift))
    return x.astype("<u8").view(np.uint8)
