"""The framing of ``rows.bin``: length, complement of the length, row, chain checksum; repeated.

The chain is sha256(previous checksum + row), so any edit, swap or gap is detected. The complement distinguishes an
edited length from a record that a kill truncated.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass

_HEADER = struct.Struct("<II")
_CHAIN = 32


@dataclass(frozen=True)
class Scan:
    """Content of a log: the valid rows, their checksums, and whether an edit or a truncated record follows them."""

    rows: tuple[bytes, ...]
    chain: tuple[bytes, ...]
    edited: bool
    unfinished: bool


def frame(row: bytes, chain: bytes) -> tuple[bytes, bytes]:
    """The bytes of a record that follows checksum ``chain``, and its own checksum.

    Examples:
        >>> record, checksum = frame(b"row", bytes(32))
        >>> record[:11], record[11:] == checksum
        (b'\\x03\\x00\\x00\\x00\\xfc\\xff\\xff\\xffrow', True)
    """
    checksum = hashlib.sha256(chain + row).digest()
    return _HEADER.pack(len(row), len(row) ^ 0xFFFFFFFF) + row + checksum, checksum


def size(rows: list[bytes]) -> int:
    """Length in bytes of a log of these rows."""
    return sum(_HEADER.size + len(row) + _CHAIN for row in rows)


def scan(data: bytes, start: bytes) -> Scan:
    """Read a log whose chain starts at ``start``, up to its end or to the first malformed record."""
    rows: list[bytes] = []
    chain: list[bytes] = []
    position, edited = 0, False
    while position + _HEADER.size <= len(data):
        length, complement = _HEADER.unpack_from(data, position)
        end = position + _HEADER.size + length
        edited = length ^ complement != 0xFFFFFFFF
        if edited or end + _CHAIN > len(data):
            break
        row = data[position + _HEADER.size : end]
        checksum = hashlib.sha256((chain[-1] if chain else start) + row).digest()
        edited = data[end : end + _CHAIN] != checksum
        if edited:
            break
        rows.append(row)
        chain.append(checksum)
        position = end + _CHAIN
    return Scan(tuple(rows), tuple(chain), edited, unfinished=not edited and position < len(data))
