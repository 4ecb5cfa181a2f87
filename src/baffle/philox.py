"""Philox4x64-10, a counter-based generator: any block of random bits, alone and in any order.

Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC'11
(https://doi.org/10.1145/2063384.2063405). It is the generator behind ``numpy.random.Philox``, which
increments its counter before the first output; here counter c gives block c.

Vectorised over counters with numpy's integers, so that one call draws the blocks of all directions and
tensors. Not a cipher: masks and privacy noise never come from here.
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
_CHUNK = 4096  # counters a pass: the temporaries stay in a core's cache
_ROUNDS = 10
_MASK32 = np.uint64(0xFFFFFFFF)
_SHIFT32 = np.uint64(32)
_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)


class Purpose(IntEnum):
    """What a stream of bits is for: the top byte of counter word 3."""

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

    Examples:
        >>> hex(word3(Purpose.LEFT, client=5, step=1))
        '0x200000005000001'
    """
    if not (0 <= client < 2**32 and 0 <= step < 2**24):
        raise ValueError(f"client = {client}, step = {step}: expected 0 <= client < 2**32, 0 <= step < 2**24")
    return int(purpose) << 56 | client << 24 | step


def philox(key: Key, counters: tuple[U64, U64, U64, U64]) -> U64:
    """Blocks of four 64-bit words for counters of any shape that broadcast together: uint64[..., 4].

    Examples:
        >>> zero = np.zeros(1, np.uint64)
        >>> [hex(w) for w in philox((0, 0), (zero, zero, zero, zero))[0].tolist()][:2]
        ['0x16554d9eca36314c', '0xdb20fe9d672d0fdc']
    """
    shape = np.broadcast_shapes(*(c.shape for c in counters))
    flat = [np.broadcast_to(c, shape).reshape(-1) for c in counters]
    out = np.empty((flat[0].size, 4), np.uint64)
    for start in range(0, len(out), _CHUNK):
        part = slice(start, start + _CHUNK)
        out[part] = _rounds(key, [c[part] for c in flat])
    return out.reshape(*shape, 4)


def stream(key: Key, counter: tuple[int, int, int, int], blocks: int) -> U64:
    """``blocks`` consecutive blocks starting at one counter: uint64[blocks, 4].

    The same bits as :func:`philox`, by numpy's compiled generator; faster for long runs.

    Examples:
        >>> zero = np.zeros(1, np.uint64)
        >>> bool((stream((1, 2), (0, 0, 0, 0), 1) == philox((1, 2), (zero, zero, zero, zero))).all())
        True
    """
    position = sum(word << 64 * i for i, word in enumerate(counter))
    source = np.random.Philox(key=key[0] | key[1] << 64, counter=(position - 1) % 2**256)
    return source.random_raw(4 * blocks).reshape(blocks, 4)


def _rounds(key: Key, c: list[U64]) -> U64:
    for i in range(_ROUNDS):
        k0, k1 = (np.uint64((k + i * w) % 2**64) for k, w in zip(key, _WEYL, strict=True))
        high0, low0 = _multiply(_MULTIPLIERS[0], c[0])
        high1, low1 = _multiply(_MULTIPLIERS[1], c[2])
        c = [high1 ^ c[1] ^ k0, low1, high0 ^ c[3] ^ k1, low0]
    return np.stack(c, axis=-1)


def _multiply(constant: int, x: U64) -> tuple[U64, U64]:
    """The high and the low 64 bits of the 128-bit product."""
    low_constant, high_constant = np.uint64(constant & 0xFFFFFFFF), np.uint64(constant >> 32)
    x_low, x_high = x & _MASK32, x >> _SHIFT32
    middle = x_high * low_constant + (x_low * low_constant >> _SHIFT32)
    cross = x_low * high_constant + (middle & _MASK32)
    high = x_high * high_constant + (middle >> _SHIFT32) + (cross >> _SHIFT32)
    return high, x * np.uint64(constant)


def generator(key: Key, purpose: Purpose, client: int = 0, step: int = 0) -> np.random.Generator:
    """A numpy generator on a stream of its own, for draws that no other machine has to repeat.

    Examples:
        >>> generator((7, 0), Purpose.BATCH).integers(10) == generator((7, 0), Purpose.BATCH).integers(10)
        np.True_
    """
    counter = word3(purpose, client, step) << 192
    return np.random.Generator(np.random.Philox(key=key[0] | key[1] << 64, counter=counter))
