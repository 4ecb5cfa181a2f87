"""Messages between a server and a stateless client over a pipe: framed MessagePack, one request at a time.

A frame is the length of the message (4 bytes, little-endian), then the message. Messages are maps whose first key,
``type``, names their kind. A client starts with ``MARK``; anything before it, such as the greeting of a shell, is
skipped. Both sides know the maximum length of the next message, so that foreign output that gets into the stream
later is noticed by its first four bytes.
"""

from __future__ import annotations

from typing import BinaryIO, TypeAlias

import msgspec

from baffle.core.types import Task
from baffle.errors import ReplyError
from baffle.protocol.messages import CalibrateResponse, FailedResponse, TrainResponse

MARK = b"\0baffle\n"
MOST_BYTES = 2**16
"""Upper limit of a message, in bytes, without its weights or scalars."""
_AT_ONCE = 2**20
_MOST_SKIPPED = 2**16


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """The client's first message: its number of examples, its bundle, how it evaluates passes."""

    examples: int
    bundle: str
    plan: dict[str, str | int]


class WorkRequest(msgspec.Struct, frozen=True, tag="work"):
    """A task for a client, with the weights to start from: float32, little-endian."""

    client: int
    task: Task
    weights: bytes
    calibrate: bool = False
    """Measure a sigma instead of answering the task."""


Message: TypeAlias = Hello | WorkRequest | TrainResponse | CalibrateResponse | FailedResponse

_decoder = msgspec.msgpack.Decoder(Message)


def send(stream: BinaryIO, message: Message) -> int:
    """Write a message as a frame; returns the frame's length in bytes."""
    data = msgspec.msgpack.encode(message)
    stream.write(len(data).to_bytes(4, "little") + data)
    stream.flush()
    return 4 + len(data)


def skip_to_mark(stream: BinaryIO) -> None:
    """Read up to the end of the mark, or of the stream. Raises ReplyError if no mark comes within 64 KiB."""
    seen = bytearray()
    while not seen.endswith(MARK) and (byte := stream.read(1)):
        seen += byte
        if len(seen) > _MOST_SKIPPED:
            raise ReplyError(f"{len(seen)} bytes that begin with {bytes(seen[:20])!r}: expected a client of baffle")


def receive(stream: BinaryIO, longest: int) -> tuple[Message, int] | None:
    """Read a frame.

    Args:
        stream: to read from.
        longest: upper limit of the message, in bytes.

    Returns:
        The message and the frame's length in bytes; None at the end of the stream.

    Raises:
        ReplyError: if the frame is too long, cut short, or holds no valid message.

    Examples:
        >>> from io import BytesIO
        >>> stream = BytesIO()
        >>> send(stream, FailedResponse("no data"))
        32
        >>> receive(BytesIO(stream.getvalue()), MOST_BYTES)
        (FailedResponse(reason='no data'), 32)
    """
    data = receive_frame(stream, longest)
    return None if data is None else (decode(data), 4 + len(data))


def receive_frame(stream: BinaryIO, longest: int) -> bytes | None:
    """Read a message's bytes; None at the end. After a ReplyError nothing more can be read from the stream."""
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
    """Decode a message. Raises ReplyError if it is malformed."""
    try:
        message: Message = _decoder.decode(data)
    except (ValueError, RecursionError) as error:  # of msgspec, of text, of depth
        raise ReplyError(f"malformed message: {error}") from error
    return message


def _read(stream: BinaryIO, size: int) -> bytes:
    """Read ``size`` bytes, or fewer at the end. Memory grows with the bytes read, not with the announced size."""
    parts: list[bytes] = []
    while size and (part := stream.read(min(size, _AT_ONCE))):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
