"""The divergence guard: when a run has diverged, and how to continue: from the best state, with a smaller step.

The loss is judged only where it is measured: on the server's own data, at the evaluations, so that clients report
nothing more. Which state is best follows from the metrics alone. What was done about a divergence is recorded in the
journal's rows (``restores``, ``rollbacks``), so replay decides nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import msgspec

from baffle.core.checks import keep_floats, require_between, require_count, require_positive
from baffle.errors import OptionError


class Guard(msgspec.Struct, frozen=True, tag="guard"):
    """When a run counts as diverged, and how often it may roll back.

    A run has diverged if its loss was above ``factor`` times the best one, and above that of the first evaluation, for
    ``patience`` evaluations in a row; if its loss is not finite; or if an update would bring a weight above
    ``largest``. It then returns to the state of the best evaluation (without data: of the last one), and its learning
    rates are multiplied by ``shrink``. After ``rollbacks`` such returns, the next divergence ends the run in that best
    state.

    Attributes:
        factor: how far above the best loss is too far; at least 1.
        patience: evaluations in a row that must be too far above.
        shrink: factor of the learning rates at each rollback, between 0 and 1.
        rollbacks: how many rollbacks a run may take; 0 stops at the first divergence.
        largest: magnitude that no weight may exceed.

    Raises:
        OptionError: an option is out of range.

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
        """A watch that has not seen an evaluation yet."""
        return Watch(self)


@dataclass(frozen=True)
class Watch:
    """What a guard has seen so far: a fold over the evaluations of a run.

    Attributes:
        guard: the options.
        first: loss of the first evaluation, if it was finite.
        best: lowest loss so far.
        strikes: evaluations in a row whose loss was too high.
        best_round: round of the best evaluation (without data: of the last one), which a rollback returns to; -1 before
            the first evaluation.
    """

    guard: Guard
    first: float | None = None
    best: float = math.inf
    strikes: int = 0
    best_round: int = -1

    def see(self, round: int, loss: float | None) -> Watch:
        """The watch after the evaluation of a round. ``loss`` is None if there are no data to evaluate on."""
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
        """The watch after a rollback to the best state: the strikes are forgotten, the best loss is not."""
        return replace(self, strikes=0)

    @property
    def diverged(self) -> bool:
        """Whether the run has diverged and should roll back."""
        return self.strikes >= self.guard.patience
