"""When a run has diverged, and what to do about it: return to the best state, go on with a smaller step.

Loss is judged only where it is measured, on the server's own data every so many rounds, so that clients tell
nothing more. Which state is best follows from the metrics alone; what was done about it is in the journal's rows
(``restores``, ``rollbacks``), and replay decides nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import msgspec

from baffle.core.checks import keep_floats, require_between, require_count, require_positive
from baffle.errors import OptionError


class Guard(msgspec.Struct, frozen=True, tag="guard"):
    """Watch for divergence.

    A run has diverged if its loss was above ``factor`` times its best, and above that of the first evaluation, for
    ``patience`` evaluations in a row; if its loss is not finite; or if an update would bring a weight above
    ``largest``. Then it returns to the state of the best evaluation (of the last, without data), and its learning
    rates shrink by ``shrink``: ``rollbacks`` times; once more, and it stops there. ``rollbacks=0`` stops at once.

    Examples:
        >>> watch = Guard(patience=2).watch()
        >>> for round, loss in [(0, 2.3), (10, 0.5), (20, 7.0), (30, 8.0)]:
        ...     watch = watch.see(round, loss)
        >>> watch.diverged, watch.best_round
        (True, 10)
    """

    factor: float = 3.0
    patience: int = 2
    shrink: float = 0.1
    rollbacks: int = 3
    largest: float = 1e6

    def __post_init__(self) -> None:
        keep_floats(self)
        require_positive("guard.factor", self.factor)
        if self.factor < 1:
            raise OptionError("guard.factor", self.factor, "a number >= 1")
        require_count("guard.patience", self.patience)
        require_between("guard.shrink", self.shrink, 0, 1, open_high=True)
        require_positive("guard.shrink", self.shrink)
        require_count("guard.rollbacks", self.rollbacks, 0)
        require_positive("guard.largest", self.largest)

    def watch(self) -> Watch:
        """A watch that has seen nothing."""
        return Watch(self)


@dataclass(frozen=True)
class Watch:
    """What a guard has seen so far: a fold over the evaluations of a run."""

    guard: Guard
    first: float | None = None
    best: float = math.inf
    strikes: int = 0
    best_round: int = -1
    """Round of the best evaluation; without data, of the last."""

    def see(self, round: int, loss: float | None) -> Watch:
        """The watch after an evaluation; None: there is no data to evaluate on."""
        if loss is None:
            return replace(self, best_round=round)
        if self.first is None:
            finite = math.isfinite(loss)
            return replace(self, first=loss if finite else None, best=loss, best_round=round)
        if not math.isfinite(loss):
            return replace(self, strikes=self.guard.patience)
        if loss > max(self.guard.factor * self.best, self.first):
            return replace(self, strikes=self.strikes + 1)
        if loss > self.best:
            return replace(self, strikes=0)
        return replace(self, best=loss, strikes=0, best_round=round)

    def restored(self) -> Watch:
        """The watch after a return to the best state."""
        return replace(self, strikes=0)

    @property
    def diverged(self) -> bool:
        """Whether it is time to go back."""
        return self.strikes >= self.guard.patience
