"""WRN-10-2 starts with the paper's initialisation."""

from __future__ import annotations

import math

from baffle.models import build
from random_models import assert_uniform


def test_wrn_starts_kaiming_uniform_and_xavier_uniform_without_biases() -> None:
    parameters = dict(build("wrn-10-2", (3, 32, 32), 10, seed=4).named_parameters())
    convolutions = {n: p for n, p in parameters.items() if p.ndim == 4}
    assert len(convolutions) == 10
    for weight in convolutions.values():
        _, channels, height, width = weight.shape
        assert_uniform(weight, math.sqrt(6 / (channels * height * width)))
    assert_uniform(parameters["8.weight"], math.sqrt(6 / (128 + 10)))
    assert [n for n, p in parameters.items() if p.ndim == 1] == ["0.bias", "8.bias"]
    assert not parameters["0.bias"].any()
    assert not parameters["8.bias"].any()
