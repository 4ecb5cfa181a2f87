"""Encoding of tasks, replies and rows: MessagePack maps with the fields in the order of ``types``."""

from __future__ import annotations

from typing import TypeVar

import msgspec

from baffle.core.types import Reply, Row, Task
from baffle.errors import ReplyError

Message = TypeVar("Message")

_encoder = msgspec.msgpack.Encoder()
_rows = msgspec.msgpack.Decoder(Row)
_tasks = msgspec.msgpack.Decoder(Task)
_replies = msgspec.msgpack.Decoder(Reply)


def encode_message(message: Task | Reply | Row) -> bytes:
    """Bytes of a message.

    Examples:
        >>> r = Reply(round=1, client=0, weight=3, scalars=b"", clipped=0, nonfinite=0)
        >>> decode_reply(encode_message(r)) == r
        True
    """
    return _encoder.encode(message)


def decode_row(data: bytes) -> Row:
    """The row in ``data``; msgspec.DecodeError if it is none."""
    return _rows.decode(data)


def decode_task(data: bytes) -> Task:
    """The task in ``data``; ReplyError if it is none."""
    return _decode(_tasks, data, "task")


def decode_reply(data: bytes) -> Reply:
    """The reply in ``data``; ReplyError if it is none."""
    return _decode(_replies, data, "reply")


def _decode(decoder: msgspec.msgpack.Decoder[Message], data: bytes, what: str) -> Message:
    try:
        return decoder.decode(data)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ReplyError(f"malformed {what}: {error}") from error
