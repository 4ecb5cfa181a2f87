"""Wide residual network WRN-10-2 with GroupNorm, as BAFFLE trains it (arXiv 2301.12195, section 4).

Wide residual networks: Zagoruyko and Komodakis, arXiv 1605.07146. Depth 10 is one unit in each of three stages,
width 2 makes their channels 32, 64 and 128. Every unit changes the number of channels, so every shortcut is a
1 x 1 convolution, with a normalisation and an activation of its own before it.
"""

from __future__ import annotations

from torch import Tensor, nn

from baffle.errors import ModelError
from baffle.models.parts import ACTIVATIONS, norm_of


class Unit(nn.Module):
    """A pre-activation residual unit: two 3 x 3 convolutions, and a 1 x 1 convolution as the shortcut."""

    def __init__(self, channels: int, out: int, stride: int, activation: str, norm: str) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            norm_of(norm, channels),
            ACTIVATIONS[activation](),
            nn.Conv2d(channels, out, 3, stride, padding=1, bias=False),
            norm_of(norm, out),
            ACTIVATIONS[activation](),
            nn.Conv2d(out, out, 3, padding=1, bias=False),
        )
        self.shortcut = nn.Sequential(
            norm_of(norm, channels),
            ACTIVATIONS[activation](),
            nn.Conv2d(channels, out, 1, stride, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Images [n, channels, h, w] -> [n, out, h / stride, w / stride]."""
        sum_: Tensor = self.residual(x) + self.shortcut(x)
        return sum_


def wrn_10_2(shape: tuple[int, ...], classes: int, activation: str = "hardswish", norm: str = "group") -> nn.Sequential:
    """The paper's WRN-10-2: 302,506 parameters for ten classes of grey images, 302,794 for colour images.

    Args:
        shape: (channels, height, width), at least 4 x 4 pixels.
        classes: Number of outputs.
        activation: A name in ``ACTIVATIONS``.
        norm: ``group`` for GroupNorm, or ``none``.

    Raises:
        ModelError: For examples of another shape.

    Examples:
        >>> [sum(p.numel() for p in wrn_10_2((c, 32, 32), 10).parameters()) for c in (1, 3)]
        [302506, 302794]
    """
    if len(shape) != 3 or min(shape[1:]) < 4:
        raise ModelError(f"wrn-10-2: examples of shape {shape}: expected (channels, height >= 4, width >= 4)")
    model = nn.Sequential(
        nn.Conv2d(shape[0], 16, 3, padding=1),
        Unit(16, 32, 1, activation, norm),
        Unit(32, 64, 2, activation, norm),
        Unit(64, 128, 2, activation, norm),
        norm_of(norm, 128),
        ACTIVATIONS[activation](),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, classes),
    )
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_uniform_(module.weight)
        elif isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
            nn.init.zeros_(module.bias)
    return model
