"""The perceptron takes examples of any shape; only its first layer depends on it."""

from __future__ import annotations

import pytest

from baffle.models.mlp import mlp


@pytest.mark.parametrize(("shape", "inputs"), [((64,), 64), ((1, 8, 8), 64), ((3, 5, 2), 30), ((2, 3, 4, 5), 120)])
def test_layers_by_hand(shape: tuple[int, ...], inputs: int) -> None:
    weights = [tuple(p.shape) for name, p in mlp(shape, 7).named_parameters() if name.endswith("weight")]
    assert weights == [(200, inputs), (64, 200), (7, 64)]
