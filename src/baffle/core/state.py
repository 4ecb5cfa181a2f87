"""The state of training: weights, optimizer slots, evaluation weights; its hashes; and one update by a gradient."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np

from baffle.core import optim
from baffle.core.optim import Slots
from baffle.core.types import (
    Weights,
)
from baffle.errors import DivergedError


@dataclass(frozen=True, eq=False)
class State:
    """Where training stands: replay state (weights, slots, step), the evaluation average, the next round."""

    round: int
    step: int
    weights: Weights
    slots: Slots
    ema_weights: Weights


def weights_sha256(weights: Weights) -> bytes:
    """SHA-256 of the flat weights as little-endian float32."""
    return hashlib.sha256(weights.astype("<f4", copy=False).tobytes()).digest()


def state_sha256(state: State) -> bytes:
    """SHA-256 of the replay state: hash of the weights, slots in the order of their names, step (8 bytes)."""
    digest = hashlib.sha256(weights_sha256(state.weights))
    for name in sorted(state.slots):
        digest.update(state.slots[name].astype("<f4", copy=False).tobytes())
    digest.update(state.step.to_bytes(8, "little"))
    return digest.digest()


def descend(
    state: State,
    gradient: Weights,
    *,
    round: int,
    rule: str,
    coefficients: optim.Coefficients,
    clip_factor: float,
    ema: float,
    largest: float = math.inf,
) -> State:
    """The state after a round's update by a gradient: clip, optimizer step, average; all element-wise float32.

    Raises DivergedError if a weight would be above ``largest``, or anything NaN or infinite.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        clipped = np.float32(clip_factor) * gradient
        weights, slots = optim.update(rule, state.weights, state.slots, clipped, coefficients)
        average = optim.moving_average(state.ema_weights, weights, ema)
    if not all(np.isfinite(a).all() for a in (weights, average, *slots.values())) or np.abs(weights).max() > largest:
        raise DivergedError(
            f"round {round}: the update (lr = {coefficients['lr']:.3g}) would bring the weights near overflow or to "
            "NaN; it was not applied. Use a smaller lr, or clip_update"
        )
    return State(round + 1, state.step + 1, weights, slots, average)
