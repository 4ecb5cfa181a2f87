"""The models' forward passes again, in numpy and float64: slow and obvious. Parameters by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
from scipy.special import erf  # type: ignore[import-untyped]  # ships no types

Array = npt.NDArray[np.float64]
Parameters = Mapping[str, Array]
Function = Callable[[Array], Array]

GROUPS = {16: 2, 32: 2, 64: 4, 128: 8, 200: 10}
"""Channels -> groups of a GroupNorm, as written down by hand."""


def selu(x: Array) -> Array:
    scale, alpha = 1.0507009873554804934193349852946, 1.6732632423543772848170429916717
    return np.asarray(scale * np.where(x > 0, x, alpha * (np.exp(np.minimum(x, 0)) - 1)))


ACTIVATIONS: dict[str, Function] = {
    "hardswish": lambda x: x * np.clip(x + 3, 0, 6) / 6,
    "relu": lambda x: np.maximum(x, 0),
    "selu": selu,
    "gelu": lambda x: np.asarray(x * (1 + erf(x / np.sqrt(2))) / 2),
}


def group_norm(x: Array) -> Array:
    """[n, channels, ...] -> mean 0 and variance 1 over each example's groups of channels."""
    count, channels = x.shape[:2]
    out = np.empty_like(x)
    size = channels // GROUPS[channels]
    for i in range(count):
        for start in range(0, channels, size):
            group = x[i, start : start + size]
            out[i, start : start + size] = (group - group.mean()) / np.sqrt(group.var() + 1e-5)
    return out


def layer_norm(x: Array) -> Array:
    return np.asarray((x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5))


def unchanged(x: Array) -> Array:
    return x


NORMS: dict[str, Function] = {"group": group_norm, "none": unchanged}


def convolution(x: Array, weight: Array, bias: Array | None = None, stride: int = 1, padding: int = 0) -> Array:
    """[n, in, h, w] and [out, in, k, k] -> [n, out, h', w'], one output pixel at a time."""
    size = weight.shape[2]
    padded = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    height, width = ((side - size) // stride + 1 for side in padded.shape[2:])
    out = np.empty((len(x), len(weight), height, width))
    for row in range(height):
        for column in range(width):
            top, left = row * stride, column * stride
            window = padded[:, :, top : top + size, left : left + size]
            out[:, :, row, column] = np.einsum("ncij,ocij->no", window, weight)
    return out if bias is None else out + bias[:, None, None]


def max_pool(x: Array) -> Array:
    """The largest of each 2 x 2 pixels; an odd last row or column is left out."""
    out = np.empty((*x.shape[:2], x.shape[2] // 2, x.shape[3] // 2))
    for row in range(out.shape[2]):
        for column in range(out.shape[3]):
            out[:, :, row, column] = x[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].max((2, 3))
    return out


def linear(x: Array, p: Parameters, name: str) -> Array:
    return np.asarray(x @ p[f"{name}.weight"].T + p[f"{name}.bias"])


def lenet_features(p: Parameters, x: Array, activation: str, norm: str) -> Array:
    act, normalise = ACTIVATIONS[activation], NORMS[norm]
    x = max_pool(act(normalise(convolution(x, p["0.weight"], p["0.bias"], padding=2))))
    return act(normalise(convolution(x, p["4.weight"], p["4.bias"], padding=2)))


def lenet(p: Parameters, x: Array, activation: str, norm: str) -> Array:
    return linear(lenet_features(p, x, activation, norm).mean((2, 3)), p, "9")


def lenet_small(p: Parameters, x: Array, activation: str, norm: str) -> Array:
    return linear(max_pool(lenet_features(p, x, activation, norm)).reshape(len(x), -1), p, "9")


def mlp(p: Parameters, x: Array, activation: str, norm: str) -> Array:
    act, normalise = ACTIVATIONS[activation], NORMS[norm]
    hidden = act(normalise(linear(x.reshape(len(x), -1), p, "1")))
    return linear(act(normalise(linear(hidden, p, "4"))), p, "7")


def wrn_10_2(p: Parameters, x: Array, activation: str, norm: str) -> Array:
    act, normalise = ACTIVATIONS[activation], NORMS[norm]
    x = convolution(x, p["0.weight"], p["0.bias"], padding=1)
    for unit, stride in (("1", 1), ("2", 2), ("3", 2)):
        first = convolution(act(normalise(x)), p[f"{unit}.residual.2.weight"], stride=stride, padding=1)
        second = convolution(act(normalise(first)), p[f"{unit}.residual.5.weight"], padding=1)
        x = second + convolution(act(normalise(x)), p[f"{unit}.shortcut.2.weight"], stride=stride)
    return linear(act(normalise(x)).mean((2, 3)), p, "8")


def transformer(p: Parameters, x: Array, activation: str, norm: str) -> Array:
    """One example after another, one head after another; tokens of a text that are 0 behind the first are left out."""
    act, normalise = ACTIVATIONS[activation], layer_norm if norm == "group" else unchanged
    width, heads = p["positions"].shape[1], 4
    size = width // heads
    logits = []
    for example in x:
        embedded, present = _embed(p, example)
        h = (embedded + p["positions"])[present]
        for block in ("blocks.0", "blocks.1"):
            qkv = linear(normalise(h), p, f"{block}.qkv")
            attended = np.empty_like(h)
            for head in range(heads):
                mine = slice(head * size, (head + 1) * size)
                q, k, v = (qkv[:, part * width : (part + 1) * width][:, mine] for part in range(3))
                weight = np.exp(q @ k.T / np.sqrt(size))
                attended[:, mine] = weight / weight.sum(1, keepdims=True) @ v
            h = h + linear(attended, p, f"{block}.mix")
            h = h + linear(act(linear(normalise(h), p, f"{block}.perceptron.1")), p, f"{block}.perceptron.3")
        logits.append(linear(normalise(h).mean(0), p, "head"))
    return np.stack(logits)


def _embed(p: Parameters, example: Array) -> tuple[Array, list[int]]:
    """An example's tokens [tokens, width], and those that are there."""
    if example.ndim == 1:
        present = [i for i, token in enumerate(example) if token != 0 or i == 0]
        return np.stack([p["embed.weight"][int(token)] for token in example]), present
    if example.ndim == 2:
        return linear(example, p, "embed"), list(range(len(example)))
    size = p["embed.weight"].shape[2]
    patches = [
        np.einsum("cij,ocij->o", example[:, i : i + size, j : j + size], p["embed.weight"]) + p["embed.bias"]
        for i in range(0, example.shape[1] - size + 1, size)
        for j in range(0, example.shape[2] - size + 1, size)
    ]
    return np.stack(patches), list(range(len(patches)))
