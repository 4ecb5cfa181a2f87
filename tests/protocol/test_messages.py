"""What goes over the network: messages, attachments, Flower's records; and the files of who takes part."""

from __future__ import annotations

import contextlib
import hashlib
import zlib

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from baffle.client.calibrate import LADDER
from baffle.core.state import State, state_sha256
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
from baffle.protocol.states import pack_state, pack_weights, unpack_state, unpack_weights
from helpers import TASK

TEXT = st.text(st.characters(codec="utf-8"), max_size=50)
COUNT = st.integers(0, 2**63 - 1)
BYTES = st.binary(max_size=100)
REPLY = st.builds(Reply, round=COUNT, client=COUNT, weight=COUNT, scalars=BYTES, clipped=COUNT, nonfinite=COUNT)
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
QUESTIONS = st.one_of(
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
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


# Messages


@given(RESPONSES)
def test_responses_survive(response: AnyResponse) -> None:
    assert decode_response(encode(response)) == response


@given(QUESTIONS)
def test_questions_survive(question: EnrolRequest | TrainRequest) -> None:
    assert decode_request(encode(question)) == question


def test_a_setup_survives_and_has_one_hash() -> None:
    assert decode_setup(encode(SETUP)) == SETUP
    assert encode(decode_setup(encode(SETUP))) == encode(SETUP)


def test_the_bytes_of_messages_stay() -> None:
    reply = Reply(round=3, client=2, weight=5, scalars=b"\x01\x02\x03\x04", clipped=1, nonfinite=0)
    assert encode(TrainResponse(reply, b"\xaa\xbb")).hex() == (
        "83a474797065a6616e73776572a57265706c7986a5726f756e6403a6636c69656e7402a677656967687405"
        "a77363616c617273c40401020304a7636c697070656401a96e6f6e66696e69746500ac73746174655f736861323536c402aabb"
    )
    assert hashlib.sha256(encode(SETUP)).hexdigest() == (
        "d7091b6645aa3db60391cd690bf2ca1edb41b48fe48d90f9dec936b7c619d540"
    )


@settings(max_examples=300)
@given(st.binary(max_size=300) | RESPONSES.map(encode) | QUESTIONS.map(encode), st.data())
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


# Parcels


@given(arrays.arrays(np.float32, st.integers(1, 30), elements=FLOATS))
def test_weights_survive_bit_for_bit(weights: np.ndarray) -> None:
    assert unpack_weights(pack_weights(weights), len(weights)).tobytes() == weights.tobytes()


@given(arrays.arrays(np.float32, (4, 7), elements=FLOATS), COUNT, COUNT)
def test_states_survive_bit_for_bit(values: np.ndarray, round: int, step: int) -> None:
    state = State(round, step, values[0], {"m": values[1], "v": values[2]}, values[3])
    found = unpack_state(pack_state(state), 7)
    assert state_sha256(found) == state_sha256(state)
    assert (found.round, found.step, list(found.slots)) == (round, step, ["m", "v"])
    assert found.ema_weights.tobytes() == found.weights.tobytes()


def test_the_rarest_numbers_survive() -> None:
    tiny = np.finfo(np.float32)
    values = np.array([-0.0, 0.0, tiny.smallest_subnormal, -tiny.smallest_subnormal, tiny.max, tiny.min], np.float32)
    assert unpack_weights(pack_weights(values), 6).tobytes() == values.tobytes()


def test_the_bytes_of_a_packed_state_stay() -> None:
    attachment = zlib.decompress(pack_weights(np.array([1.0, -2.0], np.float32)))
    assert attachment.hex() == "83a5726f756e6400a47374657000a661727261797381a777656967687473c4080000000080003fc0"


def attachment(**arrays: np.ndarray) -> bytes:
    contents = {name: a.astype("<f4").view(np.uint8).reshape(-1, 4).T.tobytes() for name, a in arrays.items()}
    return zlib.compress(msgspec.msgpack.encode({"round": 1, "step": 1, "arrays": contents}))


ONES = np.ones(5, np.float32)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "malformed"),
        (b"?", "malformed"),
        (zlib.compress(b"\xc1"), "malformed"),
        (zlib.compress(b"\x84\xa1x" + b"\x91" * 60_000), "malformed"),
        (zlib.compress(b"\x83\xa5round\xa1\xff\xa4step\x00\xa6arrays\x80"), "malformed"),
        (pack_weights(ONES)[:-1], "expected a whole one"),
        (pack_weights(ONES)[:-4], "expected a whole one"),
        (pack_weights(ONES) + b"x", "nothing after it"),
        (pack_weights(ONES[:4]), "16 bytes: expected 20"),
        (attachment(weights=ONES * np.nan), "NaN or infinity"),
        (attachment(weights=ONES, **{"slots.m": ONES * np.inf}), "slots.m with NaN or infinity"),
        (attachment(other=ONES), "without weights"),
        (zlib.compress(msgspec.msgpack.encode({"round": -1, "step": 0, "arrays": {}})), "without weights"),
    ],
)
def test_attachments_of_anything_else_are_refused(data: bytes, reason: str) -> None:
    with pytest.raises(ReplyError, match=reason):
        unpack_state(data, 5)


def test_a_flipped_bit_is_never_taken_for_weights() -> None:
    good = pack_weights(np.linspace(-1, 1, 40, dtype=np.float32))
    for position in range(len(good)):
        for mask in (1, 128):
            bad = bytearray(good)
            bad[position] ^= mask
            try:
                found = unpack_weights(bytes(bad), 40)
            except ReplyError:
                continue
            assert found.tobytes() == unpack_weights(good, 40).tobytes()  # of zlib's header
