"""Parts of the models: activations, and GroupNorm without parameters.

BAFFLE (arXiv 2301.12195), section 4, advises Hardswish and GroupNorm. GroupNorm: Wu and He, arXiv 1803.08494.
"""

from __future__ import annotations

from torch import nn

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "hardswish": nn.Hardswish,
    "relu": nn.ReLU,
    "selu": nn.SELU,
    "gelu": nn.GELU,
}
NORMS = ("group", "none")


def groups(channels: int) -> int:
    """The number of groups of a GroupNorm: one per 16 channels, but at least two; it divides ``channels``.

    Examples:
        >>> [groups(c) for c in (16, 64, 128, 200)]
        [2, 4, 8, 10]
    """
    most = max(2, channels // 16)
    return next(g for g in range(min(most, channels), 0, -1) if channels % g == 0)


def norm_of(norm: str, channels: int) -> nn.Module:
    """A GroupNorm without affine parameters for ``group``, or the identity."""
    return nn.GroupNorm(groups(channels), channels, affine=False) if norm == "group" else nn.Identity()
