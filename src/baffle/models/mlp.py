"""A multilayer perceptron with two hidden layers."""

from __future__ import annotations

import math

from torch import nn

from baffle.models.parts import ACTIVATIONS, norm_of


def mlp(shape: tuple[int, ...], classes: int, activation: str = "hardswish", norm: str = "none") -> nn.Sequential:
    """A perceptron with hidden layers of 200 and 64 units: 26,514 parameters for digits.

    Args:
        shape: Shape of one example, of any number of dimensions.
        classes: Number of outputs.
        activation: A name in ``ACTIVATIONS``.
        norm: ``group`` for a GroupNorm after each hidden layer, or ``none``.

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
