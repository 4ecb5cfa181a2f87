"""Tasks, replies and rows as MessagePack: they survive, and garbage is refused. The bytes are in test_vectors."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from baffle.core.types import Reply
from baffle.errors import ReplyError
from baffle.protocol.encoding import decode_reply, decode_row, decode_task, encode_message
from helpers import TASK

COUNT = st.integers(0, 2**63 - 1)
REPLIES = st.builds(
    Reply,
    round=COUNT,
    client=COUNT,
    weight=COUNT,
    scalars=st.binary(max_size=100),
    magnitudes=st.lists(COUNT, max_size=3).map(tuple),
    clipped=COUNT,
    nonfinite=COUNT,
)


@given(REPLIES)
def test_replies_survive(reply: Reply) -> None:
    assert decode_reply(encode_message(reply)) == reply


def test_tasks_survive() -> None:
    assert decode_task(encode_message(TASK)) == TASK


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x91" * 100_000, b"\xdd\xff\xff\xff\xff", encode_message(TASK)[:-1]])
def test_malformed_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(ReplyError, match="malformed task"):
        decode_task(data)
    with pytest.raises(ReplyError, match="malformed reply"):
        decode_reply(data)
    with pytest.raises((msgspec.DecodeError, RecursionError)):
        decode_row(data)
