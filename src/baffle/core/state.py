"""The state that training carries from round to round, its hashes, and one update by a gradient."""

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
    """Where training stands before a round.

    Attributes:
        round: number of the next round.
        step: number of updates applied so far; fewer than rounds, since not every round is applied.
        weights: trainable parameters, float32[n].
        slots: the optimizer's own state: name -> float32[n].
        ema_weights: exponential moving average of the weights, float32[n]: what is evaluated and exported. Not part of
            the replay state that clients keep, since no update depends on it.
    """

    round: int
    step: int
    weights: Weights
    slots: Slots
    ema_weights: Weights


def weights_sha256(weights: Weights) -> bytes:
    """SHA-256 of the flat weights as little-endian float32."""
    return hashlib.sha256(weights.astype("<f4", copy=False).tobytes()).digest()


def state_sha256(state: State) -> bytes:
    """SHA-256 of the replay state: hash of the weights, slots in the order of their names, step (8 bytes).

    The evaluation average is left out: clients do not keep it.
    """
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
    """The state after a round's update: clip the gradient, take an optimizer step, move the average.

    All of it is element-wise float32 arithmetic in a fixed order, so that every machine gets the same bits.

    Args:
        state: the state before the update.
        gradient: gradient estimate, float32[n].
        round: number of the round.
        rule: name of the update rule (:func:`baffle.core.optim.update`).
        coefficients: the numbers of the update that are not element-wise, each a float32.
        clip_factor: factor that the gradient is multiplied by.
        ema: decay of the moving average at this update.
        largest: magnitude that no weight may exceed.

    Raises:
        DivergedError: a weight would exceed ``largest``, or a number would be NaN or infinite.
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
