"""Rounding of float32 to 16-bit floating point, as bits, in numpy alone (which has no bfloat16)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Bits = npt.NDArray[np.unsignedinteger[Any]]
_BLOCK = 2**15


def to_float16(values: Float32) -> Bits:
    """Round to IEEE half precision, to nearest and ties to even; values that are too large become infinite.

    Args:
        values: float32 of any shape.

    Returns:
        The bits as uint16, in the same shape.

    Examples:
        >>> [hex(b) for b in to_float16(np.array([1.0, -2.0], np.float32)).tolist()]
        ['0x3c00', '0xc000']
    """
    with np.errstate(over="ignore", invalid="ignore"):
        return values.astype(np.float16).view(np.uint16)


def to_bfloat16(values: Float32) -> Bits:
    """Round to bfloat16, the upper half of a float32, to nearest and ties to even; NaN stays NaN.

    Args:
        values: float32 of any shape.

    Returns:
        The bits as uint16, in the same shape.

    Examples:
        >>> [hex(b) for b in to_bfloat16(np.array([1.0, 1.00390625, 1.01171875], np.float32)).tolist()]
        ['0x3f80', '0x3f80', '0x3f82']
    """
    values = np.ascontiguousarray(values)
    bits, out = values.reshape(-1).view(np.uint32), np.empty(values.size, np.uint16)
    scratch = np.empty(min(_BLOCK, len(bits)), np.uint32)
    for start in range(0, len(bits), _BLOCK):  # block by block, so that all of its operations stay in the cache
        part = bits[start : start + _BLOCK]
        rounded = scratch[: len(part)]
        np.right_shift(part, 16, out=rounded)
        np.bitwise_and(rounded, 1, out=rounded)
        np.add(rounded, 0x7FFF, out=rounded)
        np.add(rounded, part, out=rounded)
        np.right_shift(rounded, 16, out=rounded)
        np.copyto(out[start : start + _BLOCK], rounded, casting="unsafe")
    nan = np.isnan(values)
    if nan.any():
        out[nan.reshape(-1)] = 0x7FC0
    return out.reshape(values.shape)


def mask_of(signs: npt.NDArray[np.int8], word: type[np.unsignedinteger[Any]]) -> Bits:
    """Signs as bit masks: +1 becomes a word without any bit set, -1 a word with all of them.

    Examples:
        >>> mask_of(np.array([1, -1], np.int8), np.uint16).tolist()
        [0, 65535]
    """
    wide = (signs >> 7).astype(np.dtype(word).str.replace("u", "i"))
    return wide.view(word)
