"""Gaussian numbers on the grid of multiples of 2**-10, drawn by integer operations only.

The discrete Gaussian: magnitude m has probability proportional to exp(-m**2 / 2**21). On so fine a grid its variance
is 1 to far more digits than float64 has. The thresholds below are computed with big integers (no libm), so they are
the same on every machine; ``docs/protocol.md`` has their hash.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt

GRID_BITS = 10
"""log2 of the grid points per unit."""
_BITS = 31  # a draw is one sign bit and 31 bits that are looked up in the table
_GUIDE_BITS = 16  # leading bits that an index over the table covers
_CHUNK = 2**16  # draws looked up at once: the temporaries stay in a core's cache
_FIXED = 256  # fraction bits of the big-integer arithmetic


@cache
def thresholds() -> npt.NDArray[np.uint32]:
    """The inverse distribution function as a table: the magnitude of a 31-bit draw v is the number of thresholds <= v.

    Returns:
        Non-decreasing uint32[6490].

    Examples:
        >>> len(thresholds()), int(thresholds()[0])
        (6490, 836643)
    """
    one = 1 << _FIXED
    exp_neg, term = one, one  # exp(-2**-21) by its series
    for i in range(1, 40):
        term = -term // (i << 21)
        exp_neg += term
    squared = exp_neg * exp_neg >> _FIXED
    weights, weight, ratio = [one], one, exp_neg  # weight(m) and exp(-(2m + 1) / 2**21)
    while weight >> (_FIXED - 64):
        weight = weight * ratio >> _FIXED
        ratio = ratio * squared >> _FIXED
        weights.append(weight)
    total = 2 * sum(weights) - one  # both signs; zero once
    result, cumulative = [], 0
    for m, weight in enumerate(weights):
        cumulative += weight if m == 0 else 2 * weight
        threshold = ((cumulative << (_BITS + 1)) + total) // (2 * total)  # rounded to nearest
        if threshold >= 1 << _BITS:
            break
        result.append(threshold)
    return np.array(result, np.uint32)


@cache
def largest() -> int:
    """Largest magnitude that can be drawn, in units of 2**-10."""
    return len(thresholds())


@cache
def _guide() -> tuple[npt.NDArray[np.int16], npt.NDArray[np.uint32], int]:
    """An index over the thresholds by the leading 16 bits of a draw (its lead).

    Returns the magnitude at the start of each lead, the threshold that follows it, and the first lead that contains
    more than one threshold: below it, one comparison decides; from there on, a binary search does.
    """
    starts = np.arange((1 << _GUIDE_BITS) + 1, dtype=np.uint32) << np.uint32(_BITS - _GUIDE_BITS)
    low = np.searchsorted(thresholds(), starts, side="right")
    following = np.append(thresholds(), np.uint32(1 << _BITS))[low]
    return low.astype(np.int16), following, int(np.argmax(np.diff(low) > 1))


def from_bits(bits: npt.NDArray[np.uint32]) -> npt.NDArray[np.int16]:
    """Turn uniform 32-bit words into Gaussian integers.

    Args:
        bits: random words of any shape; bit 0 is the sign, the other 31 are looked up.

    Returns:
        int16 of the same shape, in units of 2**-10.

    Examples:
        >>> from_bits(np.array([0, 1, 2 * 836643, 2 * 836643 + 1], np.uint32)).tolist()
        [0, 0, 1, -1]
    """
    flat = np.ascontiguousarray(bits).reshape(-1)
    out = np.empty(flat.shape, np.int16)
    for start in range(0, len(flat), _CHUNK):
        part = slice(start, start + _CHUNK)
        _look_up(flat[part], out[part])
    return out.reshape(bits.shape)


def _look_up(bits: npt.NDArray[np.uint32], out: npt.NDArray[np.int16]) -> None:
    low, following, tail = _guide()
    draws = bits >> np.uint32(1)
    lead = (draws >> np.uint32(_BITS - _GUIDE_BITS)).astype(np.intp)
    low.take(lead, out=out, mode="clip")
    out += draws >= following.take(lead)
    where = np.nonzero(draws >= np.uint32(tail << (_BITS - _GUIDE_BITS)))
    out[where] = np.searchsorted(thresholds(), draws[where], side="right")
    minus = -(bits & np.uint32(1)).astype(np.int16)  # -1 or 0: negate by two's complement, without a branch
    out ^= minus
    out -= minus
