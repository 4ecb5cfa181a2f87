"""Float32 to 16-bit floating point, as bits, by numpy alone (which has no bfloat16)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Bits = npt.NDArray[np.unsignedinteger[Any]]


def to_float16(values: Float32) -> Bits:
    """The bits of IEEE half precision, uint16: nearest, halves to the even one; what is too large becomes infinite.

    Examples:
        >>> [hex(b) for b in to_float16(np.array([1.0, -2.0], np.float32)).tolist()]
        ['0x3c00', '0xc000']
    """
    with np.errstate(over="ignore", invalid="ignore"):
        return values.astype(np.float16).view(np.uint16)


def to_bfloat16(values: Float32) -> Bits:
    """The upper half of float32, uint16: nearest, halves to the even one; NaN stays NaN.

    Examples:
        >>> [hex(b) for b in to_bfloat16(np.array([1.0, 1.00390625, 1.01171875], np.float32)).tolist()]
        ['0x3f80', '0x3f80', '0x3f82']
    """
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def mask_of(signs: npt.NDArray[np.int8], word: type[np.unsignedinteger[Any]]) -> Bits:
    """+1 -> no bit, -1 -> all bits of a word.

    Examples:
        >>> mask_of(np.array([1, -1], np.int8), np.uint16).tolist()
        [0, 65535]
    """
    wide = (signs >> 7).astype(np.dtype(word).str.replace("u", "i"))
    return wide.view(word)
