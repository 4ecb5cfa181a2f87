"""The client: finite differences of the loss."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from baffle.client.respond import check_task, finite_differences
from baffle.core.types import Credit, ParamSpec
from baffle.errors import OptionError
from helpers import TASK


def test_forward_difference_by_hand() -> None:
    losses = np.array([[1, 3], [2, 4], [1, 1]], np.float32)  # baseline, two directions; two examples
    assert finite_differences(TASK, losses).tolist() == [2.0, -2.0]  # mean gap / 0.5


def test_central_difference_by_hand() -> None:
    losses = np.array([[1, 3], [2, 4], [1, 1], [0, 0]], np.float32)  # +, - for each direction
    task = msgspec.structs.replace(TASK, difference="central")
    assert finite_differences(task, losses).tolist() == [-1.0, 1.0]


def test_tiny_gaps_between_large_losses_survive() -> None:
    losses = np.full((2, 1000), 1000.0, np.float32)
    losses[1, 0] = np.nextafter(np.float32(1000), np.float32(2000))
    assert finite_differences(TASK, losses)[0] == pytest.approx(float(losses[1, 0] - np.float32(1000)) / 500, rel=1e-12)


def test_a_task_has_to_be_about_the_models_units() -> None:
    """One whose units were others would leave numbers of a reply unwritten."""
    table = (
        ParamSpec("w", (3, 2), 0, credit=Credit(0, "rows")),
        ParamSpec("head", (2, 3), 6, credit=Credit(1, "exact")),
    )
    task = msgspec.structs.replace(TASK, num_directions=2, slices=2, unit_sizes=(12, 6), exponents=(-8, -8))
    check_task(task, table)
    for sizes in ((), (12,), (6, 12), (6, 6)):
        with pytest.raises(OptionError, match=r"unit_sizes = .*: expected \(12, 6\), for this model"):
            check_task(msgspec.structs.replace(task, unit_sizes=sizes), table)
    with pytest.raises(OptionError, match=r"exponents = \(-8,\): expected 2, one for each unit"):
        check_task(msgspec.structs.replace(task, exponents=(-8,)), table)
    with pytest.raises(OptionError, match=r"unit_sizes = \(12, 6\): expected \(4,\)"):
        check_task(task, (ParamSpec("w", (3, 2), 0),))
