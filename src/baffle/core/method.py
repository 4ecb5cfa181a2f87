"""The whole chain of one round: plan a task, absorb the replies, replay a row. Pure functions of a state.

``plan`` -> clients -> ``absorb`` -> row. ``absorb`` takes every decision that is not element-wise and writes it
into the row; ``replay`` applies a row and decides nothing, so that whoever has the rows has the same weights,
bit for bit.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal, TypeAlias

import msgspec
import numpy as np

from baffle.core import optim
from baffle.core.aggregate import SecureSum, WeightedSum, calibrates, next_exponent
from baffle.core.checks import keep_floats, require_between, require_count, require_positive
from baffle.core.directions import Directions
from baffle.core.guard import Guard
from baffle.core.optim import Adam, ClipUpdate, Optimizer, Sgd
from baffle.core.philox import Purpose, generator
from baffle.core.quantize import MOST_CODES, unscale
from baffle.core.rebuild import FAST, Execution, check_exact, estimate
from baffle.core.scalars import ClipScalars, weight_of
from baffle.core.state import State, descend, state_sha256, weights_sha256
from baffle.core.types import (
    MAX_WEIGHT,
    MAX_WEIGHT_SUM,
    Aggregate,
    Cohort,
    Difference,
    Family,
    Reply,
    Row,
    Sharing,
    Table,
    Task,
    Weights,
    pack_int32,
)
from baffle.errors import DivergedError, OptionError, PlanError, require_choice

FIRST_SIGMA = 1e-3
"""Sigma where none was given or measured."""


Good: TypeAlias = tuple[Row, State]
"""A round's row and the state after it, to return to."""


class Method(msgspec.Struct, frozen=True, kw_only=True):
    """What is done in a round. See ``docs/design.md`` for how to choose.

    * ``num_directions``: K, the numbers that each client returns.
    * ``family``: ``rank1``, ``rademacher`` or ``gaussian`` directions.
    * ``sharing``: all clients share K directions (their scalars can be summed), or each has its own.
    * ``difference``: ``forward`` (K + 1 passes) or ``central`` (2 K passes).
    * ``sigma``: step of the finite difference; ``auto``: what clients measure to be best before round 0.
    * ``lattice``: perturb matrices on the int8 lattice by so many codes, 1 to 8 (signs only);
      0: in float, by sigma.
    * ``batch_size``: examples of a client's mini-batch; None: all it has.
    * ``participation``: share of the clients that take part in a round.
    * ``local_steps``, ``local_lr``: SGD steps on the client before it replies, and their learning rate; with
      plain ``sgd`` on the server the default lr / local_steps is federated averaging (FedAvg).
    * ``client``, ``server``: clipping of scalars, of the estimate.
    * ``aggregate``: ``weighted_sum()``, or ``secure_sum()``: the server learns the sum alone.
    * ``ema``: decay of the average of the weights that is evaluated.
    * ``guard``: what to do when the run diverges; None: nothing, but NaN and infinity stop it.

    Examples:
        >>> Method(num_directions=0)
        Traceback (most recent call last):
        baffle.errors.OptionError: num_directions = 0: expected an integer >= 1 and <= 1048576
    """

    num_directions: int = 100
    family: Family = "rank1"
    sharing: Sharing = "shared"
    difference: Difference = "forward"
    sigma: float | Literal["auto"] = "auto"
    lattice: int = 0
    batch_size: int | None = 32
    participation: float = 1.0
    local_steps: int = 1
    local_lr: float | None = None
    client: tuple[ClipScalars, ...] = ()
    server: tuple[ClipUpdate, ...] = ()
    aggregate: WeightedSum | SecureSum = WeightedSum()
    optimizer: Optimizer = Adam()
    ema: float = 0.98
    guard: Guard | None = Guard()

    def __post_init__(self) -> None:
        keep_floats(self)
        require_count("num_directions", self.num_directions, 1, 2**20)
        require_choice("family", self.family, ["rank1", "rademacher", "gaussian"])
        require_choice("sharing", self.sharing, ["shared", "per-client"])
        require_choice("difference", self.difference, ["forward", "central"])
        if self.sigma != "auto":
            require_positive("sigma", self.sigma)
        require_count("lattice", self.lattice, 0, MOST_CODES)
        if self.batch_size is not None:
            require_count("batch_size", self.batch_size)
        require_between("participation", self.participation, 0, 1)
        if self.participation == 0:
            raise OptionError("participation", self.participation, "a share of the clients > 0")
        require_count("local_steps", self.local_steps, 1, 2**20)
        if self.local_lr is not None:
            require_positive("local_lr", self.local_lr)
        require_between("ema", self.ema, 0, 1, open_high=True)
        for field in ("client", "server"):  # lists are welcome, tuples are kept
            msgspec.structs.force_setattr(self, field, tuple(getattr(self, field)))
        if self.local_steps > 1 and self.sharing == "per-client":
            raise PlanError("local_steps > 1 with sharing = 'per-client': local steps need directions shared by step")
        if isinstance(self.aggregate, SecureSum) and self.sharing == "per-client":
            raise PlanError("secure_sum with sharing = 'per-client': scalars along different directions have no sum")
        if self.lattice and (self.family == "gaussian" or self.local_steps > 1):
            raise PlanError(
                f"lattice = {self.lattice} with family {self.family!r}, local_steps = {self.local_steps}: expected "
                "rank1 or rademacher, and 1: codes move by whole steps"
            )
        if self.local_steps > 1 and self.local_lr is None and not _is_plain(self.optimizer):
            raise PlanError(
                f"local_steps = {self.local_steps} with optimizer {self.optimizer.name!r}: expected local_lr, the "
                "learning rate of the clients' own steps (only plain sgd has a default)"
            )

    def init(self, weights: Weights) -> State:
        """The state before round 0."""
        start = np.array(weights, np.float32)
        if not np.isfinite(start).all():
            raise DivergedError("initial weights: found NaN or infinity: expected finite numbers")
        return State(0, 0, start, self.optimizer.init(start.size), start)

    def plan(self, state: State, table: Table, sizes: Sequence[int], key: int, last: Row | None) -> tuple[Task, Cohort]:
        """The next round's task, and its participants with their weights, for clients with ``sizes`` examples.

        With sigma "auto" it is the last row's; the first task is to be given one that was measured.
        """
        measured = FIRST_SIGMA if last is None else last.sigma
        count = max(1, round(self.participation * len(sizes)))
        quantum = quantum_for(max(sizes), count)
        cohort = {c: weight_of(sizes[c], quantum) for c in _choose((key, state.round), len(sizes), count)}
        largest = heapq.nlargest(count, sizes)
        heaviest = sum(weight_of(size, quantum) for size in largest)  # of any round: refuse at once
        directions = Directions(table, self.family, (key, state.round))
        check_exact(directions, self.num_directions, self.local_steps, heaviest)
        following: list[int] = []
        if isinstance(self.aggregate, SecureSum):
            self.aggregate.check(self.num_directions * self.local_steps, count)
            following = _choose((key, state.round + 1), len(sizes), count)
        clip = min((c.limit for c in self.client), default=None) if not calibrates(last) else None
        task = Task(
            round=state.round,
            key=key,
            family=self.family,
            sharing=self.sharing,
            difference=self.difference,
            num_directions=self.num_directions,
            sigma=measured if self.sigma == "auto" else self.sigma,
            lattice=self.lattice,
            exponent=next_exponent(last, clip),
            clip=clip,
            batch_size=self.batch_size,
            local_steps=self.local_steps,
            local_lr=self._local_lr(state.step + 1, self._lr_scale(last)),
            quantum=quantum,
            secure=self.aggregate.neighbours if isinstance(self.aggregate, SecureSum) else 0,
            next_cohort=tuple(following),
            state_sha256=state_sha256(state) if last is None else last.state_sha256,
        )
        return task, cohort

    def absorb(
        self,
        state: State,
        table: Table,
        task: Task,
        cohort: Cohort,
        replies: Sequence[Reply] | Aggregate,
        last: Row | None,
        execution: Execution = FAST,
        good: Callable[[], Good] | None = None,
    ) -> tuple[Row, State]:
        """Aggregate the replies, decide every number of the update, apply it: the row and the new state.

        A secure sum comes as one ``Aggregate``.

        An update that would bring weights near overflow is not applied: the row then returns to ``good``.
        Raises ReplyError if a reply does not fit, DivergedError if there is no ``good`` to return to.
        """
        total = self.aggregate.combine(task, cohort, replies)
        step = state.step + 1
        scalars = task.num_directions * task.local_steps * len(total.participants)
        row = Row(
            round=task.round,
            key=task.key,
            applied=not calibrates(last) and total.nonfinite < scalars,
            restores=None,
            rollbacks=0 if last is None else last.rollbacks,
            family=task.family,
            sharing=task.sharing,
            num_directions=task.num_directions,
            difference=task.difference,
            sigma=task.sigma,
            lattice=task.lattice,
            exponent=task.exponent,
            local_steps=task.local_steps,
            participants=total.participants,
            weight_sum=total.weight_sum,
            scalars=pack_int32(total.vectors),
            clipped=total.clipped,
            nonfinite=total.nonfinite,
            clip_factor=1.0,
            optimizer=self.optimizer.name,
            coefficients=self.optimizer.coefficients(step, self._lr_scale(last)),
            ema=optim.average_decay(self.ema, step),
            weights_sha256=b"",
            state_sha256=b"",
        )
        gradient = _gradient(table, row, state, execution)
        factor = min((clip.factor(gradient) for clip in self.server), default=1.0)
        row = msgspec.structs.replace(row, clip_factor=factor)
        try:
            after = _step(state, row, gradient, math.inf if self.guard is None else self.guard.largest)
        except DivergedError:
            if self.guard is None or good is None:
                raise
            return self.restore(row, good())
        row = msgspec.structs.replace(
            row, weights_sha256=weights_sha256(after.weights), state_sha256=state_sha256(after)
        )
        return row, after

    def restore(self, row: Row, good: Good) -> tuple[Row, State]:
        """Instead of ``row``, return to a good round: its own row again, in this round's place.

        With it come that round's scalars, so that the scale of the next ones is what it was.
        """
        then, state = good
        row = msgspec.structs.replace(
            then, round=row.round, applied=False, restores=state.round - 1, rollbacks=row.rollbacks + 1
        )
        return row, replace(state, round=row.round + 1)

    def _lr_scale(self, last: Row | None) -> float:
        return 1.0 if last is None or self.guard is None else self.guard.shrink**last.rollbacks

    def _local_lr(self, step: int, scale: float) -> float:
        if self.local_steps == 1:
            return 0.0
        if self.local_lr is not None:
            return float(np.float32(self.local_lr * scale))
        return float(np.float32(self.optimizer.coefficients(step, scale)["lr"] / self.local_steps))


def replay(
    state: State, table: Table, row: Row, execution: Execution = FAST, earlier: Callable[[int], State] | None = None
) -> State:
    """Apply a row to the state before it. Whoever does this gets the same bits as the server.

    ``earlier`` gives the state after a round, for the rows that return to one.
    """
    if row.restores is not None:
        if earlier is None:
            raise PlanError(f"round {row.round} returns to round {row.restores}: expected the state after that")
        return replace(earlier(row.restores), round=row.round + 1)
    return _step(state, row, _gradient(table, row, state, execution) if row.applied else state.weights)


def quantum_for(largest: int, participants: int) -> int:
    """Examples per unit of weight: the smallest power of two that keeps weights <= 255 and their sum < 2**17.

    With no more than 255 examples a client (and 514 participants) a weight is the number of examples itself.

    Examples:
        >>> quantum_for(255, 10), quantum_for(6000, 10)
        (1, 32)
    """
    bound = min(MAX_WEIGHT, MAX_WEIGHT_SUM // participants)
    if bound < 1:
        raise PlanError(f"{participants} participants: expected at most {MAX_WEIGHT_SUM} in a round")
    quantum = 1
    while (largest + quantum // 2) // quantum > bound:
        quantum *= 2
    return quantum


def _choose(key: tuple[int, int], clients: int, count: int) -> list[int]:
    """A round's participants, in ascending order."""
    chosen: list[int] = generator(key, Purpose.PARTICIPANTS).choice(clients, size=count, replace=False).tolist()
    return sorted(chosen)


def _gradient(table: Table, row: Row, state: State, execution: Execution) -> Weights:
    found = estimate(table, row, execution)
    return unscale(table, found, state.weights, row.sigma, row.lattice) if row.lattice else found


def _step(state: State, row: Row, gradient: Weights, largest: float = math.inf) -> State:
    if not row.applied:
        return replace(state, round=row.round + 1)
    return descend(
        state,
        gradient,
        round=row.round,
        rule=row.optimizer,
        coefficients=row.coefficients,
        clip_factor=row.clip_factor,
        ema=row.ema,
        largest=largest,
    )


def _is_plain(optimizer: Optimizer) -> bool:
    return isinstance(optimizer, Sgd) and optimizer.momentum == 0 and optimizer.weight_decay == 0
