"""LeNets (and the perceptron) start as PyTorch initialises their layers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from baffle.models import build
from random_models import fresh


@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("lenet", (lambda: nn.Conv2d(3, 16, 5), lambda: nn.Conv2d(16, 64, 5), lambda: nn.Linear(64, 10))),
        ("lenet-small", (lambda: nn.Conv2d(3, 16, 5), lambda: nn.Conv2d(16, 64, 5), lambda: nn.Linear(256, 10))),
        ("mlp", (lambda: nn.Linear(192, 200), lambda: nn.Linear(200, 64), lambda: nn.Linear(64, 10))),
    ],
)
def test_lenets_and_mlp_start_as_pytorch_starts_their_layers(
    name: str, layers: tuple[Callable[[], nn.Module], ...], seed: int
) -> None:
    found, expected = list(build(name, (3, 8, 8), 10, seed).parameters()), fresh(seed, *layers)
    assert [p.shape for p in found] == [p.shape for p in expected]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
