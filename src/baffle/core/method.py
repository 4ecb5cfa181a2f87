"""One round of training: plan, the clients' scalars, absorb, row, replay. Pure functions of a state.

BAFFLE (arXiv 2301.12195): client c evaluates its loss L_c at the weights W and at W + sigma d_k, for k = 1..K random
directions, and returns K scalars s_k = (L_c(W + sigma d_k) - L_c(W)) / sigma. The server averages the scalars over
the clients and rebuilds the gradient estimate g = 1/K sum_k s_k d_k (eq. 5). In code, for two clients with one
example each and three weights (round 0 only measures the scale on which scalars are encoded):

    >>> from baffle.client.respond import reply
    >>> from baffle.core.optim import Sgd
    >>> from baffle.core.scalars import encode
    >>> from baffle.core.types import make_table
    >>> targets, table = np.array([[1, -1, 2], [3, -1, 0]]), make_table({"w": (3,)})
    >>> method = Method(num_directions=4, family="rademacher", sigma=2**-10, optimizer=Sgd(lr=0.1), ema=0)
    >>> state, last = method.init(np.zeros(3, np.float32)), None
    >>> for _ in range(60):
    ...     task, cohort = method.plan(state, table, sizes=(1, 1), key=7, last=last)  # server
    ...     replies = []
    ...     for client, weight in cohort.items():  # on the client: forward passes only
    ...         loss = lambda w: ((w - targets[client]) ** 2).sum()
    ...         directions = Directions.of(task, table, client).entries(0, slice(0, task.num_directions))
    ...         s = [(loss(state.weights + task.sigma * d) - loss(state.weights)) / task.sigma for d in directions]
    ...         replies.append(reply(task, client, weight, [encode(task, np.array(s))]))
    ...     row, after = method.absorb(state, table, task, cohort, replies, last)  # server: sum, rebuild g, step
    ...     assert state_sha256(replay(state, table, row)) == row.state_sha256  # anyone: the same bits, from the row
    ...     state, last = after, row
    >>> state.weights.round(2).tolist()  # the mean of the targets minimises the mean loss
    [2.0, -1.0, 1.0]

``absorb`` takes every decision that is not element-wise and records it in the row. ``replay`` applies a row and
decides nothing, so everyone who has the rows gets the same weights, bit for bit.
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
from baffle.core.aggregate import SecureSum, WeightedSum, measures_scale, next_exponents, word_bits
from baffle.core.checks import keep_floats
from baffle.core.credit import is_plain, sizes_of
from baffle.core.directions import Directions
from baffle.core.guard import Guard
from baffle.core.method_checks import check_combinations, check_fields
from baffle.core.optim import Adam, ClipUpdate, Optimizer
from baffle.core.philox import Key, Purpose, generator
from baffle.core.quantize import unscale
from baffle.core.rebuild import FAST, Execution, check_exact, estimate
from baffle.core.scalars import ClipScalars, weight_of
from baffle.core.state import State, descend, state_sha256, weights_sha256
from baffle.core.types import (
    DEFAULT_BITS,
    FEW_BITS,
    MAX_WEIGHT,
    MAX_WEIGHT_OF_FEW_BITS,
    MAX_WEIGHT_SUM,
    MOST_BITS,
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
    bits_of,
    limit_of,
    pack,
)
from baffle.errors import DivergedError, PlanError

FIRST_SIGMA = 1e-3
"""Sigma of a task before one was set or measured."""

Checkpoint: TypeAlias = tuple[Row, State]
"""A round's row and the state after it, to return to if the run diverges."""


class Method(msgspec.Struct, frozen=True, kw_only=True):
    """What is done in a round. ``docs/design.md`` says how to choose.

    Attributes:
        num_directions: K, the number of scalars that each client returns per local step.
        slices: S, into how many parts a client's mini-batch is cut, each with its own K directions: as many passes
            over each example, but S times as many numbers and directions.
        bits: of each number that a client returns, its sign among them, 1 to 32; 1: the sign alone.
        family: distribution of the random directions: ``rank1``, ``rademacher`` or ``gaussian``
            (:mod:`baffle.core.directions`).
        sharing: ``shared``: all clients use the same K directions, so that their scalars can be summed.
            ``per-client``: each client has K directions of its own.
        difference: finite-difference scheme, ``forward`` (K + 1 passes) or ``central`` (2 K passes).
        sigma: step of the finite difference; ``auto``: the clients measure the best one before round 0.
        lattice: perturb matrices on the int8 lattice by 1 to 8 codes (sign directions only); 0: in float, by sigma.
        batch_size: examples in a client's mini-batch; None: all that the client has.
        participation: share of the clients that take part in a round.
        local_steps: SGD steps that a client takes before it replies. With plain ``sgd`` on the server and the default
            ``local_lr`` this is federated averaging (FedAvg).
        local_lr: learning rate of the local steps; None: the server's lr / local_steps.
        client: clipping of each scalar, on the client.
        server: clipping of the gradient estimate, on the server.
        aggregate: ``weighted_sum()``, or ``secure_sum()``: the server learns only the sum over clients (secure
            aggregation).
        optimizer: the server's optimizer, with its learning-rate schedule.
        ema: decay of the exponential moving average of the weights, which is what gets evaluated.
        guard: what to do when the run diverges; None: continue, but stop at NaN and infinity.

    Raises:
        OptionError: an option is out of range or unknown.
        PlanError: two options contradict each other.

    Examples:
        >>> Method(num_directions=200, optimizer=Adam(lr=0.003)).sharing
        'shared'
        >>> Method(num_directions=0)
        Traceback (most recent call last):
        baffle.errors.OptionError: num_directions = 0: expected an integer >= 1 and <= 1048576
    """

    num_directions: int = 100
    slices: int = 1
    bits: int = DEFAULT_BITS
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
        check_fields(self)
        for field in ("client", "server"):  # a list is accepted, but would make the method unhashable
            msgspec.structs.force_setattr(self, field, tuple(getattr(self, field)))
        check_combinations(self)

    def init(self, weights: Weights) -> State:
        """The state before round 0.

        Args:
            weights: initial trainable parameters, float32[n].

        Raises:
            DivergedError: a weight is NaN or infinite.
        """
        start = np.array(weights, np.float32)
        if not np.isfinite(start).all():
            raise DivergedError("initial weights: found NaN or infinity: expected finite numbers")
        return State(0, 0, start, self.optimizer.init(start.size), start)

    def plan(self, state: State, table: Table, sizes: Sequence[int], key: int, last: Row | None) -> tuple[Task, Cohort]:
        """The next round's task, and its participants with their integer weights.

        With sigma "auto" the task repeats the last row's sigma; before round 0 the caller has to replace
        ``FIRST_SIGMA`` in the task by a measured one.

        Args:
            state: the state that the round starts from.
            table: the trainable tensors.
            sizes: number of examples of each client.
            key: the run key, an unsigned 64-bit integer.
            last: the previous round's row; None before round 0.

        Raises:
            PlanError: the sums of some round could be inexact, or a secure sum would be too small to hide anyone.
        """
        participants = max(1, round(self.participation * len(sizes)))
        unit = examples_per_weight(max(sizes), participants, self.bits)
        cohort = {c: weight_of(sizes[c], unit) for c in _choose((key, state.round), len(sizes), participants)}
        # the heaviest cohort that could ever be drawn: refuse before round 0, not in the middle of a run
        heaviest = sum(weight_of(size, unit) for size in heapq.nlargest(participants, sizes))
        total = self.num_directions * self.slices
        check_exact(
            Directions(table, self.family, (key, state.round)), total, self.local_steps, heaviest, limit_of(self.bits)
        )
        sizes_in_reply = sizes_of(table, total)
        self._check_table(table, sizes)
        neighbours, next_cohort = 0, list[int]()
        if isinstance(self.aggregate, SecureSum):
            self.aggregate.check(sum(sizes_in_reply) * self.local_steps, participants, word_bits(self.bits, heaviest))
            neighbours = self.aggregate.neighbours
            next_cohort = _choose((key, state.round + 1), len(sizes), participants)
        # while the scale is measured nothing is clipped but by the range, so that the scalars' true size is seen
        clip = None if measures_scale(last, self.bits) else min((c.limit for c in self.client), default=None)
        previous = FIRST_SIGMA if last is None else last.sigma
        task = Task(
            round=state.round,
            key=key,
            family=self.family,
            sharing=self.sharing,
            difference=self.difference,
            num_directions=self.num_directions,
            sigma=previous if self.sigma == "auto" else self.sigma,
            lattice=self.lattice,
            slices=self.slices,
            bits=self.bits,
            exponents=next_exponents(table, self.bits, last, clip),
            unit_sizes=() if is_plain(table) else sizes_in_reply,
            clip=clip,
            batch_size=self.batch_size,
            local_steps=self.local_steps,
            local_lr=self._local_lr(state.step + 1, self._lr_scale(last)),
            quantum=unit,
            secure=neighbours,
            word=word_bits(self.bits, sum(cohort.values())) if neighbours else MOST_BITS,
            next_cohort=tuple(next_cohort),
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
        checkpoint: Callable[[], Checkpoint] | None = None,
    ) -> tuple[Row, State]:
        """Aggregate the replies, decide every number of the update, apply it: the row and the state after it.

        Args:
            state: the state that the round started from.
            table: the trainable tensors.
            task: what the clients were asked, from :meth:`plan`.
            cohort: the participants and their weights, from :meth:`plan`.
            replies: one reply per client, in any order; a secure sum comes as one ``Aggregate``.
            last: the previous round's row; None in round 0.
            execution: how to compute the rebuild; no choice changes a bit of the result.
            checkpoint: loads the round to return to if the update would bring weights near overflow.

        Raises:
            ReplyError: a reply does not fit the task.
            DivergedError: the update would bring weights near overflow, and there is no checkpoint to return to.
        """
        total = self.aggregate.combine(task, cohort, replies)
        row = self._row(state, task, total, last)
        gradient = _gradient(table, row, state, execution)
        row = msgspec.structs.replace(row, clip_factor=min((c.factor(gradient) for c in self.server), default=1.0))
        try:
            after = _step(state, row, gradient, math.inf if self.guard is None else self.guard.largest)
        except DivergedError:
            if self.guard is None or checkpoint is None:
                raise
            return self.restore(row, checkpoint())
        row = msgspec.structs.replace(
            row, weights_sha256=weights_sha256(after.weights), state_sha256=state_sha256(after)
        )
        return row, after

    def restore(self, row: Row, checkpoint: Checkpoint) -> tuple[Row, State]:
        """Return to a checkpoint in place of a round: the row and state that replace ``row`` and what it led to.

        The new row repeats the checkpoint's row, including its scalars, so that the scale of the next scalars
        is again what it was then.
        """
        then, state = checkpoint
        row = msgspec.structs.replace(
            then, round=row.round, applied=False, restores=state.round - 1, rollbacks=row.rollbacks + 1
        )
        return row, replace(state, round=row.round + 1)

    def _check_table(self, table: Table, sizes: Sequence[int]) -> None:
        """Raise PlanError where a model's credit, or the clients' mini-batches, do not go with the method."""
        smallest = min(min(sizes), self.batch_size or min(sizes))
        if smallest < self.slices:
            raise PlanError(
                f"slices = {self.slices} with a mini-batch of {smallest} examples: expected one in each slice; "
                "use fewer slices or a larger batch_size"
            )
        if not is_plain(table) and self.sharing == "per-client" and self.local_steps > 1:
            raise PlanError("credit other than global with per-client directions and local steps: expected one of them")

    def _row(self, state: State, task: Task, total: Aggregate, last: Row | None) -> Row:
        """The row of a round, but for what depends on the gradient estimate: clip factor and hashes."""
        step = state.step + 1
        count = task.numbers * task.local_steps * len(total.participants)
        common = math.gcd(
            total.weight_sum, int(np.gcd.reduce(total.vectors, axis=None)) if total.vectors.size else 0
        )  # of clients of equal weights
        vectors = total.vectors // common
        bits = bits_of(vectors)
        return Row(
            round=task.round,
            key=task.key,
            applied=not measures_scale(last, self.bits) and total.nonfinite < count,
            restores=None,
            rollbacks=0 if last is None else last.rollbacks,
            family=task.family,
            sharing=task.sharing,
            num_directions=task.num_directions,
            difference=task.difference,
            sigma=task.sigma,
            lattice=task.lattice,
            exponents=task.exponents,
            slices=task.slices,
            local_steps=task.local_steps,
            participants=total.participants,
            weight_sum=total.weight_sum // common,
            numbers=task.numbers,
            bits=bits,
            scalars=pack(vectors, bits),
            magnitudes=tuple(round(m / max(1, total.weight_sum)) for m in total.magnitudes),
            clipped=total.clipped,
            nonfinite=total.nonfinite,
            clip_factor=1.0,
            optimizer=self.optimizer.name,
            coefficients=self.optimizer.coefficients(step, self._lr_scale(last)),
            ema=optim.ema_decay(self.ema, step),
            weights_sha256=b"",
            state_sha256=b"",
        )

    def _lr_scale(self, last: Row | None) -> float:
        """What the rollbacks so far have left of the learning rate."""
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
    """Apply a row to the state before it: the same bits as on the server.

    Args:
        state: the state after the previous row.
        table: the trainable tensors.
        row: the round's row.
        execution: how to compute the rebuild; no choice changes a bit of the result.
        earlier: gives the state after a round; needed only for rows that return to a checkpoint.

    Raises:
        PlanError: the row returns to an earlier round, and ``earlier`` is None.
    """
    if row.restores is not None:
        if earlier is None:
            raise PlanError(f"round {row.round} returns to round {row.restores}: expected the state after that")
        return replace(earlier(row.restores), round=row.round + 1)
    return _step(state, row, _gradient(table, row, state, execution) if row.applied else state.weights)


def examples_per_weight(largest: int, participants: int, bits: int = DEFAULT_BITS) -> int:
    """Examples per unit of weight (``quantum`` in a task): the smallest power of two that keeps sums small enough.

    Each weight must be at most 255 and the sum of a round's weights below 2**17. While no client has more than 255
    examples (and there are at most 514 participants) a weight is the number of examples itself.

    Args:
        largest: examples of the client that has the most.
        participants: number of clients in a round.

    Raises:
        PlanError: there are too many participants for any unit.

    Examples:
        >>> examples_per_weight(255, 10), examples_per_weight(6000, 10)
        (1, 32)
    """
    bound = min(MAX_WEIGHT if bits > FEW_BITS else MAX_WEIGHT_OF_FEW_BITS, MAX_WEIGHT_SUM // participants)
    if bound < 1:
        raise PlanError(f"{participants} participants: expected at most {MAX_WEIGHT_SUM} in a round")
    unit = 1
    while (largest + unit // 2) // unit > bound:
        unit *= 2
    return unit


def _choose(key: Key, clients: int, count: int) -> list[int]:
    """A round's participants, in ascending order."""
    chosen: list[int] = generator(key, Purpose.PARTICIPANTS).choice(clients, size=count, replace=False).tolist()
    return sorted(chosen)


def _gradient(table: Table, row: Row, state: State, execution: Execution) -> Weights:
    """The gradient estimate of a row, before clipping: float32[n]."""
    gradient = estimate(table, row, execution)
    return unscale(table, gradient, state.weights, row.sigma, row.lattice) if row.lattice else gradient


def _step(state: State, row: Row, gradient: Weights, largest: float = math.inf) -> State:
    """The state after a row's update, or, if the row is not applied, the same state one round later."""
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
