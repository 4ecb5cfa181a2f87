"""Messages across a network: they survive, their bytes stay, and garbage is refused."""

from __future__ import annotations

import contextlib
import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baffle.client.calibrate import LADDER
from baffle.core.types import Reply, make_table
from baffle.errors import ReplyError
from baffle.protocol.messages import (
    AnyResponse,
    BehindResponse,
    CalibrateResponse,
    EnrolRequest,
    EnrolResponse,
    FailedResponse,
    Setup,
    TrainRequest,
    TrainResponse,
    decode_request,
    decode_response,
    decode_setup,
    encode,
    printable,
)
from helpers import TASK

TEXT = st.text(st.characters(codec="utf-8"), max_size=50)

COUNT = st.integers(0, 2**63 - 1)

BYTES = st.binary(max_size=100)

REPLY = st.builds(
    Reply,
    round=COUNT,
    client=COUNT,
    weight=COUNT,
    scalars=BYTES,
    magnitudes=st.lists(COUNT, max_size=3).map(tuple),
    clipped=COUNT,
    nonfinite=COUNT,
)

RESPONSES: st.SearchStrategy[AnyResponse] = st.one_of(
    st.builds(
        EnrolResponse,
        name=TEXT,
        examples=COUNT,
        plan=st.dictionaries(TEXT, TEXT | COUNT, max_size=3),
        state_sha256=BYTES,
        round=COUNT,
    ),
    st.builds(TrainResponse, REPLY, BYTES),
    st.builds(CalibrateResponse, st.just(LADDER), st.tuples(st.floats(allow_nan=False)), COUNT, COUNT),
    st.builds(BehindResponse, COUNT, BYTES, st.booleans()),
    st.builds(FailedResponse, TEXT),
)

REQUESTS = st.one_of(
    st.builds(EnrolRequest, TEXT),
    st.builds(
        TrainRequest,
        setup=TEXT,
        task=st.just(TASK),
        rows=st.lists(BYTES, max_size=3).map(tuple),
        calibrate=st.booleans(),
    ),
)

SETUP = Setup(
    table=make_table({"w": (3, 2)}, {"w": np.eye(3, 2) > 0}),
    frozen="ab",
    shape=(1, 8, 8),
    classes=10,
    vocabulary=None,
    mean=(0.5,),
    std=(0.25,),
    options={"model": "mlp", "seed": 3, "norm": None},
    bundle=b"PK",
)


@given(RESPONSES)
def test_responses_survive(response: AnyResponse) -> None:
    assert decode_response(encode(response)) == response


@given(REQUESTS)
def test_requests_survive(request: EnrolRequest | TrainRequest) -> None:
    assert decode_request(encode(request)) == request


def test_a_setup_survives_and_has_one_hash() -> None:
    assert decode_setup(encode(SETUP)) == SETUP
    assert encode(decode_setup(encode(SETUP))) == encode(SETUP)


def test_the_bytes_of_messages_stay() -> None:
    reply = Reply(round=3, client=2, weight=5, scalars=b"\x01\x02\x03\x04", magnitudes=(6, 300), clipped=1, nonfinite=0)
    assert encode(TrainResponse(reply, b"\xaa\xbb")).hex() == (
        "83a474797065a6616e73776572a57265706c7987a5726f756e6403a6636c69656e7402a677656967687405"
        "a77363616c617273c40401020304aa6d61676e6974756465739206cd012ca7636c697070656401a96e6f6e66696e69746500ac73746174655f736861323536c402aabb"
    )
    assert hashlib.sha256(encode(SETUP)).hexdigest() == (
        "33bfca5c5497123a75aae9691774e6b0c3e1c2767c51ae99d6357aad264a2f42"
    )


@settings(max_examples=300)
@given(st.binary(max_size=300) | RESPONSES.map(encode) | REQUESTS.map(encode), st.data())
def test_garbage_is_refused_and_nothing_worse(data: bytes, draw: st.DataObject) -> None:
    damaged = bytearray(data)
    for _ in range(draw.draw(st.integers(0, 3)) if damaged else 0):
        damaged[draw.draw(st.integers(0, len(damaged) - 1))] = draw.draw(st.integers(0, 255))
    for decode in (decode_request, decode_response, decode_setup):
        with contextlib.suppress(ReplyError):
            decode(bytes(damaged))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"\x91" * 100_000,
        b"\x82\xa4type\xa6failed\xa1x" + b"\x91" * 100_000,
        b"\x82\xa4type\xa6failed\xa6reason\xa2\xff\xfe",
        b"\xdd\xff\xff\xff\xff",
        b"\x82\xa4type\xa6failed\xa6reason\xdb\xff\xff\xff\xff",
        b"\x81\xa4type\xd7\xff" + b"\xff" * 8,
    ],
)
def test_malformed_bytes_are_refused(data: bytes) -> None:
    for decode in (decode_request, decode_response, decode_setup):
        with pytest.raises(ReplyError, match="malformed"):
            decode(data)


def test_foreign_words_are_one_clean_line() -> None:
    assert printable("a\x1b[2J\r\nb\u202ec\ud800d" + "x" * 9, 12) == "a [2J b c d"
    assert printable("é 数") == "é 数"
