"""Aggregation: replies are checked and summed, and the sums set the next scale."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np
import pytest

import baffle as bf
from baffle.client.respond import reply
from baffle.core.aggregate import (
    FIRST_EXPONENT,
    SecureSum,
    WeightedSum,
    check_reply,
    clipped_share,
    measures_scale,
    next_exponent,
    nothing,
    typical_scalar,
)
from baffle.core.scalars import Encoded
from baffle.core.types import LIMIT, Aggregate, Reply, Row, pack_int32
from baffle.errors import ReplyError
from helpers import TASK
from secure_helpers import make_replies, make_task

COHORT = {1: 1, 2: 2, 4: 3, 7: 1}


def row(values: list[int], *, clients: int = 1, weight: int = 1, clipped: int = 0, applied: bool = True) -> Row:
    return Row(
        round=3,
        key=1,
        applied=applied,
        restores=None,
        rollbacks=0,
        family="rank1",
        sharing="shared",
        num_directions=len(values),
        difference="forward",
        sigma=0.5,
        lattice=0,
        exponent=-4,
        local_steps=1,
        participants=tuple(range(clients)),
        weight_sum=weight,
        scalars=pack_int32(np.array(values)),
        clipped=clipped,
        nonfinite=0,
        clip_factor=1.0,
        optimizer="sgd",
        coefficients={},
        ema=0.0,
        weights_sha256=b"",
        state_sha256=b"",
    )


def make_reply(client: int, integers: list[int], weight: int = 1, **counts: int) -> Reply:
    return reply(
        TASK, client, weight, [Encoded(np.array(integers), counts.get("clipped", 0), counts.get("nonfinite", 0))]
    )


def test_weighted_sum_by_hand_in_any_order() -> None:
    replies = [make_reply(4, [1, -2], 3, clipped=1), make_reply(2, [10, 5], 2, nonfinite=1)]
    for order in (replies, replies[::-1]):
        total = WeightedSum().combine(TASK, COHORT, order)
        assert total.vectors.tolist() == [[[23, 4]]]  # 3 * 1 + 2 * 10, 3 * -2 + 2 * 5
        assert (total.participants, total.weight_sum, total.clipped, total.nonfinite) == ((2, 4), 5, 1, 1)


def test_vectors_of_own_directions_stay_apart() -> None:
    task = msgspec.structs.replace(TASK, sharing="per-client")
    total = WeightedSum().combine(task, COHORT, [make_reply(4, [1, -2], 3), make_reply(2, [10, 5], 2)])
    assert total.vectors.tolist() == [[[20, 10]], [[3, -6]]]
    assert total.participants == (2, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"round": 2}, "client 7: reply to round 2: expected round 3"),
        ({"weight": 0}, "weight = 0: expected 1"),
        ({"weight": 255}, "weight = 255"),
        ({"client": 3}, "client 3: was not asked"),
        ({"client": -1}, "client -1: was not asked"),
        ({"scalars": b"\0" * 12}, "12 bytes of scalars: expected 8"),
        ({"scalars": b"\0" * 7}, "7 bytes"),
        ({"scalars": pack_int32(np.array([LIMIT + 1, 0]))}, "scalar 16384: expected at most 16383 x its weight"),
        ({"scalars": b"\0\0\0\x80" + b"\0" * 4}, "scalar 2147483648"),
        ({"clipped": 3}, "clipped = 3"),
        ({"nonfinite": -1}, "nonfinite = -1"),
    ],
)
def test_hostile_replies_are_refused_by_name(change: dict[str, object], message: str) -> None:
    good = make_reply(7, [1, 2])
    check_reply(TASK, COHORT, good)
    with pytest.raises(ReplyError, match=message):
        check_reply(TASK, COHORT, msgspec.structs.replace(good, **change))


def test_no_reply_and_two_of_one_client_are_refused() -> None:
    with pytest.raises(ReplyError, match="no client replied"):
        WeightedSum().combine(TASK, COHORT, [])
    with pytest.raises(ReplyError, match="two replies"):
        WeightedSum().combine(TASK, COHORT, [make_reply(1, [1, 1]), make_reply(1, [1, 1])])


def test_first_round_calibrates_on_a_wide_scale() -> None:
    def early(values: list[int], clipped: int = 0) -> Row:
        return msgspec.structs.replace(row(values, applied=False, clipped=clipped), round=0)

    assert next_exponent(None) == FIRST_EXPONENT
    assert measures_scale(None)
    assert not measures_scale(early([1000, -1000]))
    assert measures_scale(early([1, -1]))  # too coarse: measure again
    assert measures_scale(early([1000, -1000], clipped=1))
    assert not measures_scale(msgspec.structs.replace(row([1, -1], applied=False), round=9))  # give up measuring


def test_next_scale_brings_scalars_to_ten_bits() -> None:
    assert next_exponent(row([1024, -1024])) == -4
    assert next_exponent(row([4096, 4096, -4096])) == -2
    assert next_exponent(row([16, 16])) == -10
    assert next_exponent(row([0, 0])) == -10
    assert next_exponent(row([1024, 1024], clipped=1)) == -4 + 6  # half of them clipped


def test_clipping_widens_the_scale_at_least_by_two() -> None:
    values = [100] * 100
    assert next_exponent(row(values, clipped=0)) < -4
    assert next_exponent(row(values, clipped=2)) == -3


def test_sums_over_clients_are_brought_back_to_one_client() -> None:
    many = row([16 * 1024, -16 * 1024], clients=16, weight=16)
    assert typical_scalar(many) == pytest.approx(2 * 1024)  # between 1024 (all agree) and 4096 (all independent)
    own = msgspec.structs.replace(
        many, sharing="per-client", scalars=pack_int32(np.array([5 * 1024] * 32)), weight_sum=80
    )
    assert typical_scalar(own) == pytest.approx(1024)
    assert clipped_share(msgspec.structs.replace(own, clipped=8)) == 0.25


def test_a_sum_must_be_one_of_participants() -> None:
    task, cohort = make_task(2), {1: 3, 4: 5, 6: 2}
    good = Aggregate(np.array([[[-8 * LIMIT, 8 * LIMIT]]]), (1, 4), 8, 0, 0)
    assert SecureSum().combine(task, cohort, good) is good
    assert SecureSum().combine(task, cohort, nothing(task)).participants == ()
    for wrong in (
        replace(good, weight_sum=7),
        replace(good, participants=(1, 5)),
        replace(good, vectors=good.vectors + 1),
        replace(good, vectors=good.vectors[:, :, :1]),
        [],
        make_replies([1, 4], 2),
    ):
        with pytest.raises(ReplyError, match=r"round 0: .*expected"):
            SecureSum().combine(task, cohort, wrong)
    with pytest.raises(ReplyError, match="a sum: expected the clients' replies"):
        bf.weighted_sum().combine(task, cohort, good)
