"""Encode tasks, replies and rows as MessagePack maps, with the fields in the order of ``baffle.core.types``."""

from __future__ import annotations

from typing import TypeVar

import msgspec

from baffle.core.types import Reply, Row, Task
from baffle.errors import ReplyError

Decoded = TypeVar("Decoded")

_encoder = msgspec.msgpack.Encoder()
_rows = msgspec.msgpack.Decoder(Row)
_tasks = msgspec.msgpack.Decoder(Task)
_replies = msgspec.msgpack.Decoder(Reply)


def encode_message(message: Task | Reply | Row) -> bytes:
    """Encode a task, a reply or a row.

    Examples:
        >>> r = Reply(round=1, client=0, weight=3, scalars=b"", clipped=0, nonfinite=0)
        >>> decode_reply(encode_message(r)) == r
        True
    """
    return _encoder.encode(message)


def decode_row(data: bytes) -> Row:
    """Decode a row. Raises msgspec.DecodeError if it is malformed."""
    return _rows.decode(data)


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
