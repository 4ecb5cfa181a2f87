"""Scalars as fixed-point integers, and the clients' integer weights."""

from __future__ import annotations

import math

import msgspec
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from baffle.core.scalars import encode, weight_of
from baffle.core.types import limit_of
from helpers import TASK

LIMIT = limit_of(15)


def test_encoding_rounds_to_even_clips_and_counts() -> None:
    scalars = np.array([0.5 / 16, 1.5 / 16, -2.5 / 16, 3.0, 1e9, -1e9, math.nan, math.inf, -math.inf])
    encoded = encode(msgspec.structs.replace(TASK, num_directions=9), scalars)
    assert encoded.integers.tolist() == [0, 2, -2, 48, LIMIT, -LIMIT, 0, 0, 0]
    assert (encoded.clipped, encoded.nonfinite) == (2, 3)


def test_clipping_norm_is_in_units_of_the_derivative() -> None:
    encoded = encode(msgspec.structs.replace(TASK, clip=2.03, num_directions=4), np.array([1.0, 2.0, 2.1, -5.0]))
    assert encoded.integers.tolist() == [16, 32, 32, -32]  # 2.03 is 32.48 units
    assert encoded.clipped == 2


@given(st.lists(st.floats(allow_nan=True, width=64), min_size=1, max_size=20), st.integers(-40, 40))
def test_encoding_is_bounded_and_near(values: list[float], exponent: int) -> None:
    scalars = np.array(values)
    encoded = encode(msgspec.structs.replace(TASK, exponents=(exponent,), num_directions=len(values)), scalars)
    assert np.abs(encoded.integers).max() <= LIMIT
    kept = np.isfinite(scalars) & (np.abs(scalars) <= LIMIT * 2.0**exponent)
    assert np.all(np.abs(encoded.integers[kept] * 2.0**exponent - scalars[kept]) <= 0.5 * 2.0**exponent)
    assert encoded.nonfinite == int((~np.isfinite(scalars)).sum())
    with np.errstate(over="ignore"):
        units = np.rint(np.ldexp(np.abs(scalars), -exponent))
    assert encoded.clipped == int((np.isfinite(scalars) & (units > LIMIT)).sum())


def test_units_have_scales_of_their_own_and_tell_how_large_their_numbers_were() -> None:
    task = msgspec.structs.replace(TASK, exponents=(-4, 0), unit_sizes=(2, 3))
    encoded = encode(task, np.array([0.5, -0.25, 3.4, -1.0, 0.0]))
    assert encoded.integers.tolist() == [8, -4, 3, -1, 0]
    assert encoded.magnitudes == (6 * 256, round((3.4 + 1.0) / 3 * 256))


def test_one_bit_is_the_sign_alone() -> None:
    task = msgspec.structs.replace(TASK, bits=1, num_directions=4)
    encoded = encode(task, np.array([3.0, -1e-9, 0.0, math.nan]))
    assert encoded.integers.tolist() == [1, -1, 1, 1]
    assert (encoded.clipped, encoded.nonfinite) == (0, 1)


@given(st.integers(1, 10**7), st.integers(0, 16))
def test_weights_are_proportional_within_half_a_unit(examples: int, log_quantum: int) -> None:
    weight = weight_of(examples, 2**log_quantum)
    assert 1 <= weight <= 255
    if 1 < weight < 255:
        assert abs(weight - examples / 2**log_quantum) <= 0.5
