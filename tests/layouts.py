"""The obvious form of rounding to a layout, to compare with."""

from __future__ import annotations

import numpy as np
import torch

from baffle.core.quantize import encode
from baffle.runtimes.perturb import AnyArray, Float32, Layout


def rounded(layout: Layout, values: Float32) -> AnyArray:
    """Values [out, ...] in the precision of a layout, by torch and numpy."""
    if layout.scales is not None:
        codes = np.empty((len(values), values.size // len(values)), np.int8)
        encode(values.reshape(codes.shape), layout.scales, codes)
        return codes
    if layout.kind == "bf16":
        return torch.from_numpy(values.copy()).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    if layout.kind == "fp16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).view(np.uint16)
    return values


def settled(layout: Layout, held: AnyArray) -> bytes:
    """The bytes of what a layout holds, with one NaN for all of them."""
    held = np.ascontiguousarray(held).copy()
    if layout.scales is None and layout.kind == "bf16":
        held[np.isnan(widened(held))] = 0x7FC0
    elif layout.scales is None:
        values = held.view(np.float16) if layout.kind == "fp16" else held
        values[np.isnan(values)] = np.nan
    return held.tobytes()


def widened(bits: AnyArray) -> Float32:
    """The float32 of bits of bfloat16."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
