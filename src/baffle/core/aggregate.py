"""Aggregation of the clients' integers: check each reply, sum them, and choose the next round's scale.

Scalars travel as integers in units of a power of two, 2**exponent (``docs/design.md``, section 3). A row's sums show
how large the scalars are, so the next exponent follows from the last row alone, and replay needs no other record.
"""

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
"""Neighbours that a client in a secure sum needs at least. With two or three, a few dropped clients can split the
circle of clients into parts, and the server would learn each part's sum."""
_TARGET_BITS = 10  # log2 of the root mean square of one client's integers; the limit is 16 times that
_MEASURING_ROUNDS = 4  # the scale is measured in at most this many rounds


class WeightedSum(msgspec.Struct, frozen=True, tag="weighted_sum"):
    """Plain sums of the clients' weighted integers; with per-client directions, one vector per client.

    Examples:
        >>> WeightedSum()
        WeightedSum()
    """

    def combine(self, task: Task, cohort: Cohort, replies: Sequence[Reply] | Aggregate) -> Aggregate:
        """Check and sum the replies to one task. The order in which they arrived does not matter.

        Args:
            task: what the clients were asked.
            cohort: the round's participants and their weights.
            replies: one reply per client that answered.

        Raises:
            ReplyError: a reply does not fit the task, two are of one client, or there is none.
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
    """Secure aggregation: the server learns the sum over clients and nothing else (``docs/secure-sum.md``).

    Attributes:
        minimum: the smallest cohort that is summed, at least 2.
        neighbours: the largest number of other clients that a client shares masks with, 4 to 250. In a larger cohort
            the clients form a random regular graph (Bell et al., CCS 2020).

    Raises:
        OptionError: an option is out of range.

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
        """Check a sum that the protocol has produced against the public weights of its participants.

        Args:
            task: what the clients were asked.
            cohort: the round's participants and their weights.
            replies: the sum; one without participants stands for a round in which no sum could be made.

        Raises:
            ReplyError: it cannot be the sum of participants of this round.
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
        """Refuse a round whose counts could overflow, or that is too small to hide anyone.

        Args:
            scalars: scalars per client: K times local steps.
            participants: clients in the round.

        Raises:
            PlanError: the sum over clients of ``clipped`` or ``nonfinite`` could reach 2**32, or there are fewer
                participants than the minimum.
        """
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
    """The aggregate of a void round, in which no sum could be made.

    Every scalar counts as not finite, so that the round's row is not applied, and the scale stays.
    """
    return Aggregate(
        vectors=np.zeros((1, task.local_steps, task.num_directions), np.int64),
        participants=(),
        weight_sum=1,
        clipped=0,
        nonfinite=task.local_steps * task.num_directions,
    )


def check_reply(task: Task, cohort: Cohort, reply: Reply) -> Integers:
    """Check one client's reply and decode its integers.

    Args:
        task: what the client was asked.
        cohort: the round's participants and their weights.
        reply: the reply.

    Returns:
        The weighted scalars, int64[local_steps, K].

    Raises:
        ReplyError: the reply does not fit; the message names the client and what is wrong.
    """
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
    """Root mean square of the aggregated scalars, in the loss's own units: directional derivatives of the mean loss."""
    weight = row.weight_sum if row.sharing == "shared" else row.weight_sum / max(1, len(row.participants))
    return float(np.sqrt(np.mean(row.integers.astype(np.float64) ** 2))) / weight * 2.0**row.exponent


def typical_scalar(row: Row) -> float:
    """Root mean square of one client's unweighted integers, estimated from the row's sums.

    The mean over C clients is as large as one client's scalars if the clients agree, and sqrt(C) times smaller if
    they are independent. The estimate is the geometric mean of both cases: C**(1/4) times the mean's.
    """
    clients = len(row.participants)
    values = row.integers / row.weight_sum
    rms = float(np.sqrt(np.mean(values**2)))
    return rms * (clients**0.25 if row.sharing == "shared" else clients)


def clipped_share(row: Row) -> float:
    """Share of the clients' scalars that were clipped."""
    return row.clipped / (row.num_directions * row.local_steps * max(1, len(row.participants)))


def next_exponent(last: Row | None, clip: float | None = None) -> int:
    """The exponent of the power of two in whose units the next round encodes its scalars.

    It aims at integers with a root mean square of 2**10, and widens the range if scalars were clipped.

    Args:
        last: the last round's row; None before round 0.
        clip: the clients' clipping norm. The range is never wider than it needs: scalars that were clipped to the
            norm do not call for a wider one.
    """
    if last is None:
        return FIRST_EXPONENT
    typical = typical_scalar(last)
    if clipped_share(last) > 0.25:
        shift = 6  # far too narrow: with this much clipped the sums show little of the true size
    elif typical == 0:
        shift = -6 if last.nonfinite == 0 else 0  # all rounded to 0: far too wide, unless they were not finite
    else:
        shift = round(math.log2(typical)) - _TARGET_BITS
        if clipped_share(last) > 0.01:
            shift = max(shift, 1)
    widest = 60 if clip is None else math.ceil(math.log2(clip / LIMIT))
    return max(-60, min(60, widest, last.exponent + shift))


def measures_scale(last: Row | None) -> bool:
    """Whether the next round only measures the scale of the scalars, and its row is not applied.

    Round 0 does; up to three more do while the scale is off by far: over a tenth of the scalars clipped, or integers
    below 8.
    """
    if last is None:
        return True
    if last.applied or last.round + 1 >= _MEASURING_ROUNDS:
        return False
    return clipped_share(last) > 0.1 or typical_scalar(last) < 8
