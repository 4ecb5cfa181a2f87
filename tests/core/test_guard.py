"""The watch for divergence: when it strikes, and which round it would return to."""

from __future__ import annotations

import math

import pytest

from baffle.core.guard import Guard
from baffle.errors import OptionError


def seen(guard: Guard, *losses: float | None) -> list[tuple[bool, int]]:
    watch, told = guard.watch(), list[tuple[bool, int]]()
    for i, loss in enumerate(losses):
        watch = watch.see(10 * i, loss)
        told.append((watch.diverged, watch.best_round))
        if watch.diverged:
            watch = watch.restored()
    return told


def test_patience_counts_evaluations_in_a_row() -> None:
    guard = Guard(factor=2, patience=2)
    assert seen(guard, 1.0, 0.5, 1.5, 0.9, 1.5, 1.5) == [
        (False, 0),
        (False, 10),
        (False, 10),
        (False, 10),
        (False, 10),
        (True, 10),
    ]


def test_the_state_to_return_to_is_the_best_and_the_later_of_two() -> None:
    assert [good for _, good in seen(Guard(), 1.0, 0.5, 0.6, 0.5, 0.7, 0.4)] == [0, 10, 10, 30, 30, 50]


def test_a_loss_below_the_first_is_no_divergence() -> None:
    assert not any(diverged for diverged, _ in seen(Guard(factor=2, patience=1), 2.3, 0.1, 2.2, 2.3))
    assert seen(Guard(factor=2, patience=1), 2.3, 0.1, 2.4)[-1] == (True, 10)


def test_the_factor_is_of_the_best() -> None:
    assert seen(Guard(factor=3, patience=1), 1.0, 2.9) == [(False, 0), (False, 0)]
    assert seen(Guard(factor=3, patience=1), 1.0, 3.1) == [(False, 0), (True, 0)]


def test_an_infinite_loss_needs_no_patience_but_a_finite_one_before() -> None:
    assert seen(Guard(patience=5), 1.0, math.inf) == [(False, 0), (True, 0)]
    assert seen(Guard(patience=5), math.inf, 2.0, math.inf) == [(False, 0), (False, 10), (True, 10)]


def test_strikes_start_again_after_a_return() -> None:
    assert [d for d, _ in seen(Guard(factor=2, patience=2), 1.0, 9, 9, 9, 9)] == [False, False, True, False, True]


def test_without_data_every_evaluation_is_good() -> None:
    assert seen(Guard(), None, None) == [(False, 0), (False, 10)]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("factor", 0.5),
        ("factor", math.nan),
        ("patience", 0),
        ("shrink", 1.0),
        ("shrink", 0.0),
        ("rollbacks", -1),
        ("largest", 0.0),
        ("largest", math.inf),
    ],
)
def test_bad_guards_are_refused(field: str, value: float) -> None:
    with pytest.raises(OptionError, match=rf"guard\.{field}"):
        Guard(**{field: value})  # type: ignore[arg-type]  # the wrong ones are meant
