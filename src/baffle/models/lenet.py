"""LeNet of the paper (BAFFLE, arXiv 2301.12195, section 4; after LeCun et al. 1998), and one for small images."""

from __future__ import annotations

from torch import nn

from baffle.errors import ModelError
from baffle.models.parts import ACTIVATIONS, norm_of


def lenet(shape: tuple[int, ...], classes: int, activation: str = "hardswish", norm: str = "none") -> nn.Sequential:
    """The paper's LeNet: two 5 x 5 convolutions with 16 and 64 channels, and a max-pooling by 2 between them.

    They are followed by global average pooling and a linear layer. It has 26,730 parameters for ten classes of grey
    images and 27,530 for colour images, whatever their size.

    Args:
        shape: (channels, height, width), at least 2 x 2 pixels.
        classes: Number of outputs.
        activation: A name in ``ACTIVATIONS``.
        norm: ``group`` for a GroupNorm after each convolution, or ``none``.

    Raises:
        ModelError: For examples of another shape.

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
    """LeNet with a second max-pooling instead of average pooling, which learns 8 x 8 digits faster.

    It has 28,650 parameters for digits, and more for larger images.

    Args:
        shape: (channels, height, width), at least 4 x 4 pixels.
        classes: Number of outputs.
        activation: A name in ``ACTIVATIONS``.
        norm: ``group`` for a GroupNorm after each convolution, or ``none``.

    Raises:
        ModelError: For examples of another shape.

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
