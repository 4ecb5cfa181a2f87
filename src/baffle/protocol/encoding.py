"""Encode tasks, replies and rows.

Tasks and replies are MessagePack maps with the fields in the order of ``baffle.core.types``. A row is a MessagePack
array, since every client gets every row: names that never change are numbers, and all floats that are float32 lie in
one string of bytes. Rows of format 3 were maps; they are read as they were written.
"""

from __future__ import annotations

from typing import Literal, TypeVar, get_args

import msgspec
import numpy as np

from baffle.core.optim import COEFFICIENTS
from baffle.core.types import Difference, Family, Reply, Row, Sharing, Task, UInt64
from baffle.errors import ReplyError

Decoded = TypeVar("Decoded")
_FAMILIES, _SHARINGS, _DIFFERENCES = get_args(Family), get_args(Sharing), get_args(Difference)
_RULES = tuple(COEFFICIENTS)


class _Row4(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A row as it is written. ``names`` are the places of family, sharing, difference and optimizer in their lists;
    ``floats`` are clip factor, ema and coefficients as little-endian float32."""

    round: int
    key: UInt64
    applied: bool
    restores: int | None
    rollbacks: int
    names: tuple[int, int, int, int]
    num_directions: int
    slices: int
    local_steps: int
    sigma: float
    lattice: int
    exponents: tuple[int, ...]
    participants: tuple[int, ...]
    weight_sum: int
    numbers: int
    bits: int
    scalars: bytes
    magnitudes: tuple[int, ...]
    clipped: int
    nonfinite: int
    floats: bytes
    weights_sha256: bytes
    state_sha256: bytes


_AS_THEY_ARE = tuple(name for name in _Row4.__struct_fields__ if name not in ("names", "floats"))
"""Fields that a row has under the same name."""


class _Row3(msgspec.Struct, frozen=True, kw_only=True):
    """A row of format 3: one scalar per direction, on one scale, in 32 bits."""

    round: int
    key: UInt64
    applied: bool
    restores: int | None
    rollbacks: int
    family: Family
    sharing: Sharing
    num_directions: int
    difference: Difference
    sigma: float
    lattice: int
    exponent: int
    local_steps: int
    participants: tuple[int, ...]
    weight_sum: int
    scalars: bytes
    clipped: int
    nonfinite: int
    clip_factor: float
    optimizer: Literal["sgd", "adam", "adamw"]
    coefficients: dict[str, float]
    ema: float
    weights_sha256: bytes
    state_sha256: bytes


_encoder = msgspec.msgpack.Encoder()
_rows = msgspec.msgpack.Decoder(_Row4)
_rows3 = msgspec.msgpack.Decoder(_Row3)
_tasks = msgspec.msgpack.Decoder(Task)
_replies = msgspec.msgpack.Decoder(Reply)


def encode_message(message: Task | Reply | Row) -> bytes:
    """Encode a task, a reply or a row.

    Examples:
        >>> r = Reply(round=1, client=0, weight=3, scalars=b"", magnitudes=(), clipped=0, nonfinite=0)
        >>> decode_reply(encode_message(r)) == r
        True
    """
    return _encoder.encode(_written(message) if isinstance(message, Row) else message)


def decode_row(data: bytes) -> Row:
    """Decode a row. Raises msgspec.DecodeError if it is malformed."""
    try:
        if data[:1] and (data[0] & 0xF0 == 0x80 or data[0] == 0xDE):  # a map
            return _read3(_rows3.decode(data))
        return _read(_rows.decode(data))
    except (IndexError, ValueError, RecursionError) as error:
        if isinstance(error, msgspec.DecodeError):
            raise
        raise msgspec.DecodeError(f"malformed row: {error}") from error


def _written(row: Row) -> _Row4:
    names = COEFFICIENTS[row.optimizer]
    floats = [row.clip_factor, row.ema, *(row.coefficients[name] for name in names[: len(row.coefficients)])]
    return _Row4(
        **{name: getattr(row, name) for name in _AS_THEY_ARE},
        names=(
            _FAMILIES.index(row.family),
            _SHARINGS.index(row.sharing),
            _DIFFERENCES.index(row.difference),
            _RULES.index(row.optimizer),
        ),
        floats=np.array(floats, "<f4").tobytes(),
    )


def _read(row: _Row4) -> Row:
    if min(row.names) < 0:
        raise ValueError(f"names {row.names}: expected numbers >= 0")
    family, sharing, difference = _FAMILIES[row.names[0]], _SHARINGS[row.names[1]], _DIFFERENCES[row.names[2]]
    rule = _RULES[row.names[3]]
    clip_factor, ema, *values = np.frombuffer(row.floats, "<f4").tolist()
    if not len(COEFFICIENTS[rule]) - 1 <= len(values) <= len(COEFFICIENTS[rule]):
        raise ValueError(f"{len(values)} coefficients: expected {len(COEFFICIENTS[rule])}")
    return Row(
        **{name: getattr(row, name) for name in _AS_THEY_ARE},
        family=family,
        sharing=sharing,
        difference=difference,
        optimizer=rule,
        clip_factor=clip_factor,
        ema=ema,
        coefficients=dict(zip(COEFFICIENTS[rule], values, strict=False)),
    )


def _read3(row: _Row3) -> Row:
    fields = {name: getattr(row, name) for name in _Row3.__struct_fields__ if name != "exponent"}
    return Row(**fields, exponents=(row.exponent,), slices=1, numbers=row.num_directions, bits=32, magnitudes=(0,))


def decode_task(data: bytes) -> Task:
    """Decode a task. Raises ReplyError if it is malformed."""
    return _decode(_tasks, data, "task")


def decode_reply(data: bytes) -> Reply:
    """Decode a reply. Raises ReplyError if it is malformed."""
    return _decode(_replies, data, "reply")


def _decode(decoder: msgspec.msgpack.Decoder[Decoded], data: bytes, what: str) -> Decoded:
    try:
        return decoder.decode(data)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ReplyError(f"malformed {what}: {error}") from error
