"""Frames over a pipe: they arrive as sent, or not at all."""

from __future__ import annotations

import contextlib
import io
import os
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baffle.errors import ReplyError
from baffle.protocol.messages import CalibrateResponse, FailedResponse
from baffle.protocol.pipes import (
    MARK,
    Hello,
    Message,
    WorkRequest,
    decode,
    receive,
    receive_frame,
    send,
    skip_to_mark,
)
from edge_helpers import INF, answer, encode
from helpers import TASK

MESSAGES: list[Message] = [
    Hello(3, "ab", {"runtime": "ort", "threads": 1}),
    WorkRequest(2, TASK, b"\0\1\2\3", True),
    answer(scalars=b"\1\0\0\0"),
    CalibrateResponse((0.1, 0.2), (INF, 0.5), 3, 4),
    FailedResponse("because"),
]


@settings(deadline=None)
@given(st.lists(st.sampled_from(MESSAGES)))
def test_frames_come_out_as_they_went_in(messages: list[Message]) -> None:
    stream = io.BytesIO()
    sizes = [send(stream, message) for message in messages]
    assert sum(sizes) == len(stream.getvalue())
    stream.seek(0)
    assert [receive(stream, 1000) for _ in messages] == list(zip(messages, sizes, strict=True))
    assert receive(stream, 1000) is None


@settings(deadline=None)
@given(st.binary(max_size=50).filter(lambda noise: MARK not in noise))
def test_what_comes_before_the_mark_is_skipped(noise: bytes) -> None:
    stream = io.BytesIO(noise + MARK + b"rest")
    skip_to_mark(stream)
    assert stream.read() == b"rest"


@settings(deadline=None)
@given(st.sampled_from(MESSAGES), st.data())
def test_a_frame_that_is_cut_short_is_an_error(message: Message, data: st.DataObject) -> None:
    stream = io.BytesIO()
    size = send(stream, message)
    length = data.draw(st.integers(1, size - 1))
    with pytest.raises(ReplyError, match=f"ended within a message, after {length} bytes"):
        receive(io.BytesIO(stream.getvalue()[:length]), 1000)


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=200), st.booleans())
def test_random_bytes_are_a_message_or_an_error(noise: bytes, framed: bool) -> None:
    data = len(noise).to_bytes(4, "little") + noise if framed else noise
    try:
        received = receive(io.BytesIO(data), 1000)
    except ReplyError:
        return
    assert (received is None) == (data == b"")


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(MESSAGES), st.data())
def test_a_message_with_a_changed_byte_is_a_message_or_an_error(message: Message, data: st.DataObject) -> None:
    frame = bytearray(encode(message))
    frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ReplyError):
        decode(bytes(frame))


def test_a_length_alone_takes_no_memory() -> None:
    reading, writing = os.pipe()
    os.write(writing, (2**31 - 1).to_bytes(4, "little") + bytes(1000))
    os.close(writing)
    tracemalloc.start()
    try:
        with os.fdopen(reading, "rb") as stream, pytest.raises(ReplyError, match="after 1004 bytes"):
            receive(stream, 2**31)
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()


def test_frames_that_come_in_pieces_are_put_together() -> None:
    class Slow(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            return super().read(min(3, size or 0))

    stream = io.BytesIO()
    size = send(stream, MESSAGES[0])
    assert receive(Slow(stream.getvalue()), 1000) == (MESSAGES[0], size)
    assert receive_frame(Slow(stream.getvalue()), size - 4) == encode(MESSAGES[0])
    with pytest.raises(ReplyError, match=f"at most {size - 5} bytes"):
        receive_frame(Slow(stream.getvalue()), size - 5)
