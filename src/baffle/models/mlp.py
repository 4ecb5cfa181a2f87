"""A perceptron with two hidden layers."""

from __future__ import annotations

import math

from torch import nn

from baffle.models.parts import ACTIVATIONS, norm_of


def mlp(shape: tuple[int, ...], classes: int, activation: str = "hardswish", norm: str = "none") -> nn.Sequential:
    """Hidden layers of 200 and 64: 26,514 parameters on digits; examples of any shape.

    Examples:
        >>> sum(p.numel() for p in mlp((1, 8, 8), 10).parameters())
        26514
    """
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(math.prod(shape), 200),
        norm_of(norm, 200),
        ACTIVATIONS[activation](),
        nn.Linear(200, 64),
        norm_of(norm, 64),
        ACTIVATIONS[activation](),
        nn.Linear(64, classes),
    )
