"""LeNet of the paper (BAFFLE, arXiv 2301.12195, section 4; after LeCun et al. 1998), and one for small images."""

from __future__ import annotations

from torch import nn

from baffle.errors import ModelError
from baffle.models.parts import ACTIVATIONS, norm_of


def lenet(shape: tuple[int, ...], classes: int, activation: str = "hardswish", norm: str = "none") -> nn.Sequential:
    """Two 5 x 5 convolutions (16, 64), a max-pooling by 2 between them, global average pooling, a linear layer.

    26,730 parameters for ten classes of grey images and 27,530 for colour, whatever their size.

    Examples:
        >>> [sum(p.numel() for p in lenet((c, 28, 28), 10).parameters()) for c in (1, 3)]
        [26730, 27530]
    """
    channels, _, _ = _images("lenet", shape, smallest=2)
    return nn.Sequential(
        *_convolutions(channels, activation, norm),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, classes),
    )


def lenet_small(
    shape: tuple[int, ...], classes: int, activation: str = "hardswish", norm: str = "none"
) -> nn.Sequential:
    """The same convolutions with a second pooling and no averaging: learns 8 x 8 digits faster.

    28,650 parameters on digits; they grow with the image.

    Examples:
        >>> sum(p.numel() for p in lenet_small((1, 8, 8), 10).parameters())
        28650
    """
    channels, height, width = _images("lenet-small", shape, smallest=4)
    return nn.Sequential(
        *_convolutions(channels, activation, norm),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * (height // 4) * (width // 4), classes),
    )


def _convolutions(channels: int, activation: str, norm: str) -> list[nn.Module]:
    return [
        nn.Conv2d(channels, 16, 5, padding=2),
        norm_of(norm, 16),
        ACTIVATIONS[activation](),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 64, 5, padding=2),
        norm_of(norm, 64),
        ACTIVATIONS[activation](),
    ]


def _images(name: str, shape: tuple[int, ...], smallest: int) -> tuple[int, int, int]:
    if len(shape) != 3 or min(shape[1:]) < smallest:
        raise ModelError(
            f"{name}: examples of shape {shape}: expected (channels, height >= {smallest}, width >= {smallest})"
        )
    return shape[0], shape[1], shape[2]
