"""Aggregation of the clients' integers: checked, then summed; and the scale that the next round uses."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import numpy as np

from baffle.core.checks import require_count
from baffle.core.types import LIMIT, Aggregate, Cohort, Integers, Reply, Row, Task, unpack_int32
from baffle.errors import PlanError, ReplyError

FIRST_EXPONENT = -8
"""Scale of round 0: range +-64, resolution 1/256. It only has to be near enough to measure with."""
FEWEST_NEIGHBOURS = 4
"""Of a client in a secure sum. With two or three a circle falls apart where clients are lost, and each part has a sum
of its own."""
_TARGET_BITS = 10  # root mean square of one client's integers; the limit is 16 times that
_CALIBRATION_ROUNDS = 4


class WeightedSum(msgspec.Struct, frozen=True, tag="weighted_sum"):
    """Plain sums of the weighted integers; with per-client directions the vectors are kept side by side."""

    def combine(self, task: Task, cohort: Cohort, replies: Sequence[Reply] | Aggregate) -> Aggregate:
        """Sum the replies to one task. The order in which they came does not matter.

        Raises ReplyError if one does not fit the task, or if there is none.
        """
        if isinstance(replies, Aggregate):
            raise ReplyError(f"round {task.round}: a sum: expected the clients' replies")
        if not replies:
            raise ReplyError(f"round {task.round}: no client replied")
        ordered = sorted(replies, key=lambda r: r.client)
        if len({r.client for r in ordered}) < len(ordered):
            raise ReplyError(f"round {task.round}: two replies of one client: expected one each")
        vectors = np.stack([check_reply(task, cohort, r) for r in ordered])
        return Aggregate(
            vectors=vectors.sum(axis=0, keepdims=True) if task.sharing == "shared" else vectors,
            participants=tuple(r.client for r in ordered),
            weight_sum=sum(r.weight for r in ordered),
            clipped=sum(r.clipped for r in ordered),
            nonfinite=sum(r.nonfinite for r in ordered),
        )


class SecureSum(msgspec.Struct, frozen=True, tag="secure_sum"):
    """Sums of which the server sees nothing but the sum (``docs/secure-sum.md``).

    ``minimum``: the smallest cohort that is summed. ``neighbours``: with how many others a client shares masks, at
    most; in a larger cohort they form a random regular graph.

    Examples:
        >>> SecureSum(minimum=1)
        Traceback (most recent call last):
        baffle.errors.OptionError: secure_sum.minimum = 1: expected an integer >= 2
    """

    minimum: int = 3
    neighbours: int = 100

    def __post_init__(self) -> None:
        require_count("secure_sum.minimum", self.minimum, 2)
        require_count("secure_sum.neighbours", self.neighbours, FEWEST_NEIGHBOURS, 250)

    def combine(self, task: Task, cohort: Cohort, replies: Sequence[Reply] | Aggregate) -> Aggregate:
        """The sum that the engine and the clients have made, checked against the public weights of who is in it.

        Raises ReplyError if it is not the sum of participants of this round.
        """
        if not isinstance(replies, Aggregate):
            raise ReplyError(f"round {task.round}: single replies: expected a secure sum")
        if not replies.participants:
            return replies
        weights = sum(cohort.get(client, 0) for client in replies.participants)
        largest = int(np.abs(replies.vectors).max(initial=0))
        if not set(replies.participants) <= cohort.keys() or replies.weight_sum != weights:
            raise ReplyError(f"round {task.round}: a sum of weights {replies.weight_sum}: expected {weights}")
        if replies.vectors.shape != (1, task.local_steps, task.num_directions) or largest > LIMIT * weights:
            raise ReplyError(f"round {task.round}: a sum with {largest}: expected at most {LIMIT} x {weights}")
        return replies

    def check(self, scalars: int, participants: int) -> None:
        """Raise PlanError if a round of so many scalars and participants could overflow, or hide nobody."""
        if participants < self.minimum:
            raise PlanError(
                f"{participants} participants with secure_sum.minimum = {self.minimum}: expected at least as many"
            )
        if scalars * participants >= 2**32:
            raise PlanError(
                f"{scalars} scalars of {participants} participants with a secure sum: their counts could reach 2**32: "
                "expected fewer"
            )


def nothing(task: Task) -> Aggregate:
    """A round that brought nothing usable: no sum could be made."""
    return Aggregate(
        vectors=np.zeros((1, task.local_steps, task.num_directions), np.int64),
        participants=(),
        weight_sum=1,
        clipped=0,
        nonfinite=task.local_steps * task.num_directions,
    )


def check_reply(task: Task, cohort: Cohort, reply: Reply) -> Integers:
    """The reply's integers int64[local_steps, K], or ReplyError naming the client and what is wrong."""
    where = f"round {task.round}, client {reply.client}"
    count = task.local_steps * task.num_directions
    if reply.round != task.round:
        raise ReplyError(f"{where}: reply to round {reply.round}: expected round {task.round}")
    if reply.client not in cohort:
        raise ReplyError(f"{where}: was not asked: expected one of the round's {len(cohort)} participants")
    if reply.weight != cohort[reply.client]:
        raise ReplyError(f"{where}: weight = {reply.weight}: expected {cohort[reply.client]}")
    if len(reply.scalars) != 4 * count:
        raise ReplyError(f"{where}: {len(reply.scalars)} bytes of scalars: expected {4 * count}")
    values = unpack_int32(reply.scalars)
    if values.size and int(np.abs(values).max()) > LIMIT * reply.weight:
        raise ReplyError(f"{where}: scalar {int(np.abs(values).max())}: expected at most {LIMIT} x its weight")
    if not (0 <= reply.clipped <= count and 0 <= reply.nonfinite <= count):
        raise ReplyError(f"{where}: clipped = {reply.clipped}, nonfinite = {reply.nonfinite}: expected 0..{count}")
    return values.reshape(task.local_steps, task.num_directions)


def scalar_rms(row: Row) -> float:
    """Root mean square of the aggregated scalars: derivatives of the mean loss along the directions."""
    weight = row.weight_sum if row.sharing == "shared" else row.weight_sum / max(1, len(row.participants))
    return float(np.sqrt(np.mean(row.integers.astype(np.float64) ** 2))) / weight * 2.0**row.exponent


def typical_scalar(row: Row) -> float:
    """Root mean square of one client's integers, as far as the row tells.

    From a sum over C clients it lies between the mean's and sqrt(C) times that; the geometric middle is taken.
    """
    clients = len(row.participants)
    values = row.integers / row.weight_sum
    rms = float(np.sqrt(np.mean(values**2)))
    return rms * (clients**0.25 if row.sharing == "shared" else clients)


def clipped_share(row: Row) -> float:
    """Share of the clients' scalars that were clipped."""
    return row.clipped / (row.num_directions * row.local_steps * max(1, len(row.participants)))


def next_exponent(last: Row | None, clip: float | None = None) -> int:
    """The power of two on which the next round encodes its scalars, from the last round's sums.

    With a clipping norm the range is never wider than that norm needs: what clients clip themselves says nothing
    about the scale.
    """
    if last is None:
        return FIRST_EXPONENT
    typical = typical_scalar(last)
    if clipped_share(last) > 0.25:
        shift = 6  # far too narrow: the sums say little
    elif typical == 0:
        shift = -6 if last.nonfinite == 0 else 0
    else:
        shift = round(math.log2(typical)) - _TARGET_BITS
        if clipped_share(last) > 0.01:
            shift = max(shift, 1)
    widest = 60 if clip is None else math.ceil(math.log2(clip / LIMIT))
    return max(-60, min(60, widest, last.exponent + shift))


def measures_scale(last: Row | None) -> bool:
    """Whether the next round only measures the scale: round 0 does, and a few more if it missed by far."""
    if last is None:
        return True
    if last.applied or last.round + 1 >= _CALIBRATION_ROUNDS:
        return False
    return clipped_share(last) > 0.1 or typical_scalar(last) < 8
