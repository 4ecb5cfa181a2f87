"""The server's rebuild: from the summed scalars and regenerated directions to the gradient estimate, exactly.

BAFFLE (arXiv 2301.12195), eq. 5: g = 1/K sum_k s_k d_k. Scalars and entries are integers, so the sum is exact
in float64 whatever its order, as long as no partial sum can reach 2**53 (``check_exact``).

The estimate is computed in tiles, a few per thread at a time: rank-1 directions by matrix products, signs by table
look-up of eight directions at once, Gaussian ones one by one. A tile's part of every direction is drawn where it is
needed, and the tile is written when it is complete, so memory is bounded by the tiles in progress, whatever n and K.
``combine_slowly`` is the obvious loop that all of it must equal bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import isqrt
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from baffle.core.cores import cores
from baffle.core.credit import part_of, sizes_of, units_of
from baffle.core.directions import ENTRIES_PER_BLOCK, FACTORS, Bytes, Directions, Run
from baffle.core.gaussian import from_bits
from baffle.core.philox import BLOCK_BITS, Purpose
from baffle.core.rebuild_units import rebuild_exact, rebuild_rows
from baffle.core.types import (
    DEFAULT_BITS,
    Integers,
    ParamSpec,
    Row,
    Table,
    Task,
    Weights,
    limit_of,
    table_size,
)
from baffle.errors import PlanError

Float64 = npt.NDArray[np.float64]
Floats: TypeAlias = npt.NDArray[np.floating]
Terms: TypeAlias = Sequence[tuple[Directions, Integers]]
"""What is summed: sets of directions, with one integer scalar per direction, int64[K]."""

_DRAWN = 2**15  # blocks of random bits that a thread draws at once: 1 MB
_PRODUCT = (32, 32, 256)  # rows, columns, directions of one product: small enough that OpenBLAS uses one thread
_SIGNS = 2**18  # factors of a product that are held as float64 at once: 2 MB
_SMALLEST = 2**14  # fewest entries that a thread works on at once: below, calls cost more than arithmetic


@dataclass(frozen=True)
class Execution:
    """How to compute a rebuild; no choice changes a bit of the result.

    Attributes:
        threads: number of threads; None: one per core that the process may use.
        block: entries that a thread works on at once; it needs 50 bytes for each, plus up to 6 MB.
        slow: use the reference loop.
    """

    threads: int | None = None
    block: int = 2**16
    slow: bool = False


FAST = Execution()
"""All cores, the usual block size."""


def combine(directions: Directions, scalars: Integers, execution: Execution = FAST) -> Float64:
    """The exact sum_k scalars[k] * d_k, in units of the entries: int64[K] -> float64[n].

    Examples:
        >>> from baffle.core.types import make_table
        >>> d = Directions(make_table({"w": (2, 3)}), "rank1", key=(7, 1))
        >>> combine(d, np.array([10, 1])).tolist()
        [-9.0, -11.0, 9.0, 11.0, 9.0, -11.0]
    """
    if execution.slow:
        return combine_slowly(directions, scalars)
    out = np.empty(table_size(directions.table), np.float64)
    _rebuild([(directions, scalars)], 1.0, out, execution)
    return out


def combine_slowly(directions: Directions, scalars: Integers) -> Float64:
    """The same sum as :func:`combine`, one direction after another in int64: the reference."""
    total = np.zeros(table_size(directions.table), np.int64)
    for k, scalar in enumerate(scalars):
        for i, spec in enumerate(directions.table):
            total[spec.slice] += scalar * directions.entries(i, slice(k, k + 1))[0].astype(np.int64)
    return total.astype(np.float64)


def estimate(table: Table, row: Row, execution: Execution = FAST) -> Weights:
    """The gradient estimate of a row, before clipping (BAFFLE, eq. 5).

    With local steps it is the mean over the steps of the clients' averaged estimates.

    Args:
        table: the trainable tensors.
        row: the round's row.
        execution: how to compute it.

    Returns:
        float32[n], rounded once from the exact sum.
    """
    terms: list[tuple[Directions, Integers]] = []
    for vector, steps in enumerate(row.integers):
        client = row.participants[vector] if row.sharing == "per-client" else 0  # shared: one vector, of all clients
        terms += [(Directions.of(row, table, client, step), integers) for step, integers in enumerate(steps)]
    return gradient(terms, row, row.local_steps * max(row.weight_sum, 1), execution)


def gradient(terms: Terms, round: Task | Row, divisor: int, execution: Execution = FAST) -> Weights:
    """The sum over terms of what their numbers say of the gradient, divided by ``divisor``: float32[n].

    g = 1/D sum_k s_k d_k for one scalar per direction (D = directions of all slices); row by row for rows that are
    credited one by one, g_r = 1/D sum_k s_kr d_kr; and the numbers themselves where they are exact.

    Args:
        terms: directions, and the integers int64[numbers] of a reply, or a sum of them.
        round: says how many directions there are, and each unit's scale.
        divisor: sum of weights x local steps. Exact numbers are divided once, as in the protocol.
        execution: how to compute it; no choice changes a bit of the result.
    """
    table, total = terms[0][0].table, round.num_directions * round.slices
    out = np.zeros(table_size(table), np.float32)
    parts = part_of(sizes_of(table, total))
    for unit, part, exponent in zip(units_of(table), parts, round.exponents, strict=True):
        own = [(directions, integers[part]) for directions, integers in terms]
        if unit.kind == "exact":
            rebuild_exact(table, unit, [integers for _, integers in own], 2.0**exponent / divisor, out)
            continue
        scale = terms[0][0].unit * 2.0**exponent / (total * divisor)
        if unit.kind == "rows":
            rebuild_rows(unit, own, scale, out, execution.threads or cores())
        elif execution.slow:
            slow = sum((combine_slowly(*term) for term in own), np.zeros(len(out))) * scale
            for tensor in unit.tensors:
                out[table[tensor].slice] = slow[table[tensor].slice]
        else:
            _rebuild(own, scale, out, execution, unit.tensors)
    return out


def scaled(table: Table, terms: Terms, factor: float, execution: Execution = FAST) -> Weights:
    """``factor`` times the exact sum of all terms, rounded once to float32, without a float64[n] in memory.

    Args:
        table: the trainable tensors.
        terms: directions and their integer scalars, one per direction for all tensors.
        factor: applied to the float64 sum before rounding.
        execution: how to compute it.

    Returns:
        float32[n].

    Examples:
        >>> from baffle.core.types import make_table
        >>> d = Directions(make_table({"w": (2, 3)}), "rank1", key=(7, 1))
        >>> scaled(d.table, [(d, np.array([10, 1]))], 0.5).tolist()
        [-4.5, -5.5, 4.5, 5.5, 4.5, -5.5]
    """
    out = np.zeros(table_size(table), np.float32)
    if execution.slow:
        out[:] = sum((combine_slowly(*term) for term in terms), np.zeros(len(out))) * factor
    elif terms:
        _rebuild(terms, factor, out, execution)
    return out


def check_exact(
    directions: Directions, num_directions: int, local_steps: int, weight_sum: int, limit: int = limit_of(DEFAULT_BITS)
) -> None:
    """Refuse a round whose partial sums could reach 2**53, where float64 stops being exact for integers.

    Args:
        directions: any directions of the round's family.
        num_directions: of all slices.
        local_steps: local steps of each client.
        weight_sum: the largest sum of the participants' weights.
        limit: largest magnitude of one number.

    Raises:
        PlanError: the bound is reached; the message has every factor of it.
    """
    bound = num_directions * local_steps * weight_sum * limit * directions.largest
    if bound >= 2**53:
        raise PlanError(
            f"directions = {num_directions} x local_steps = {local_steps} x sum of weights = {weight_sum} "
            f"x scalar limit {limit} x largest entry {directions.largest} = {bound:.3g}: expected < 2**53, "
            "so that the rebuild is exact; use fewer directions, steps, participants or bits"
        )


class _Tile(NamedTuple):
    """A rectangle of a tensor seen as a matrix: (out, rest) with rank-1 directions, else a single row."""

    tensor: int
    rows: slice
    columns: slice

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows.stop - self.rows.start, self.columns.stop - self.columns.start


def _rebuild(
    terms: Terms, factor: float, out: Floats, execution: Execution, tensors: Sequence[int] | None = None
) -> None:
    """Write factor * the sum of all terms to ``out``, rounded once to its type; of some tensors (None: of all)."""
    first = terms[0][0]
    threads = execution.threads or cores()
    block = min(execution.block, max(_SMALLEST, out.size // (2 * threads)))

    def work(tiles: list[_Tile]) -> None:
        for tile, total in zip(tiles, _totals(terms, tiles), strict=True):
            spec, matrix = first.table[tile.tensor], _matrix(first, tile.tensor)
            if spec.kept:
                total[~_kept(spec, tile, matrix[1])] = 0
            total *= factor
            out[spec.slice].reshape(matrix)[tile.rows, tile.columns] = total

    chosen = range(len(first.table)) if tensors is None else tensors
    groups = list(_groups(_tiles(first, block, chosen), block))
    if threads == 1 or len(groups) == 1:
        for tiles in groups:
            work(tiles)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, groups))


def _matrix(directions: Directions, tensor: int) -> tuple[int, int]:
    spec = directions.table[tensor]
    return (directions.is_rank1(tensor) and spec.matrix) or (1, spec.size)


def _tiles(directions: Directions, block: int, tensors: Sequence[int]) -> Iterator[_Tile]:
    """Cut tensors into about square tiles of at most ``block`` entries.

    Their sides start at multiples of 8, so that each starts at a whole byte of sign bits.
    """
    for i in tensors:
        rows, columns = _matrix(directions, i)
        height = min(rows, _eights(max(isqrt(block), block // max(columns, 1))))
        width = min(columns, _eights(block // height))
        for r in range(0, rows, height):
            for c in range(0, columns, max(width, 1)):
                yield _Tile(i, slice(r, min(r + height, rows)), slice(c, min(c + width, columns)))


def _eights(count: int) -> int:
    """The largest multiple of 8 up to ``count``, at least 8."""
    return max(count // 8 * 8, 8)


def _groups(tiles: Iterable[_Tile], block: int) -> Iterator[list[_Tile]]:
    """Group tiles to about ``block`` entries, so that small tensors share a call of the generator."""
    group: list[_Tile] = []
    size = 0
    for tile in tiles:
        entries = tile.shape[0] * tile.shape[1]
        if group and size + entries > block:
            yield group
            group, size = [], 0
        group.append(tile)
        size += entries
    if group:
        yield group


def _totals(terms: Terms, tiles: Sequence[_Tile]) -> list[Float64]:
    """The sum of all terms in each tile."""
    totals = [np.zeros(tile.shape) for tile in tiles]
    for directions, integers in terms:
        scalars = integers.astype(np.float64)
        runs = [run for tile in tiles for run in _runs(directions, tile)]
        at_once = max(1, _DRAWN // sum(run.blocks for run in runs))
        for start in range(0, len(scalars), at_once):
            ks = slice(start, min(start + at_once, len(scalars)))
            drawn = iter(directions.bits(runs, ks))
            for tile, total in zip(tiles, totals, strict=True):
                if directions.is_rank1(tile.tensor):
                    left, right = _from(tile.rows, next(drawn)), _from(tile.columns, next(drawn))
                    _add_products(total, left, right, scalars[ks])
                elif directions.family == "gaussian":
                    _add_gaussian(total[0], next(drawn), scalars[ks])
                else:
                    _add_signs(total[0], _from(tile.columns, next(drawn)), scalars[ks])
    return totals


def _runs(directions: Directions, tile: _Tile) -> list[Run]:
    """The runs of random bits that a tile needs from each direction."""
    if directions.is_rank1(tile.tensor):
        parts = list(zip(FACTORS, (tile.rows, tile.columns), strict=True))
    else:
        parts = [(Purpose.GAUSSIAN if directions.family == "gaussian" else Purpose.SIGNS, tile.columns)]
    runs = []
    for purpose, part in parts:
        first = part.start // ENTRIES_PER_BLOCK[purpose]
        runs.append(Run(purpose, tile.tensor, first, -(-part.stop // ENTRIES_PER_BLOCK[purpose]) - first))
    return runs


def _from(part: slice, bits: Bytes) -> Bytes:
    """The sign bits of a part, from its first one: bits are drawn in whole blocks."""
    return bits[:, part.start % BLOCK_BITS // 8 :]


def _kept(spec: ParamSpec, tile: _Tile, columns: int) -> npt.NDArray[np.bool_]:
    """The part of a tensor's pruning mask that lies in a tile; ``columns`` is the width of the whole matrix."""
    rows = np.arange(tile.rows.start, tile.rows.stop)[:, None]
    at = rows * columns + np.arange(tile.columns.start, tile.columns.stop)
    bits: Bytes = np.frombuffer(spec.kept, np.uint8)[at >> 3] >> (at & 7).astype(np.uint8) & 1
    return bits.astype(np.bool_)


# the eight signs of each byte: +1 for bit 1, -1 for bit 0
_PLUS_MINUS = (np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little") * 2.0) - 1.0


def _add_products(total: Float64, left: Bytes, right: Bytes, scalars: Float64) -> None:
    """Add A^T diag(s) B, given the sign bits of A, uint8[K, height / 8], and of B, by a stack of small products.

    If no partial sum can pass 2**24, float32 is exact as well, and faster.
    """
    (height, width), count = total.shape, len(scalars)
    rows, columns = -(-height // _PRODUCT[0]), -(-width // _PRODUCT[1])
    m, n = -(-height // (8 * rows)) * 8, -(-width // (8 * columns)) * 8
    depth = min(_PRODUCT[2], count, max(8, _SIGNS // (rows * m + columns * n)))
    largest = np.add.reduceat(np.abs(scalars), np.arange(0, count, depth)).max()
    signs = _PLUS_MINUS if largest > 2**24 else _PLUS_MINUS.astype(np.float32)
    scalars = scalars.astype(signs.dtype)
    product = np.empty((rows * m, columns * n), signs.dtype)
    stack = product.reshape(rows, m, columns, n).transpose(0, 2, 1, 3)
    a, b = np.empty((depth, rows, m), signs.dtype), np.empty((depth, columns, n), signs.dtype)
    for start in range(0, count, depth):
        ks = slice(start, min(start + depth, count))
        size = ks.stop - start
        _write_signs(signs, left[ks], a[:size])
        _write_signs(signs, right[ks], b[:size])
        b[:size] *= scalars[ks, None, None]
        np.matmul(a[:size].transpose(1, 2, 0)[:, None], b[:size].transpose(1, 0, 2), out=stack)
        total += product[:height, :width]


def _write_signs(signs: Floats, bits: Bytes, out: Floats) -> None:
    """Write the signs of packed bits uint8[K, m] to ``out``; where the bits end, those of zeros."""
    packed = np.zeros((len(out), out.shape[1] * out.shape[2] // 8), np.uint8)
    packed[:, : bits.shape[1]] = bits[:, : packed.shape[1]]
    signs.take(packed, axis=0, out=out.reshape(*packed.shape, 8), mode="clip")


def _add_gaussian(total: Float64, bits: Bytes, scalars: Float64) -> None:
    """Add sum_k s_k d_k, given the bits uint8[K, 4 m] of Gaussian entries."""
    entries = from_bits(bits.view("<u4")[:, : len(total)])
    product = np.empty_like(total)
    for scalar, direction in zip(scalars, entries, strict=True):
        total += np.multiply(direction, scalar, out=product)


def _add_signs(total: Float64, bits: Bytes, scalars: Float64) -> None:
    """Add sum_k s_k (+-1), given sign bits uint8[K, m].

    Eight directions at a time: their scalars have only 256 signed sums. These are tabulated, and one look-up per
    entry replaces eight additions (the method of four Russians).
    """
    groups, words = -(-len(scalars) // 8), -(-len(total) // 64)
    values = np.zeros((groups, 8))
    values.reshape(-1)[: len(scalars)] = scalars
    packed = np.zeros((8 * groups, 8 * words), np.uint8)
    used = min(bits.shape[1], 8 * words)
    packed[: len(bits), :used] = bits[:, :used]
    _transpose_bits(packed.view(np.uint64).reshape(groups, 8, words))
    sums, gathered = np.zeros(64 * words), np.empty(64 * words)
    for table, entries in zip(values @ _PLUS_MINUS.T, packed.reshape(groups, 64 * words), strict=True):
        sums += table.take(entries, out=gathered, mode="clip")
    total += sums.reshape(8, 8 * words).T.reshape(-1)[: len(total)]  # sums[j, i]: of bit j in byte i


def _transpose_bits(x: npt.NDArray[np.uint64]) -> None:
    """Swap bit i of row j with bit j of row i, in every byte of uint64[groups, 8, words], in place.

    Warren, Hacker's Delight, section 7-3.
    """
    groups, _, words = x.shape
    for shift, mask in ((4, 0x0F0F0F0F0F0F0F0F), (2, 0x3333333333333333), (1, 0x5555555555555555)):
        upper, lower = np.moveaxis(x.reshape(groups, 4 // shift, 2, shift, words), 2, 0)
        swapped = upper >> np.uint64(shift)
        swapped ^= lower
        swapped &= np.uint64(mask)
        lower ^= swapped
        swapped <<= np.uint64(shift)
        upper ^= swapped
