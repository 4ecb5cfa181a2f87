"""Random directions, addressed by counter: any part of any direction can be drawn alone, on any machine.

Three families (distributions), all with E[d dT] = I, so that the estimate 1/K sum_k s_k d_k is unbiased as sigma -> 0:

* ``rank1`` (default): a matrix (out, rest) gets the product a bT of two random sign vectors, every other tensor a
  sign vector. This costs out + rest bits per matrix instead of out * rest, and turns the rebuild into a matrix
  product. (Sarkar et al., EGGROLL, 2025; Spall, SPSA, 1992.)
* ``rademacher``: independent signs.
* ``gaussian``: the discrete Gaussian on multiples of 2**-10, for fidelity to BAFFLE (arXiv 2301.12195).

Entries are integers in units of 1 (signs) or 2**-10 (Gaussian). The generator's key is (run key, round); its counter
words are block, direction, tensor, and purpose/client/step (:func:`baffle.core.philox.word3`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from baffle.core import gaussian
from baffle.core.philox import BLOCK_BITS, U64, Key, Purpose, philox, streams, word3
from baffle.core.types import Family, Row, Table, Task

Signs = npt.NDArray[np.int8]
Bytes = npt.NDArray[np.uint8]
Entries = npt.NDArray[np.int16]

_LONG = 24  # blocks per direction from which numpy's compiled generator is faster than ours
FACTORS = (Purpose.LEFT, Purpose.RIGHT)
ENTRIES_PER_BLOCK = {
    Purpose.SIGNS: BLOCK_BITS,
    Purpose.LEFT: BLOCK_BITS,
    Purpose.RIGHT: BLOCK_BITS,
    Purpose.GAUSSIAN: BLOCK_BITS // 32,
}


class Run(NamedTuple):
    """Consecutive blocks of one stream of bits, drawn for each direction by :meth:`Directions.bits`.

    Attributes:
        purpose: what the bits are for.
        tensor: index of the tensor in the table.
        first: number of the first block.
        blocks: how many blocks of 256 bits.
    """

    purpose: Purpose
    tensor: int
    first: int
    blocks: int


@dataclass(frozen=True)
class Directions:
    """The directions of one round, client and local step. Nothing is drawn until it is needed.

    Attributes:
        table: the trainable tensors.
        family: distribution of the entries.
        key: (run key, round).
        client: 0 for directions that all clients share, the client's number + 1 for its own (see :meth:`of`).
        step: local step, from 0.

    Examples:
        >>> from baffle.core.types import make_table
        >>> d = Directions(make_table({"w": (2, 3)}), "rank1", key=(7, 1))
        >>> d.entries(0, slice(0, 2)).tolist()
        [[-1, -1, 1, 1, 1, -1], [1, -1, -1, 1, -1, -1]]
    """

    table: Table
    family: Family
    key: Key
    client: int = 0
    step: int = 0

    @classmethod
    def of(cls, round: Task | Row, table: Table, client: int, step: int = 0) -> Directions:
        """The directions along which a client evaluates in one local step of a round.

        Args:
            round: the round's task or its row.
            table: the trainable tensors.
            client: the client's number, from 0; with shared directions it makes no difference.
            step: local step, from 0.
        """
        owner = 0 if round.sharing == "shared" else client + 1
        return cls(table, round.family, (round.key, round.round), owner, step)

    @property
    def unit(self) -> float:
        """Value of one unit of the integer entries: a power of two."""
        return 2.0**-gaussian.GRID_BITS if self.family == "gaussian" else 1.0

    @property
    def largest(self) -> int:
        """Largest magnitude of an entry, in units."""
        return gaussian.largest() if self.family == "gaussian" else 1

    def is_rank1(self, tensor: int) -> bool:
        """Whether a tensor's direction is a product of two sign vectors."""
        spec = self.table[tensor]
        # rows that are credited one by one need signs of their own: a product would give all of them one factor
        return self.family == "rank1" and spec.matrix is not None and spec.credit.kind == "loss"

    def factors(self, ks: slice, tensors: list[int] | None = None) -> dict[int, tuple[Signs, Signs]]:
        """The factors of rank-1 directions, all drawn in one call of the generator.

        Args:
            ks: numbers of the directions, as a range.
            tensors: indices of tensors; None: all. Those that are not rank-1 are left out.

        Returns:
            Tensor -> (a, b), signs int8[K, out] and int8[K, rest].
        """
        chosen = [i for i in (range(len(self.table)) if tensors is None else tensors) if self.is_rank1(i)]
        sides = [(i, side) for i in chosen for side in zip(FACTORS, self.table[i].matrix or (), strict=False)]
        drawn = self.bits([Run(purpose, i, 0, -(-count // BLOCK_BITS)) for i, (purpose, count) in sides], ks)
        signs = [_to_signs(packed, count) for packed, (_, (_, count)) in zip(drawn, sides, strict=True)]
        return {i: (signs[2 * j], signs[2 * j + 1]) for j, i in enumerate(chosen)}

    def bits(self, runs: Sequence[Run], ks: slice) -> list[Bytes]:
        """The bits of each run, for each direction; all short runs are drawn in one call of the generator.

        Args:
            runs: which blocks of which streams.
            ks: numbers of the directions, as a range.

        Returns:
            For each run uint8[K, 32 * blocks]: 256 bits per block, lowest bit first.

        Examples:
            >>> from baffle.core.types import make_table
            >>> d = Directions(make_table({"w": (2, 3)}), "rank1", key=(7, 1))
            >>> left, right = (Run(purpose, 0, 0, 1) for purpose in FACTORS)
            >>> [packed[:, 0].tolist() for packed in d.bits([left, right], slice(0, 2))]
            [[189, 200], [244, 70]]
        """
        short = [run for run in runs if run.blocks < _LONG]
        ends = list(accumulate((run.blocks for run in short), initial=0))
        words = np.empty((ks.stop - ks.start, 0, 4), np.uint64)
        if short:
            blocks = [run.blocks for run in short]
            c0 = np.concatenate([np.arange(run.first, run.first + run.blocks, dtype=np.uint64) for run in short])
            c2 = np.repeat(np.array([run.tensor for run in short], np.uint64), blocks)
            c3 = np.repeat(np.array([self._word3(run.purpose) for run in short], np.uint64), blocks)
            words = philox(self.key, (c0, _column(ks), c2, c3))
        parts = iter([words[:, start:end] for start, end in pairwise(ends)])
        return [_as_bytes(next(parts) if run.blocks < _LONG else self._stream(run, ks)) for run in runs]

    def sign_bits(self, tensor: int, ks: slice, first_block: int, blocks: int) -> Bytes:
        """Packed sign bits of a tensor: uint8[K, 32 * blocks], 256 bits per block, lowest bit first."""
        return self.bits([Run(Purpose.SIGNS, tensor, first_block, blocks)], ks)[0]

    def entries(self, tensor: int, ks: slice, start: int = 0, stop: int | None = None) -> Entries:
        """Entries of a tensor's directions, of any family, written out: the reference that fast forms must equal.

        Args:
            tensor: index of the tensor in the table.
            ks: numbers of the directions, as a range.
            start: first entry.
            stop: end of the entries; None: the tensor's size.

        Returns:
            int16[K, stop - start], in units; pruned entries are 0.

        Raises:
            ValueError: the range is not within the tensor.
        """
        mask = self.table[tensor].mask
        if mask is not None:  # an entry's bits depend on its place alone, so pruning others does not move it
            whole = replace(self, table=tuple(msgspec.structs.replace(spec, kept=b"") for spec in self.table))
            return whole.entries(tensor, ks, start, stop) * mask[start:stop]
        size = self.table[tensor].size
        stop = size if stop is None else stop
        if not 0 <= start <= stop <= size:
            raise ValueError(f"entries {start}:{stop}: expected a range within 0:{size}")
        if self.is_rank1(tensor):
            a, b = self.factors(ks, [tensor])[tensor]
            _, rest = self.table[tensor].matrix or (0, 1)
            rows = np.arange(start, stop)
            return (a[:, rows // rest] * b[:, rows % rest]).astype(np.int16)
        purpose = Purpose.GAUSSIAN if self.family == "gaussian" else Purpose.SIGNS
        per_block = ENTRIES_PER_BLOCK[purpose]
        first = start // per_block
        packed = self.bits([Run(purpose, tensor, first, -(-stop // per_block) - first)], ks)[0]
        part = slice(start - first * per_block, stop - first * per_block)
        if purpose is Purpose.GAUSSIAN:
            return gaussian.from_bits(packed.view("<u4")[:, part])
        return _to_signs(packed, part.stop)[:, part].astype(np.int16)

    def _word3(self, purpose: Purpose) -> int:
        return word3(purpose, self.client, self.step)

    def _stream(self, run: Run, ks: slice) -> U64:
        """uint64[K, blocks, 4]"""
        counter = (run.first, ks.start, run.tensor, self._word3(run.purpose))
        return streams(self.key, counter, ks.stop - ks.start, run.blocks)


def _column(ks: slice) -> U64:
    return np.arange(ks.start, ks.stop, dtype=np.uint64)[:, None]


def _as_bytes(words: U64) -> Bytes:
    """uint64[K, blocks, 4] -> uint8[K, 32 * blocks], the lowest byte of a word first."""
    flat = np.ascontiguousarray(words).reshape(words.shape[0], 4 * words.shape[1])
    return flat.astype("<u8", copy=False).view(np.uint8)


def _to_signs(packed: Bytes, count: int) -> Signs:
    """uint8[K, bytes] -> int8[K, count]: bit 1 is +1, bit 0 is -1."""
    bits = np.unpackbits(packed, axis=1, count=count, bitorder="little").view(np.int8)
    return bits * np.int8(2) - np.int8(1)
