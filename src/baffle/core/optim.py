"""Optimizers, schedules and the moving average of the weights: element-wise float32, the same bits on every machine.

Each optimizer has two halves. ``coefficients(step)`` runs once, on the server: it computes every number that is not
element-wise (the step's learning rate, bias corrections), and these go into the journal's row. ``update`` runs on
every machine that replays the row: separate IEEE float32 operations in a fixed order, none of them fused, and no
transcendental function whose last bit depends on the library.

SGD with momentum (Sutskever et al., ICML 2013); Adam (Kingma and Ba, arXiv 1412.6980); AdamW (Loshchilov and
Hutter, arXiv 1711.05101); cosine schedule (arXiv 1608.03983).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import msgspec
import numpy as np

from baffle.core.checks import keep_floats, require_between, require_count, require_positive
from baffle.core.types import Weights

Slots: TypeAlias = dict[str, Weights]
"""The optimizer's own state: name -> float32[n]."""
Coefficients: TypeAlias = dict[str, float]
"""The numbers of an update that are not element-wise, each exactly a float32: name -> value."""


class Constant(msgspec.Struct, frozen=True, tag="constant"):
    """Constant learning rate.

    Examples:
        >>> Constant().factor(1000)
        1.0
    """

    def factor(self, step: int) -> float:
        """Multiplier of the learning rate at update ``step`` (from 1)."""
        return 1.0


class Cosine(msgspec.Struct, frozen=True, tag="cosine"):
    """From 1 down to ``final`` along half a cosine (arXiv 1608.03983, without restarts), after a linear warm-up.

    Attributes:
        rounds: updates until the learning rate has reached ``final``, including the warm-up.
        warmup: updates over which it first rises linearly.
        final: the last factor, from 0 to 1.

    Examples:
        >>> [round(Cosine(rounds=4).factor(s), 3) for s in (1, 3, 5, 9)]
        [1.0, 0.5, 0.0, 0.0]
    """

    rounds: int
    warmup: int = 0
    final: float = 0.0

    def __post_init__(self) -> None:
        keep_floats(self)
        require_count("cosine.rounds", self.rounds)
        require_count("cosine.warmup", self.warmup, 0, self.rounds - 1)
        require_between("cosine.final", self.final, 0, 1)

    def factor(self, step: int) -> float:
        """Multiplier of the learning rate at update ``step`` (from 1)."""
        if step <= self.warmup:
            return step / (self.warmup + 1)
        progress = min(1.0, (step - 1 - self.warmup) / (self.rounds - self.warmup))
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * progress))


class Decay(msgspec.Struct, frozen=True, tag="decay"):
    """Multiply the learning rate by ``gamma`` after every ``every`` updates.

    Examples:
        >>> [Decay(every=2, gamma=0.5).factor(s) for s in (1, 2, 3, 5)]
        [1.0, 1.0, 0.5, 0.25]
    """

    every: int
    gamma: float = 0.1

    def __post_init__(self) -> None:
        keep_floats(self)
        require_count("decay.every", self.every)
        require_between("decay.gamma", self.gamma, 0, 1)

    def factor(self, step: int) -> float:
        """Multiplier of the learning rate at update ``step`` (from 1)."""
        return float(self.gamma ** ((step - 1) // self.every))


Schedule = Constant | Cosine | Decay


class Sgd(msgspec.Struct, frozen=True, tag="sgd"):
    """Stochastic gradient descent: w <- w - lr b with b <- momentum b + g + weight_decay w.

    The momentum is heavy-ball momentum as in PyTorch (Sutskever et al., ICML 2013).

    Attributes:
        lr: learning rate.
        momentum: factor of the previous step, from 0 to below 1.
        weight_decay: factor of the weights that is added to the gradient.
        schedule: factor of the learning rate over the updates.

    Examples:
        >>> sgd, w, g = Sgd(lr=0.5), np.array([1, 2], np.float32), np.array([2, -2], np.float32)
        >>> update("sgd", w, sgd.init(2), g, sgd.coefficients(1))[0].tolist()
        [0.0, 3.0]
    """

    lr: float = 0.1
    momentum: float = 0.0
    weight_decay: float = 0.0
    schedule: Schedule = Constant()

    def __post_init__(self) -> None:
        keep_floats(self)
        require_positive("lr", self.lr)
        require_between("momentum", self.momentum, 0, 1, open_high=True)
        require_between("weight_decay", self.weight_decay, 0, 1000)

    @property
    def name(self) -> str:
        """Name of the update rule in rows."""
        return "sgd"

    def init(self, size: int) -> Slots:
        """Zero slots for ``size`` parameters."""
        return {"momentum": np.zeros(size, np.float32)} if self.momentum else {}

    def coefficients(self, step: int, scale: float = 1.0) -> Coefficients:
        """The numbers of update ``step`` (from 1) that are not element-wise, each a float32."""
        values = {"lr": self.lr * scale * self.schedule.factor(step), "weight_decay": self.weight_decay}
        return _as_float32(values | ({"momentum": self.momentum} if self.momentum else {}))


class Adam(msgspec.Struct, frozen=True, tag="adam"):
    """Adam with bias correction (Kingma and Ba, arXiv 1412.6980, algorithm 1).

    Attributes:
        lr: learning rate.
        beta1: decay of the mean of the gradients.
        beta2: decay of the mean of their squares.
        eps: added to the root of the second, against division by zero.
        weight_decay: factor of the weights that is added to the gradient (L2).
        schedule: factor of the learning rate over the updates.

    Examples:
        >>> adam, w, g = Adam(lr=0.1), np.array([1, 1], np.float32), np.array([3, -7], np.float32)
        >>> w, slots = update("adam", w, adam.init(2), g, adam.coefficients(1))
        >>> w.round(5).tolist()
        [0.8999999761581421, 1.100000023841858]
    """

    lr: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    schedule: Schedule = Constant()

    def __post_init__(self) -> None:
        keep_floats(self)
        require_positive("lr", self.lr)
        require_between("beta1", self.beta1, 0, 1, open_high=True)
        require_between("beta2", self.beta2, 0, 1, open_high=True)
        require_positive("eps", self.eps)
        require_between("weight_decay", self.weight_decay, 0, 1000)

    @property
    def name(self) -> str:
        """Name of the update rule in rows."""
        return "adam"

    def init(self, size: int) -> Slots:
        """Zero slots for ``size`` parameters."""
        return {"m": np.zeros(size, np.float32), "v": np.zeros(size, np.float32)}

    def coefficients(self, step: int, scale: float = 1.0) -> Coefficients:
        """The numbers of update ``step`` (from 1) that are not element-wise, each a float32."""
        return _as_float32(
            {
                "lr": self.lr * scale * self.schedule.factor(step),
                "beta1": self.beta1,
                "beta2": self.beta2,
                "eps": self.eps,
                "correction1": 1 - self.beta1**step,
                "correction2": 1 - self.beta2**step,
                "weight_decay": self.weight_decay,
            }
        )


class AdamW(Adam, frozen=True, tag="adamw"):
    """Adam with decoupled weight decay (arXiv 1711.05101): w shrinks by lr * weight_decay at each update.

    Examples:
        >>> adamw, w = AdamW(lr=0.1, weight_decay=0.5), np.array([1], np.float32)
        >>> update("adamw", w, adamw.init(1), np.zeros(1, np.float32), adamw.coefficients(1))[0].tolist()
        [0.949999988079071]
    """

    weight_decay: float = 0.01

    @property
    def name(self) -> str:
        """Name of the update rule in rows."""
        return "adamw"

    def coefficients(self, step: int, scale: float = 1.0) -> Coefficients:
        """The numbers of update ``step`` (from 1) that are not element-wise, each a float32."""
        shrink = 1 - self.lr * scale * self.schedule.factor(step) * self.weight_decay
        return super().coefficients(step, scale) | _as_float32({"shrink": shrink, "weight_decay": 0.0})


Optimizer = Sgd | Adam | AdamW


def update(
    name: str, weights: Weights, slots: Slots, gradient: Weights, coefficients: Coefficients
) -> tuple[Weights, Slots]:
    """One step of an optimizer; the arguments are left unchanged.

    Args:
        name: name of the rule: ``sgd``, ``adam`` or ``adamw``.
        weights: float32[n].
        slots: the optimizer's state from the previous step.
        gradient: float32[n].
        coefficients: the step's numbers, from the optimizer's ``coefficients``.

    Returns:
        New weights and new slots.
    """
    numbers = {key: np.float32(value) for key, value in coefficients.items()}
    return _RULES[name](weights, slots, gradient, numbers)


def moving_average(previous: Weights, weights: Weights, decay: float) -> Weights:
    """Exponential moving average of the weights: decay * previous + (1 - decay) * weights, in float32."""
    d = np.float32(decay)
    return d * previous + (np.float32(1) - d) * weights


def ema_decay(decay: float, step: int) -> float:
    """The moving average's decay at update ``step``: (1 + t) / (10 + t) until that exceeds ``decay``; a float32.

    The short memory at first keeps the initial weights from dominating the average.
    """
    return float(np.float32(min(decay, (1 + step) / (10 + step))))


class ClipUpdate(msgspec.Struct, frozen=True, tag="clip_update"):
    """Scale the gradient estimate on the server, so that its largest magnitude is at most ``max_norm``.

    BAFFLE's published code clips each client's gradient this way, which is not linear in the clients' scalars.
    Clipping the estimate keeps the sum over clients; the row records its one factor.

    Attributes:
        max_norm: largest magnitude of an entry (infinity norm).

    Examples:
        >>> ClipUpdate(0.5).factor(np.array([0.25, -2.0], np.float32))
        0.25
    """

    max_norm: float

    def __post_init__(self) -> None:
        keep_floats(self)
        require_positive("clip_update.max_norm", self.max_norm)

    def factor(self, gradient: Weights) -> float:
        """The factor that the estimate is multiplied by; a float32 <= 1."""
        largest = float(np.abs(gradient).max(initial=0.0))
        return 1.0 if largest <= self.max_norm else float(np.float32(self.max_norm / largest))


_Numbers: TypeAlias = dict[str, np.float32]
_Rule: TypeAlias = Callable[[Weights, Slots, Weights, _Numbers], tuple[Weights, Slots]]


def _sgd(weights: Weights, slots: Slots, gradient: Weights, c: _Numbers) -> tuple[Weights, Slots]:
    step = gradient + c["weight_decay"] * weights if c["weight_decay"] else gradient
    if "momentum" in c:
        step = c["momentum"] * slots["momentum"] + step
        slots = {"momentum": step}
    return weights - c["lr"] * step, slots


def _adam(weights: Weights, slots: Slots, gradient: Weights, c: _Numbers) -> tuple[Weights, Slots]:
    one = np.float32(1)
    if c["weight_decay"]:
        gradient = gradient + c["weight_decay"] * weights
    m: Weights = c["beta1"] * slots["m"] + (one - c["beta1"]) * gradient
    v: Weights = c["beta2"] * slots["v"] + (one - c["beta2"]) * (gradient * gradient)
    root: Weights = np.sqrt(v / c["correction2"])
    step: Weights = (m / c["correction1"]) / (root + c["eps"])
    base = c["shrink"] * weights if "shrink" in c else weights
    return base - c["lr"] * step, {"m": m, "v": v}


_RULES: dict[str, _Rule] = {"sgd": _sgd, "adam": _adam, "adamw": _adam}
_ADAM = ("lr", "beta1", "beta2", "eps", "correction1", "correction2", "weight_decay")
COEFFICIENTS = {"sgd": ("lr", "weight_decay", "momentum"), "adam": _ADAM, "adamw": (*_ADAM, "shrink")}
"""The names of each rule's coefficients, in the order in which a row holds them; the last may be missing."""


def _as_float32(values: Coefficients) -> Coefficients:
    return {key: float(np.float32(value)) for key, value in values.items()}
