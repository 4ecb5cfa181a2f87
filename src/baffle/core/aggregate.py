"""Aggregation of the clients' integers: check each reply, sum them, and choose the next round's scale.

Numbers travel as integers in units of a power of two, 2**exponent (``docs/design.md``, section 3), each unit's on a
scale of its own. Clients tell how large they were, so the next exponents follow from the last row alone, and replay
needs no other record.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import numpy as np

from baffle.core.checks import require_count
from baffle.core.credit import sizes_of
from baffle.core.scalars import MAGNITUDE_UNITS, MOST_MAGNITUDE
from baffle.core.types import (
    MOST_BITS,
    Aggregate,
    Cohort,
    Integers,
    Reply,
    Row,
    Table,
    Task,
    limit_of,
    packed_size,
    unpack,
)
from baffle.errors import PlanError, ReplyError

FIRST_EXPONENT = -8
"""Scale of round 0: range +-64, resolution 1/256. It only has to be near enough to measure with."""
FEWEST_NEIGHBOURS = 4
"""Neighbours that a client in a secure sum needs at least. With two or three, a few dropped clients can split the
circle of clients into parts, and the server would learn each part's sum."""
_MEASURING_ROUNDS = 4  # the scale is measured in at most this many rounds
_LOW = 15
"""Bits of the lower part of a magnitude in a secure sum: with 2**17 participants its sum has 32."""


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
        vectors = np.stack([check_reply(task, cohort, r) * r.weight for r in ordered])
        return Aggregate(
            vectors=vectors.sum(axis=0, keepdims=True) if task.sharing == "shared" else vectors,
            participants=tuple(r.client for r in ordered),
            weight_sum=sum(r.weight for r in ordered),
            magnitudes=tuple(map(sum, zip(*(r.magnitudes for r in ordered), strict=True))),
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
        if replies.vectors.shape != (1, task.local_steps, task.numbers) or largest > task.limit * weights:
            raise ReplyError(f"round {task.round}: a sum with {largest}: expected at most {task.limit} x {weights}")
        check_magnitudes(task, replies.magnitudes, weights, f"round {task.round}")
        return replies

    def check(self, scalars: int, participants: int, word: int = MOST_BITS) -> None:
        """Refuse a round whose sums or counts could overflow, or that is too small to hide anyone.

        Args:
            scalars: numbers per client: those of a reply times local steps.
            participants: clients in the round.
            word: bits that the largest possible sum needs (:func:`word_bits`).

        Raises:
            PlanError: a word would need more than 32 bits, the sum over clients of ``clipped`` or ``nonfinite`` could
                reach 2**32, or there are fewer participants than the minimum.
        """
        if word > MOST_BITS:
            raise PlanError(
                f"sums of {word} bits with a secure sum: expected at most {MOST_BITS}; use fewer bits or participants"
            )
        if participants < self.minimum:
            raise PlanError(
                f"{participants} participants with secure_sum.minimum = {self.minimum}: expected at least as many"
            )
        if scalars * participants >= 2**32:
            raise PlanError(
                f"{scalars} scalars of {participants} participants with a secure sum: their counts could reach 2**32: "
                "expected fewer"
            )


def word_bits(bits: int, weight_sum: int) -> int:
    """The bits of a word that holds any sum of numbers of ``bits`` bits, with weights that sum to ``weight_sum``.

    Examples:
        >>> [word_bits(bits, weight_sum=320) for bits in (1, 4, 15)]
        [10, 13, 24]
    """
    return (limit_of(bits) * weight_sum).bit_length() + 1


def counts_of(reply: Reply) -> tuple[int, ...]:
    """What a client adds to a secure sum beside its integers: weight, two counts, and the magnitudes.

    Words of the sum have 32 bits, and sums of magnitudes can have more: each is added as its lowest 15 bits and the
    rest, whose sums fit whatever the cohort.

    Examples:
        >>> counts_of(Reply(round=1, client=0, weight=3, scalars=b"", magnitudes=(70000,), clipped=1, nonfinite=0))
        (3, 1, 0, 4464, 2)
    """
    halves = (half for m in reply.magnitudes for half in (m & (1 << _LOW) - 1, m >> _LOW))
    return (reply.weight, reply.clipped, reply.nonfinite, *halves)


def weighted(task: Task, reply: Reply) -> Integers:
    """What a client adds to a secure sum: weight x integer, int64[local_steps x numbers]."""
    return unpack(reply.scalars, task.bits, task.local_steps * task.numbers) * reply.weight


def number_of_counts(task: Task) -> int:
    """How many counts a client adds to a secure sum (:func:`counts_of`)."""
    return 3 + 2 * len(task.sizes)


def summed(task: Task, values: Integers, counts: Sequence[int], participants: tuple[int, ...]) -> Aggregate:
    """A secure sum as an aggregate: int64[local_steps x numbers], and the sums of the clients' ``counts_of``."""
    weight, clipped, nonfinite, *halves = counts
    magnitudes = tuple(low + (high << _LOW) for low, high in zip(halves[::2], halves[1::2], strict=True))
    vectors = values.reshape(1, task.local_steps, task.numbers)
    return Aggregate(vectors, participants, weight, magnitudes, clipped, nonfinite)


def nothing(task: Task) -> Aggregate:
    """The aggregate of a void round, in which no sum could be made.

    Every scalar counts as not finite, so that the round's row is not applied, and the scale stays.
    """
    return Aggregate(
        vectors=np.zeros((1, task.local_steps, task.numbers), np.int64),
        participants=(),
        weight_sum=1,
        magnitudes=(0,) * len(task.sizes),
        clipped=0,
        nonfinite=task.local_steps * task.numbers,
    )


def check_reply(task: Task, cohort: Cohort, reply: Reply) -> Integers:
    """Check one client's reply and decode its integers.

    Args:
        task: what the client was asked.
        cohort: the round's participants and their weights.
        reply: the reply.

    Returns:
        The integers, not multiplied by the weight, int64[local_steps, numbers].

    Raises:
        ReplyError: the reply does not fit; the message names the client and what is wrong.
    """
    where = f"round {task.round}, client {reply.client}"
    count = task.local_steps * task.numbers
    if reply.round != task.round:
        raise ReplyError(f"{where}: reply to round {reply.round}: expected round {task.round}")
    if reply.client not in cohort:
        raise ReplyError(f"{where}: was not asked: expected one of the round's {len(cohort)} participants")
    if reply.weight != cohort[reply.client]:
        raise ReplyError(f"{where}: weight = {reply.weight}: expected {cohort[reply.client]}")
    if len(reply.scalars) != packed_size(count, task.bits):
        raise ReplyError(f"{where}: {len(reply.scalars)} bytes of scalars: expected {packed_size(count, task.bits)}")
    values = unpack(reply.scalars, task.bits, count)
    if values.size and int(np.abs(values).max()) > task.limit:
        raise ReplyError(f"{where}: scalar {int(np.abs(values).max())}: expected at most {task.limit}")
    check_magnitudes(task, reply.magnitudes, reply.weight, where)
    if not (0 <= reply.clipped <= count and 0 <= reply.nonfinite <= count):
        raise ReplyError(f"{where}: clipped = {reply.clipped}, nonfinite = {reply.nonfinite}: expected 0..{count}")
    return values.reshape(task.local_steps, task.numbers)


def check_magnitudes(task: Task, magnitudes: Sequence[int], weight: int, where: str) -> None:
    """Raise ReplyError unless there is one magnitude for each unit, in range."""
    if len(magnitudes) != len(task.sizes) or any(not 0 <= m <= weight * MOST_MAGNITUDE for m in magnitudes):
        raise ReplyError(
            f"{where}: magnitudes {tuple(magnitudes)}: expected {len(task.sizes)} of 0 to {MOST_MAGNITUDE} x its weight"
        )


def scalar_rms(row: Row) -> float:
    """Root mean square of the first unit's aggregated numbers: derivatives of the clients' mean loss."""
    weight = row.weight_sum if row.sharing == "shared" else row.weight_sum / max(1, len(row.participants))
    numbers = row.integers.astype(np.float64)
    rms = math.sqrt(float((numbers**2).mean())) if numbers.size else 0.0
    return rms / max(weight, 1) * 2.0 ** row.exponents[0]


def typical_magnitudes(row: Row) -> list[float]:
    """Mean magnitude of the clients' numbers of each unit, in units of 2**exponent."""
    return [m / MAGNITUDE_UNITS for m in row.magnitudes]


def target_magnitude(bits: int) -> float:
    """The mean magnitude, in units, at which numbers of so many bits lose the least to rounding and clipping.

    For normal numbers; with more bits there is more room for heavier tails (rank-1 directions: kurtosis up to 9).

    Examples:
        >>> [round(target_magnitude(bits), 1) for bits in (1, 2, 4, 8, 15)]
        [1.0, 0.6, 2.6, 22.7, 868.9]
    """
    return 1.0 if bits == 1 else 0.6 * limit_of(bits) ** 0.75


def clipped_share(row: Row) -> float:
    """Share of the clients' numbers that were clipped."""
    return row.clipped / max(1, row.integers[0].size * len(row.participants)) if len(row.integers) else 0.0


def next_exponents(table: Table, bits: int, last: Row | None, clip: float | None = None) -> tuple[int, ...]:
    """The exponents of the powers of two in whose units the next round encodes the numbers, unit by unit.

    It aims at integers with a mean magnitude of ``target_magnitude``.

    Args:
        last: the last round's row; None before round 0.
        clip: the clients' clipping norm. The range is never wider than it needs: scalars that were clipped to the
            norm do not call for a wider one.
    """
    if last is None:
        return (FIRST_EXPONENT,) * len(sizes_of(table, 1))
    widest = 60 if clip is None else math.ceil(math.log2(clip / limit_of(bits)))
    # all rounded to nothing: far too coarse, unless no client answered or the numbers were not finite
    too_coarse = -8 if last.participants and not last.nonfinite else 0
    exponents = []
    for exponent, magnitude in zip(last.exponents, typical_magnitudes(last), strict=True):
        shift = round(math.log2(magnitude / target_magnitude(bits))) if magnitude > 0 else too_coarse
        exponents.append(max(-60, min(60, widest, exponent + shift)))
    return tuple(exponents)


def measures_scale(last: Row | None, bits: int) -> bool:
    """Whether the next round only measures the scale of the numbers, and its row is not applied.

    Round 0 does; up to three more do while the scale of some unit is off by far.
    """
    if last is None:
        return True
    if last.applied or last.round + 1 >= _MEASURING_ROUNDS:
        return False
    target, measured = target_magnitude(bits), [m for m in typical_magnitudes(last) if m]
    return not measured or any(not target / 64 < m < target * 4 for m in measured)  # none: a void round, say
