"""The client: finite differences of the loss."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from baffle.client.respond import finite_differences
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
