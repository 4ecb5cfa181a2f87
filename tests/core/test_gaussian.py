"""The discrete Gaussian: its thresholds, frozen and right, and the look-up of them."""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats  # type: ignore[import-untyped]

from baffle.core import gaussian

Float64 = npt.NDArray[np.float64]

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "golden" / "directions.json").read_text())
THRESHOLDS_SHA256 = "b7045635741de36099d5ca5da5c4a51c935327ad2fdb1ff4885254e035df6455"


def test_thresholds_are_frozen() -> None:
    table = gaussian.thresholds()
    assert table.dtype == np.uint32
    assert len(table) == gaussian.largest() == GOLDEN["thresholds"]["count"] == 6490
    assert hashlib.sha256(table.astype("<u4").tobytes()).hexdigest() == THRESHOLDS_SHA256
    assert GOLDEN["thresholds"]["sha256"] == THRESHOLDS_SHA256


def probabilities() -> Float64:
    """Of each magnitude 0 .. 6490, in units of 2**-31, exact in float64."""
    edges = np.concatenate([[0], gaussian.thresholds().astype(np.int64), [2**31]])
    return np.diff(edges).astype(np.float64)


def test_the_table_has_the_moments_of_a_normal() -> None:
    p, m = probabilities() / 2**31, np.arange(gaussian.largest() + 1) / 2**10
    assert p.min() >= 0  # the farthest magnitudes have less than half a draw, so that some never occur
    assert p.sum() == 1
    assert abs((p * m**2).sum() - 1) < 1e-8
    assert abs((p * m**4).sum() - 3) < 1e-6


def test_thresholds_follow_the_normal_distribution() -> None:
    edges = (np.arange(gaussian.largest()) + 0.5) / 2**10
    expected = 2 * stats.norm.cdf(edges) - 1
    assert np.abs(gaussian.thresholds() / 2**31 - expected).max() < 1e-7


def test_look_up_at_every_threshold() -> None:
    table = gaussian.thresholds().tolist()
    assert table == sorted(table)
    for offset in (-1, 0, 1):
        draws = [min(threshold + offset, 2**31 - 1) for threshold in table]
        expected = np.array([bisect_right(table, draw) for draw in draws])
        bits = np.array(draws, np.uint32) << np.uint32(1)
        assert np.array_equal(gaussian.from_bits(bits), expected)
        assert np.array_equal(gaussian.from_bits(bits | np.uint32(1)), -expected)
    extremes = np.array([0, 1, 2**32 - 2, 2**32 - 1], np.uint32)
    assert gaussian.from_bits(extremes).tolist() == [0, 0, 6490, -6490]


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=20))
def test_look_up_counts_thresholds(bits: list[int]) -> None:
    table = gaussian.thresholds()
    slow = [(-1 if b & 1 else 1) * int((table <= b >> 1).sum()) for b in bits]
    assert gaussian.from_bits(np.array(bits, np.uint32)).tolist() == slow
