"""Attached states and weights: they survive bit for bit, and anything else is refused."""

from __future__ import annotations

import zlib

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from baffle.core.state import State, state_sha256
from baffle.errors import ReplyError
from baffle.protocol.states import pack_state, pack_weights, unpack_state, unpack_weights

COUNT = st.integers(0, 2**63 - 1)

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(arrays.arrays(np.float32, st.integers(1, 30), elements=FLOATS))
def test_weights_survive_bit_for_bit(weights: np.ndarray) -> None:
    assert unpack_weights(pack_weights(weights), len(weights)).tobytes() == weights.tobytes()


@given(arrays.arrays(np.float32, (4, 7), elements=FLOATS), COUNT, COUNT)
def test_states_survive_bit_for_bit(values: np.ndarray, round: int, step: int) -> None:
    state = State(round, step, values[0], {"m": values[1], "v": values[2]}, values[3])
    unpacked = unpack_state(pack_state(state), 7)
    assert state_sha256(unpacked) == state_sha256(state)
    assert (unpacked.round, unpacked.step, list(unpacked.slots)) == (round, step, ["m", "v"])
    assert unpacked.ema_weights.tobytes() == unpacked.weights.tobytes()


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
                unpacked = unpack_weights(bytes(bad), 40)
            except ReplyError:
                continue
            assert unpacked.tobytes() == unpack_weights(good, 40).tobytes()  # of zlib's header
