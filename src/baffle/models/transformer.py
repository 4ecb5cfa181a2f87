"""A small transformer encoder for images, sequences of vectors and sequences of tokens.

Vaswani et al., arXiv 1706.03762; images as patches: Dosovitskiy et al., arXiv 2010.11929. Normalisation comes
before attention and perceptron and has no parameters; there is no dropout.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baffle.errors import ModelError
from baffle.models.parts import ACTIVATIONS


class Block(nn.Module):
    """Self-attention, then a perceptron, each on normalised inputs and with a residual connection."""

    def __init__(self, width: int, heads: int, activation: str, norm: str) -> None:
        super().__init__()
        self.heads = heads
        self.norm = _norm(norm, width)
        self.qkv = nn.Linear(width, 3 * width)
        self.mix = nn.Linear(width, width)
        self.perceptron = nn.Sequential(
            _norm(norm, width), nn.Linear(width, 2 * width), ACTIVATIONS[activation](), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Tokens [n, tokens, width] -> the same shape; ``mask`` bool[n, 1, 1, tokens]: True where attended to."""
        n, tokens, width = x.shape
        q, k, v = self.qkv(self.norm(x)).view(n, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.mix(attended.transpose(1, 2).reshape(n, tokens, width))
        sum_: Tensor = x + self.perceptron(x)
        return sum_


class Transformer(nn.Module):
    """Embed, add positions, encode, average over tokens, classify. Token 0 of a text is padding."""

    def __init__(
        self,
        embed: nn.Module,
        tokens: int,
        classes: int,
        width: int,
        depth: int,
        heads: int,
        activation: str,
        norm: str,
    ) -> None:
        super().__init__()
        self.embed = embed
        self.positions = nn.Parameter(0.02 * torch.randn(tokens, width))
        self.blocks = nn.ModuleList(Block(width, heads, activation, norm) for _ in range(depth))
        self.norm = _norm(norm, width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """A batch of images, vectors or tokens -> [n, classes]."""
        text = not x.is_floating_point()
        # the first token always counts as present, so that an empty text has something to attend to
        present = F.pad(x[:, 1:] != 0, (1, 0), value=True) if text else None
        x = self.embed(x)
        if x.ndim == 4:
            x = x.flatten(2).transpose(1, 2)
        x = x + self.positions
        for block in self.blocks:
            x = block(x, None if present is None else present[:, None, None])
        x = self.norm(x)
        pooled = x.mean(1) if present is None else (x * present[..., None]).sum(1) / present.sum(1, keepdim=True)
        logits: Tensor = self.head(pooled)
        return logits


def transformer(
    shape: tuple[int, ...],
    classes: int,
    activation: str = "hardswish",
    norm: str = "group",
    *,
    vocabulary: int | None = None,
    width: int = 64,
    depth: int = 2,
    heads: int = 4,
) -> Transformer:
    """A transformer encoder, by default of two layers with width 64.

    Args:
        shape: (channels, height, width) for images, which become patches of 4 x 4 pixels (2 x 2 if a side is below
            16 pixels); (tokens, features) for vectors, which are mapped linearly; (tokens,) for integer tokens.
        classes: Number of outputs.
        activation: A name in ``ACTIVATIONS``.
        norm: ``group`` for one group per token, which is layer normalisation, or ``none``.
        vocabulary: Number of distinct tokens, for integer tokens.
        width: Features of each token inside the encoder.
        depth: Number of layers.
        heads: Number of attention heads; it divides ``width``.

    Raises:
        ModelError: For examples of another shape.

    Examples:
        >>> sum(p.numel() for p in transformer((1, 28, 28), 10).parameters())
        71306
        >>> transformer((12,), 2, vocabulary=100)(torch.ones(5, 12, dtype=torch.long)).shape
        torch.Size([5, 2])
    """
    embed: nn.Module
    if vocabulary is not None and len(shape) == 1:
        embed, tokens = nn.Embedding(vocabulary, width), shape[0]
        nn.init.normal_(embed.weight, std=0.1)
    elif vocabulary is None and len(shape) == 2:
        embed, tokens = nn.Linear(shape[1], width), shape[0]
    elif vocabulary is None and len(shape) == 3:
        patch = 2 if min(shape[1:]) < 16 else 4
        if min(shape[1:]) < patch:
            raise ModelError(f"transformer: images of shape {shape}: expected at least {patch} x {patch} pixels")
        embed = nn.Conv2d(shape[0], width, patch, patch)
        tokens = (shape[1] // patch) * (shape[2] // patch)
    else:
        kind = "numbers" if vocabulary is None else "tokens"
        raise ModelError(
            f"transformer: {kind} of shape {shape}: expected images (channels, height, width), vectors "
            "(tokens, features), or integer tokens (tokens,)"
        )
    return Transformer(embed, tokens, classes, width, depth, heads, activation, norm)


def _norm(norm: str, width: int) -> nn.Module:
    return nn.LayerNorm(width, elementwise_affine=False) if norm == "group" else nn.Identity()
