"""Shamir's secret sharing (How to share a secret, CACM 1979) of 16 bytes over GF(2^128), for many secrets at once.

Field and shares are those of ``pycryptodome``, which the tests compare with; it takes 0.4 s for a client's two secrets
and 100 neighbours, this module 0.01 s. Secrets influence only values, never a branch or an index.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

SECRET = 16
"""Bytes of a secret, and of a share."""
MOST_HOLDERS = 255
"""Most shares of a secret: positions have 8 bits."""
_BITS = 128
_REDUCED = 0b10000111  # x^128 = x^7 + x^2 + x + 1
_MODULUS = 1 << _BITS | _REDUCED

_Elements = npt.NDArray[np.uint64]
"""Elements of the field, uint64[2, ...]: the upper 64 coefficients and the lower 64."""


def split(secret: bytes, threshold: int, holders: int) -> list[bytes]:
    """Split a secret into shares, any ``threshold`` of which determine it, while fewer reveal nothing.

    Args:
        secret: 16 bytes.
        threshold: shares that determine the secret.
        holders: number of shares.

    Returns:
        The shares for positions 1..holders, 16 bytes each.

    Raises:
        ValueError: the secret has another length, or the numbers do not fit.

    Examples:
        >>> shares = split(b"sixteen bytes ..", 2, 3)
        >>> recombine([(1, 3)], [[shares[0], shares[2]]])
        [b'sixteen bytes ..']
    """
    if len(secret) != SECRET or not 1 <= threshold <= holders <= MOST_HOLDERS:
        raise ValueError(f"{len(secret)} bytes, {threshold} of {holders}: expected {SECRET}, at most {MOST_HOLDERS}")
    polynomial = _elements([os.urandom(SECRET) for _ in range(threshold - 1)] + [secret])
    positions = np.arange(1, holders + 1, dtype=np.uint64)
    values = np.zeros((2, holders), np.uint64)
    for coefficient in polynomial.T:  # Horner's rule, the secret last
        values = _times(values, positions, holders.bit_length()) ^ coefficient[:, None]
    return _bytes(values)


def recombine(positions: Sequence[Sequence[int]], shares: Sequence[Sequence[bytes]]) -> list[bytes]:
    """Recombine secrets from their shares, by Lagrange interpolation at 0.

    With fewer shares than the threshold the result is unrelated to the secret; that is no error. The Lagrange
    coefficients of each distinct set of positions are computed once.

    Args:
        positions: for each secret the positions of its shares, equally many for all.
        shares: for each secret its shares, in the order of the positions.

    Returns:
        The secrets, 16 bytes each.
    """
    sets, which = np.unique(np.asarray(positions, np.uint64), axis=0, return_inverse=True)
    coefficients = _lagrange(sets)[:, which.reshape(-1)]
    values = _elements([share for row in shares for share in row]).reshape(coefficients.shape)
    return _bytes(np.bitwise_xor.reduce(_product(values, coefficients), axis=2))


def _lagrange(sets: _Elements) -> _Elements:
    """Lagrange coefficients at 0: for each position x of each set, the product of y / (y - x) over the other y.

    Minus is exclusive or. It is computed as the product of all y, divided by x and by all other y - x.
    """
    above = np.zeros((2, len(sets), 1), np.uint64)
    below = np.zeros((2, *sets.shape), np.uint64)
    above[1] = below[1] = 1
    for y in sets.T[:, :, None]:
        above = _times(above, y)
        below = _times(below, np.where(sets == y, y, sets ^ y))
    inverses = _inverses(below.reshape(2, -1)).reshape(below.shape)
    return _product(inverses, np.broadcast_to(above, below.shape))


def _inverses(elements: _Elements) -> _Elements:
    """Inverses of uint64[2, n] from a single inversion: invert the products of pairs, then 1/a = b / (a b).

    An inversion costs far more than a product (Montgomery's trick, as a tree).
    """
    count = elements.shape[1]
    if count == 1:
        return _elements([_inverse(int.from_bytes(_bytes(elements)[0], "big")).to_bytes(SECRET, "big")])
    if count % 2:
        elements = np.concatenate([elements, np.array([[0], [1]], np.uint64)], axis=1)
    left, right = elements[:, ::2], elements[:, 1::2]
    of_both = _inverses(_product(left, right))
    inverses = np.empty_like(elements)
    inverses[:, ::2], inverses[:, 1::2] = _product(of_both, right), _product(of_both, left)
    return inverses[:, :count]


def _inverse(element: int) -> int:
    """Inverse by Euclid's algorithm. Its time depends on the element, which is made of positions and so public."""
    a, b, inverse, other = element, _MODULUS, 1, 0
    while a != 1:
        if a.bit_length() < b.bit_length():
            a, b, inverse, other = b, a, other, inverse
        shift = a.bit_length() - b.bit_length()
        a, inverse = a ^ b << shift, inverse ^ other << shift
    return inverse


def _product(a: _Elements, b: _Elements) -> _Elements:
    """Products of elements of equal shape: shift and add, with masks instead of branches."""
    product = np.zeros_like(a)
    for half in (1, 0):
        for bit in range(64):
            product ^= a & _mask(b[half], bit)
            a = _double(a)
    return product


def _times(a: _Elements, small: _Elements, bits: int = 8) -> _Elements:
    """Each element times a number of at most ``bits`` bits: uint64[2, ...] by uint64[...]."""
    product = np.zeros_like(a)
    for bit in range(bits):
        product ^= a & _mask(small, bit)
        a = _double(a)
    return product


def _mask(words: _Elements, bit: int) -> _Elements:
    """All ones where a bit is set, else 0."""
    mask: _Elements = np.negative(words >> np.uint64(bit) & np.uint64(1))
    return mask


def _double(a: _Elements) -> _Elements:
    """Each element times x."""
    carry = a[::-1] >> np.uint64(63)
    carry[1] *= np.uint64(_REDUCED)
    doubled: _Elements = a << np.uint64(1) ^ carry
    return doubled


def _elements(shares: Sequence[bytes]) -> _Elements:
    """Big-endian bytes -> uint64[2, n]."""
    return np.frombuffer(b"".join(shares), ">u8").astype(np.uint64).reshape(-1, 2).T


def _bytes(elements: _Elements) -> list[bytes]:
    """uint64[2, n] -> big-endian bytes."""
    data = elements.T.astype(">u8").tobytes()
    return [data[i : i + SECRET] for i in range(0, len(data), SECRET)]
