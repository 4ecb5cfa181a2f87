"""Checks of options: what is taken, and what each refusal says."""

from __future__ import annotations

import math

import pytest

from baffle.core.checks import LARGEST, SMALLEST, parse_bytes, require_between, require_count, require_positive
from baffle.errors import OptionError


@pytest.mark.parametrize("value", [SMALLEST, 1, 0.5, LARGEST])
def test_positive_numbers_that_float32_can_hold_are_taken(value: float) -> None:
    require_positive("x", value)


@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, True, "1", None, SMALLEST / 2, LARGEST * 2])
def test_other_numbers_are_not_positive(value: object) -> None:
    with pytest.raises(OptionError, match=r"x = .*: expected a (finite )?number"):
        require_positive("x", value)


def test_between_includes_its_ends_but_an_open_one() -> None:
    require_between("x", 0, 0, 1)
    require_between("x", 1, 0, 1)
    for value, open_high in ((1, True), (1.5, False), (-0.1, False), (math.nan, False), (True, False)):
        with pytest.raises(OptionError, match="x = "):
            require_between("x", value, 0, 1, open_high=open_high)


def test_counts_are_integers_in_range() -> None:
    require_count("n", 1)
    require_count("n", 0, 0, 3)
    for value in (0, 1.0, True, "1"):
        with pytest.raises(OptionError, match="expected an integer >= 1"):
            require_count("n", value)
    with pytest.raises(OptionError, match="n = 4: expected an integer >= 0 and <= 3"):
        require_count("n", 4, 0, 3)


@pytest.mark.parametrize(
    ("text", "expected"), [("64000000", 64_000_000), ("64 MB", 64_000_000), ("1.5KiB", 1536), (" 2gib ", 2 * 2**30)]
)
def test_bytes_with_units(text: str, expected: int) -> None:
    assert parse_bytes("memory", text) == expected


@pytest.mark.parametrize("text", ["", "0", "MB", "-1MB", "1XB", "1e6"])
def test_other_texts_are_no_bytes(text: str) -> None:
    with pytest.raises(OptionError, match="expected bytes, as 64MB"):
        parse_bytes("memory", text)
