"""Philox4x64-10, a counter-based generator: any block of random bits can be drawn alone, in any order.

Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC'11
(https://doi.org/10.1145/2063384.2063405). It is the generator behind ``numpy.random.Philox``, which increments its
counter before the first output; here counter c gives block c.

Vectorised over counters in numpy, so that one call draws the blocks of all directions and tensors. It is not a
cipher: the masks of a secure sum never come from here.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

U64: TypeAlias = npt.NDArray[np.uint64]
Key: TypeAlias = tuple[int, int]
"""(run key, round): two unsigned 64-bit integers."""

BLOCK_BITS = 256
"""Bits per block: four words of 64."""
_CHUNK = 8192  # counters per pass: the temporaries stay in a core's cache, and threads rarely wait for one another
_ROUNDS = 10
_MASK32 = np.uint64(0xFFFFFFFF)
_SHIFT32 = np.uint64(32)
_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)


class Purpose(IntEnum):
    """What a stream of bits is for: the top byte of counter word 3. The values are part of the protocol."""

    SIGNS = 1
    LEFT = 2
    RIGHT = 3
    GAUSSIAN = 4
    PARTICIPANTS = 5
    BATCH = 6
    PARTITION = 7
    GRAPH = 8


def word3(purpose: Purpose, client: int = 0, step: int = 0) -> int:
    """Counter word 3: purpose (8 bits), client (32 bits), local step (24 bits).

    Raises:
        ValueError: client or step does not fit its bits.

    Examples:
        >>> hex(word3(Purpose.LEFT, client=5, step=1))
        '0x200000005000001'
    """
    if not (0 <= client < 2**32 and 0 <= step < 2**24):
        raise ValueError(f"client = {client}, step = {step}: expected 0 <= client < 2**32, 0 <= step < 2**24")
    return int(purpose) << 56 | client << 24 | step


def philox(key: Key, counters: tuple[U64, U64, U64, U64]) -> U64:
    """The blocks of some counters.

    Args:
        key: (run key, round).
        counters: the four counter words, of shapes that broadcast together.

    Returns:
        Four words per counter, uint64[..., 4].

    Examples:
        >>> zero = np.zeros(1, np.uint64)
        >>> [hex(w) for w in philox((0, 0), (zero, zero, zero, zero))[0].tolist()][:2]
        ['0x16554d9eca36314c', '0xdb20fe9d672d0fdc']
    """
    shape = np.broadcast_shapes(*(c.shape for c in counters))
    flat = [np.broadcast_to(c, shape).reshape(-1) for c in counters]
    out = np.empty((flat[0].size, 4), np.uint64)
    scratch = np.empty((9, min(_CHUNK, len(out))), np.uint64)
    for start in range(0, len(out), _CHUNK):
        part = out[start : start + _CHUNK]
        used = scratch[:, : len(part)]
        for word, c in zip(used, flat, strict=False):
            word[:] = c[start : start + _CHUNK]
        _rounds(key, used, part)
    return out.reshape(*shape, 4)


def stream(key: Key, counter: tuple[int, int, int, int], blocks: int) -> U64:
    """Consecutive blocks from one counter on: uint64[blocks, 4].

    The same bits as :func:`philox` gives, from numpy's compiled generator; faster for many blocks.

    Examples:
        >>> zero = np.zeros(1, np.uint64)
        >>> bool((stream((1, 2), (0, 0, 0, 0), 1) == philox((1, 2), (zero, zero, zero, zero))).all())
        True
    """
    only: U64 = streams(key, counter, 1, blocks)[0]
    return only


def streams(key: Key, counter: tuple[int, int, int, int], count: int, blocks: int) -> U64:
    """Consecutive blocks for each of some consecutive directions, from numpy's compiled generator.

    Args:
        key: (run key, round).
        counter: counter of the first direction's first block; the direction is word 1.
        count: number of directions.
        blocks: blocks for each of them.

    Returns:
        uint64[count, blocks, 4].

    Examples:
        >>> both = streams((1, 2), (0, 5, 0, 0), 2, 6)
        >>> bool((both[1] == stream((1, 2), (0, 6, 0, 0), 6)).all())
        True
    """
    position = sum(word << 64 * i for i, word in enumerate(counter))
    source = np.random.Philox(key=key[0] | key[1] << 64, counter=(position - 1) % 2**256)  # it counts, then draws
    out = np.empty((count, blocks, 4), np.uint64)
    for words in out.reshape(count, 4 * blocks):
        words[:] = source.random_raw(4 * blocks)
        source.advance(2**64 - blocks)  # to the next direction, in a fifth of the time that a new generator takes
    return out


def _rounds(key: Key, scratch: U64, out: U64) -> None:
    """Write the blocks of the counters in rows 0 to 3 of ``scratch``, uint64[9, counters], which is overwritten."""
    c0, c1, c2, c3, high0, high1, *spare = scratch
    for i in range(_ROUNDS):
        k0, k1 = (np.uint64((k + i * w) % 2**64) for k, w in zip(key, _WEYL, strict=True))
        _multiply(_MULTIPLIERS[0], c0, high0, spare)
        _multiply(_MULTIPLIERS[1], c2, high1, spare)
        for word, high, k in ((c1, high1, k0), (c3, high0, k1)):
            np.bitwise_xor(word, high, out=word)
            np.bitwise_xor(word, k, out=word)
        c0, c1, c2, c3 = c1, c2, c3, c0
    for j, word in enumerate((c0, c1, c2, c3)):
        out[:, j] = word


def _multiply(constant: int, x: U64, high: U64, spare: list[U64]) -> None:
    """128-bit products with a constant: the low 64 bits go into ``x``, the others into ``high``.

    numpy has no 128-bit integers, so the high half is put together from 32-bit halves (schoolbook multiplication).
    """
    low_constant, high_constant = np.uint64(constant & 0xFFFFFFFF), np.uint64(constant >> 32)
    cross, x_high, middle = spare
    np.bitwise_and(x, _MASK32, out=cross)
    np.right_shift(x, _SHIFT32, out=x_high)
    np.multiply(cross, low_constant, out=middle)
    np.right_shift(middle, _SHIFT32, out=middle)
    np.multiply(x_high, low_constant, out=high)
    np.add(middle, high, out=middle)
    np.multiply(cross, high_constant, out=cross)
    np.multiply(x_high, high_constant, out=high)
    np.bitwise_and(middle, _MASK32, out=x_high)
    np.add(cross, x_high, out=cross)
    for part in (middle, cross):
        np.right_shift(part, _SHIFT32, out=part)
        np.add(high, part, out=high)
    np.multiply(x, np.uint64(constant), out=x)


def generator(key: Key, purpose: Purpose, client: int = 0, step: int = 0) -> np.random.Generator:
    """A numpy generator on a stream of its own, for draws that no other implementation has to repeat.

    Args:
        key: (run key, round).
        purpose: what it draws.
        client: client number + 1, or 0 for none.
        step: local step.

    Examples:
        >>> generator((7, 0), Purpose.BATCH).integers(10) == generator((7, 0), Purpose.BATCH).integers(10)
        np.True_
    """
    counter = word3(purpose, client, step) << 192
    return np.random.Generator(np.random.Philox(key=key[0] | key[1] << 64, counter=counter))
