"""Philox4x64-10 against its published answers, an obvious reference in Python integers, and numpy."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baffle.core.philox import BLOCK_BITS, U64, Key, Purpose, generator, philox, stream, streams, word3

Counter = tuple[int, int, int, int]

WORD = st.one_of(st.integers(0, 2**64 - 1), st.sampled_from([0, 1, 2**32 - 1, 2**32, 2**63, 2**64 - 1]))
KEYS = st.tuples(WORD, WORD)
COUNTERS = st.tuples(WORD, WORD, WORD, WORD)
ONES = 2**64 - 1

# kat_vectors of Random123 1.14.0 (Salmon et al., https://github.com/DEShawResearch/random123)
KNOWN_ANSWERS: list[tuple[Key, Counter, list[int]]] = [
    (
        (0, 0),
        (0, 0, 0, 0),
        [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B],
    ),
    (
        (ONES, ONES),
        (ONES, ONES, ONES, ONES),
        [0x87B092C3013FE90B, 0x438C3C67BE8D0224, 0x9CC7D7C69CD777B6, 0xA09CAEBF594F0BA0],
    ),
    (
        (0x452821E638D01377, 0xBE5466CF34E90C6C),
        (0x243F6A8885A308D3, 0x13198A2E03707344, 0xA4093822299F31D0, 0x082EFA98EC4E6C89),
        [0xA528F45403E61D95, 0x38C72DBD566E9788, 0xA5A1610E72FD18B5, 0x57BD43B5E52B7FE6],
    ),
]


def slow_philox(key: Key, counter: Counter) -> list[int]:
    """One block as the paper writes it, in integers without a limit."""
    c0, c1, c2, c3 = counter
    for i in range(10):
        k0 = (key[0] + i * 0x9E3779B97F4A7C15) % 2**64
        k1 = (key[1] + i * 0xBB67AE8584CAA73B) % 2**64
        high0, low0 = divmod(0xD2E7470EE14C6C93 * c0, 2**64)
        high1, low1 = divmod(0xCA5A826395121157 * c2, 2**64)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
    return [c0, c1, c2, c3]


def columns(counters: list[Counter]) -> tuple[U64, U64, U64, U64]:
    table = np.array(counters, np.uint64).reshape(-1, 4)
    return table[:, 0], table[:, 1], table[:, 2], table[:, 3]


def advance(counter: Counter, blocks: int) -> Counter:
    """The counter as one 256-bit number, plus ``blocks``."""
    number = (sum(word << 64 * i for i, word in enumerate(counter)) + blocks) % 2**256
    return number % 2**64, number >> 64 & ONES, number >> 128 & ONES, number >> 192


@pytest.mark.parametrize(("key", "counter", "answer"), KNOWN_ANSWERS)
def test_published_known_answers(key: Key, counter: Counter, answer: list[int]) -> None:
    assert philox(key, columns([counter])).tolist() == [answer]
    assert stream(key, counter, 1).tolist() == [answer]
    assert slow_philox(key, counter) == answer


@settings(deadline=None, max_examples=100)
@given(KEYS, st.lists(COUNTERS, min_size=1, max_size=5))
def test_philox_equals_the_slow_reference(key: Key, counters: list[Counter]) -> None:
    assert philox(key, columns(counters)).tolist() == [slow_philox(key, c) for c in counters]


@settings(deadline=None, max_examples=50)
@given(KEYS, COUNTERS, st.integers(1, 5))
def test_stream_equals_philox_and_carries_like_one_long_number(key: Key, counter: Counter, blocks: int) -> None:
    counters = [advance(counter, i) for i in range(blocks)]
    assert np.array_equal(stream(key, counter, blocks), philox(key, columns(counters)))


@settings(deadline=None, max_examples=50)
@given(KEYS, COUNTERS, st.integers(0, 5), st.integers(1, 40))
def test_streams_are_those_of_consecutive_directions(key: Key, counter: Counter, count: int, blocks: int) -> None:
    found = streams(key, counter, count, blocks)
    assert found.shape == (count, blocks, 4)
    for k, words in enumerate(found):
        assert np.array_equal(words, stream(key, advance(counter, k << 64), blocks))


def test_stream_carries_into_the_next_word() -> None:
    words = stream((1, 2), (ONES, 7, 0, 0), 2)
    assert words.tolist() == [slow_philox((1, 2), (ONES, 7, 0, 0)), slow_philox((1, 2), (0, 8, 0, 0))]


@settings(deadline=None, max_examples=25)
@given(KEYS, st.integers(0, 2**63))
def test_numpy_starts_one_block_later(key: Key, first: int) -> None:
    """numpy.random.Philox at counter c gives block c + 1 first."""
    source = np.random.Philox(key=key[0] | key[1] << 64, counter=first)
    expected = source.random_raw(12).reshape(3, 4)
    assert np.array_equal(philox(key, columns([(first + i, 0, 0, 0) for i in (1, 2, 3)])), expected)


@pytest.mark.parametrize("blocks", [0, 1, 4095, 4096, 4097, 8192, 8193])
def test_chunks_leave_no_seam(blocks: int) -> None:
    c0 = np.arange(blocks, dtype=np.uint64)
    constants = [np.array([word], np.uint64) for word in (3, 5, 7)]
    words = philox((11, 13), (c0, constants[0], constants[1], constants[2]))
    assert words.shape == (blocks, 4)
    assert words.dtype == np.uint64
    assert np.array_equal(words, stream((11, 13), (0, 3, 5, 7), blocks))


def test_counters_broadcast_and_are_left_alone() -> None:
    rows, column = np.arange(3, dtype=np.uint64), np.arange(4, dtype=np.uint64)[:, None]
    one = np.array([9], np.uint64)
    for array in (rows, column, one):
        array.setflags(write=False)
    words = philox((1, 2), (rows, column, one, one))
    assert words.shape == (4, 3, 4)
    for k in range(4):
        for block in range(3):
            assert words[k, block].tolist() == slow_philox((1, 2), (block, k, 9, 9))


def test_one_flipped_bit_of_key_or_counter_flips_half_of_the_block() -> None:
    """The mean over all 384 input bits is 128 of 256, within 5 standard errors (8 / sqrt(384))."""
    base = slow_philox((3, 4), (5, 6, 7, 8))
    flips = []
    for word in range(6):
        for bit in range(64):
            values = [3, 4, 5, 6, 7, 8]
            values[word] ^= 1 << bit
            key, counter = (values[0], values[1]), (values[2], values[3], values[4], values[5])
            words = philox(key, columns([counter]))[0].tolist()
            flips.append(sum((a ^ b).bit_count() for a, b in zip(words, base, strict=True)))
    assert min(flips) > 128 - 5 * 8
    assert max(flips) < 128 + 5 * 8
    assert abs(np.mean(flips) - 128) < 5 * 8 / len(flips) ** 0.5


@settings(deadline=None)
@given(st.sampled_from(Purpose), st.integers(0, 2**32 - 1), st.integers(0, 2**24 - 1))
def test_word3_keeps_its_parts_apart(purpose: Purpose, client: int, step: int) -> None:
    word = word3(purpose, client, step)
    assert (word >> 56, word >> 24 & 0xFFFFFFFF, word & 0xFFFFFF) == (purpose, client, step)
    assert word < 2**64


@pytest.mark.parametrize(("client", "step"), [(-1, 0), (2**32, 0), (0, -1), (0, 2**24)])
def test_word3_refuses_what_does_not_fit(client: int, step: int) -> None:
    with pytest.raises(ValueError, match="expected 0 <= client"):
        word3(Purpose.SIGNS, client, step)


def test_purposes_are_frozen() -> None:
    assert {p.name: int(p) for p in Purpose} == {
        "SIGNS": 1,
        "LEFT": 2,
        "RIGHT": 3,
        "GAUSSIAN": 4,
        "PARTICIPANTS": 5,
        "BATCH": 6,
        "PARTITION": 7,
        "GRAPH": 8,
    }
    assert BLOCK_BITS == 256


def test_generator_draws_from_its_own_stream() -> None:
    raw = generator((7, 3), Purpose.BATCH, client=2, step=1).bit_generator.random_raw(8)
    assert raw.reshape(2, 4).tolist() == [
        slow_philox((7, 3), (block, 0, 0, word3(Purpose.BATCH, 2, 1))) for block in (1, 2)
    ]


def test_generators_of_different_places_differ() -> None:
    places = [
        ((7, 3), Purpose.BATCH, 2, 1),
        ((7, 3), Purpose.BATCH, 2, 2),
        ((7, 3), Purpose.BATCH, 3, 1),
        ((7, 3), Purpose.PARTICIPANTS, 2, 1),
        ((7, 4), Purpose.BATCH, 2, 1),
        ((8, 3), Purpose.BATCH, 2, 1),
    ]
    drawn = {hashlib.sha256(generator(*place).bytes(32)).hexdigest() for place in places}
    assert len(drawn) == len(places)


def test_neighbouring_large_keys_differ_in_numpy_generators_too() -> None:
    draws = [generator((key, 0), Purpose.BATCH).integers(2**62) for key in (2**63 + 1, 2**63 + 2, 2**64 - 1)]
    assert len(set(draws)) == 3
