"""What a server and an edge client say to each other over a pipe: framed MessagePack, one request at a time.

A frame is the length of the message (4 bytes, little-endian) and the message. Messages are maps whose first key,
``type``, names their kind. A client begins with ``MARK``; what comes before it is the greeting of a shell or the like,
and is skipped. Both sides know how long the next message can be, so that whatever else gets into a stream later is
noticed by its first four bytes.
"""

from __future__ import annotations

from typing import BinaryIO, TypeAlias

import msgspec

from baffle.core.types import Task
from baffle.errors import ReplyError
from baffle.protocol.messages import Answer, Failed, Found

MARK = b"\0baffle\n"
BESIDES = 2**16
"""Bytes of a message besides weights or scalars, at most."""
_AT_ONCE = 2**20
_MOST_SKIPPED = 2**16


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """The client's first word: how many examples it has, which bundle, how it evaluates."""

    examples: int
    bundle: str
    plan: dict[str, str | int]


class Work(msgspec.Struct, frozen=True, tag="work"):
    """A task for a client, with the weights to start from: float32, little-endian."""

    client: int
    task: Task
    weights: bytes
    calibrate: bool = False
    """Find a sigma instead of answering."""


Message: TypeAlias = Hello | Work | Answer | Found | Failed

_decoder = msgspec.msgpack.Decoder(Message)


def send(stream: BinaryIO, message: Message) -> int:
    """Write a frame; its length in bytes."""
    data = msgspec.msgpack.encode(message)
    stream.write(len(data).to_bytes(4, "little") + data)
    stream.flush()
    return 4 + len(data)


def skip_to_mark(stream: BinaryIO) -> None:
    """Read up to the end of the mark, or of the stream. Raises ReplyError if it does not come."""
    seen = bytearray()
    while not seen.endswith(MARK) and (byte := stream.read(1)):
        seen += byte
        if len(seen) > _MOST_SKIPPED:
            raise ReplyError(f"{len(seen)} bytes that begin with {bytes(seen[:20])!r}: expected a client of baffle")


def receive(stream: BinaryIO, longest: int) -> tuple[Message, int] | None:
    """Read a frame: the message and the frame's length; None at the end. Raises ReplyError if it is none.

    ``longest``: bytes of the message, at most.
    """
    data = receive_frame(stream, longest)
    return None if data is None else (decode(data), 4 + len(data))


def receive_frame(stream: BinaryIO, longest: int) -> bytes | None:
    """Read the bytes of a message; None at the end. After a ReplyError nothing more can be read from the stream."""
    head = _read(stream, 4)
    if not head:
        return None
    size = int.from_bytes(head, "little")
    if len(head) == 4 and size > longest:
        raise ReplyError(
            f"a frame that begins with {head!r}: expected a message of at most {longest} bytes; does something else "
            "write here?"
        )
    data = _read(stream, size) if len(head) == 4 else b""
    if len(head) < 4 or len(data) < size:
        raise ReplyError(f"the stream ended within a message, after {len(head) + len(data)} bytes")
    return data


def decode(data: bytes) -> Message:
    """The message in ``data``. Raises ReplyError if it is none."""
    try:
        message: Message = _decoder.decode(data)
    except (ValueError, RecursionError) as error:  # of msgspec, of text, of depth
        raise ReplyError(f"malformed message: {error}") from error
    return message


def _read(stream: BinaryIO, size: int) -> bytes:
    """So many bytes, or fewer at the end. Memory grows with what comes, not with what was announced."""
    parts: list[bytes] = []
    while size and (part := stream.read(min(size, _AT_ONCE))):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
