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
    next_exponents,
    nothing,
    target_magnitude,
    typical_magnitudes,
    word_bits,
)
from baffle.core.scalars import Encoded
from baffle.core.types import Aggregate, Credit, Reply, Row, bits_of, limit_of, make_table, pack
from baffle.errors import ReplyError
from helpers import TASK
from secure_helpers import make_replies, make_task

COHORT = {1: 1, 2: 2, 4: 3, 7: 1}
LIMIT = limit_of(15)
TABLE = make_table({"w": (2, 3)})


def row(values: list[int], *, clients: int = 1, weight: int = 1, clipped: int = 0, applied: bool = True) -> Row:
    """A row whose clients told the mean magnitude of these values."""
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
        exponents=(-4,),
        local_steps=1,
        numbers=len(values),
        bits=bits_of(np.array(values)),
        magnitudes=(round(256 * sum(map(abs, values)) / len(values) / weight),),
        participants=tuple(range(clients)),
        weight_sum=weight,
        scalars=pack(np.array(values), bits_of(np.array(values))),
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
        TASK,
        client,
        weight,
        [Encoded(np.array(integers), (256,), counts.get("clipped", 0), counts.get("nonfinite", 0))],
    )


def test_weighted_sum_by_hand_in_any_order() -> None:
    replies = [make_reply(4, [1, -2], 3, clipped=1), make_reply(2, [10, 5], 2, nonfinite=1)]
    for order in (replies, replies[::-1]):
        total = WeightedSum().combine(TASK, COHORT, order)
        assert total.vectors.tolist() == [[[23, 4]]]  # 3 * 1 + 2 * 10, 3 * -2 + 2 * 5
        assert (total.participants, total.weight_sum, total.clipped, total.nonfinite) == ((2, 4), 5, 1, 1)
        assert total.magnitudes == (5 * 256,)


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
        ({"scalars": b"\0" * 12}, "12 bytes of scalars: expected 4"),
        ({"scalars": b"\0" * 3}, "3 bytes"),
        ({"scalars": b"\0\0\0\xc0"}, "bits behind the last integer: expected 0"),
        ({"scalars": b"\0\x40\0\0"}, "scalar 16384: expected at most 16383"),
        ({"magnitudes": ()}, r"magnitudes \(\): expected 1 of 0 to 16777216"),
        ({"magnitudes": (-1,)}, "magnitudes"),
        ({"magnitudes": (2**24 + 1,)}, "magnitudes"),
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


def test_first_round_measures_on_a_wide_scale() -> None:
    def early(values: list[int]) -> Row:
        return msgspec.structs.replace(row(values, applied=False), round=0)

    assert next_exponents(TABLE, 15, None) == (FIRST_EXPONENT,)
    assert measures_scale(None, 15)
    assert not measures_scale(early([1000, -1000]), 15)
    assert measures_scale(early([1, -1]), 15)  # too coarse: measure again
    assert measures_scale(early([16000, -16000]), 15)  # too fine
    assert not measures_scale(msgspec.structs.replace(row([1, -1], applied=False), round=9), 15)  # give up measuring


@pytest.mark.parametrize(("bits", "exponent"), [(15, -4), (8, 1), (4, 5), (2, 7), (1, 6)])
def test_next_scale_brings_numbers_to_where_their_bits_serve_best(bits: int, exponent: int) -> None:
    assert next_exponents(TABLE, bits, row([1024, -1024])) == (exponent,)
    size = 1024 * 2.0 ** (-4 - exponent)  # of a number, in units of the next scale
    assert 2**-0.5 <= size / target_magnitude(bits) <= 2**0.5


def test_numbers_that_all_vanish_call_for_a_finer_scale_but_not_those_that_nobody_sent() -> None:
    assert next_exponents(TABLE, 15, row([0, 0])) == (-12,)
    assert next_exponents(TABLE, 15, msgspec.structs.replace(row([0, 0]), nonfinite=2)) == (-4,)
    assert next_exponents(TABLE, 15, msgspec.structs.replace(row([0, 0]), participants=())) == (-4,)


def test_a_clipping_norm_bounds_the_scale() -> None:
    assert next_exponents(TABLE, 15, row([1024, -1024]), clip=2.0**-4) == (-17,)  # 2**-4 is 16383 units of 2**-18


def test_every_unit_has_a_scale_of_its_own() -> None:
    specs = make_table({"w": (2, 3), "b": (2,)})
    table = (specs[0], msgspec.structs.replace(specs[1], credit=Credit(1, "exact")))
    both = msgspec.structs.replace(row([1024, -1024]), exponents=(-4, -10), magnitudes=(869 * 256, 869 * 16))
    assert typical_magnitudes(both) == [869, 869 / 16]
    assert next_exponents(table, 15, both) == (-4, -14)


def test_the_share_of_clipped_numbers() -> None:
    assert clipped_share(msgspec.structs.replace(row([1, 2, 3, 4], clients=2), clipped=2)) == 0.25


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 15])
def test_a_word_holds_the_largest_sum_and_no_bit_more(bits: int) -> None:
    largest = limit_of(bits) * 320
    assert 2 ** (word_bits(bits, 320) - 2) <= largest < 2 ** (word_bits(bits, 320) - 1)


def test_a_sum_must_be_one_of_participants() -> None:
    task, cohort = make_task(2), {1: 3, 4: 5, 6: 2}
    good = Aggregate(np.array([[[-8 * LIMIT, 8 * LIMIT]]]), (1, 4), 8, (0,), 0, 0)
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
