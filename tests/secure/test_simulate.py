"""A whole round in one process: the sum is exact, whichever clients drop out and when."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from baffle.core.aggregate import SecureSum, WeightedSum
from baffle.core.scalars import MOST_MAGNITUDE
from baffle.core.types import MAX_WEIGHT, Reply, limit_of, pack
from baffle.errors import SecureSumError
from baffle.secure.graph import neighbourhoods, threshold
from baffle.secure.simulate import Dropped, sum_together
from secure_helpers import KEY, make_clients, make_replies, make_task, plain_sum


@st.composite
def rounds(draw: st.DrawFn) -> tuple[int, int, int, Dropped]:
    count = draw(st.integers(2, 9))
    degree = draw(st.sampled_from([4, 6, 100]))
    numbers = [3 * i for i in range(count)]
    few = st.lists(st.sampled_from(numbers), max_size=max(1, count // 3), unique=True)
    return count, degree, draw(st.integers(1, 5)), Dropped(draw(few), draw(few), draw(few), draw(few))


def can_be_summed(cohort: Sequence[int], round: int, degree: int, dropped: Dropped) -> bool:
    """By sets alone: in each neighbourhood the threshold must be left at every stage."""
    around = neighbourhoods(cohort, (KEY, round), degree)
    advertised = set(cohort) - set(dropped.before_advert)
    alive = advertised - set(dropped.before_vector)
    opened = alive - set(dropped.before_shares)
    ended = opened - set(dropped.before_last_shares)

    def enough(dealer: int, left: set[int]) -> bool:
        return len(set(around[dealer]) & left) >= threshold(len(around[dealer]))

    return (
        len(alive) >= 2
        and all(enough(dealer, alive) for dealer in advertised)
        and all(enough(dealer, opened) for dealer in alive)
        and all(enough(dealer, ended) for dealer in advertised - alive)
    )


@settings(max_examples=150, deadline=None)
@given(rounds(), st.integers(0, 2**16))
def test_the_sum_is_exact_whichever_clients_drop_out(case: tuple[int, int, int, Dropped], round: int) -> None:
    count, degree, size, dropped = case
    clients = make_clients(count, degree=degree)
    task, replies = make_task(size, round=round, degree=degree), make_replies(clients, size, round=round, seed=round)
    if not can_be_summed(sorted(clients), round, degree, dropped):
        with pytest.raises(SecureSumError):
            sum_together(task, clients, replies, dropped)
        return
    total = sum_together(task, clients, replies, dropped).total
    alive = set(clients) - set(dropped.before_advert) - set(dropped.before_vector)
    assert total.participants == tuple(sorted(alive))
    assert (total.vectors.reshape(-1).tolist(), (total.weight_sum, total.clipped, total.nonfinite)) == plain_sum(
        replies, alive
    )
    assert total.magnitudes == (sum(reply.magnitudes[0] for reply in replies if reply.client in alive),)


@pytest.mark.parametrize("bits", [1, 4, 15])
@settings(max_examples=40, deadline=None)
@given(rounds(), st.integers(0, 2**16))
def test_short_words_sum_as_exactly_as_long_ones(bits: int, case: tuple[int, int, int, Dropped], round: int) -> None:
    """A word with room for the cohort's largest sum and no more, against the plain sum of the same replies."""
    count, degree, size, dropped = case
    clients = make_clients(count, degree=degree)
    cohort = sorted(clients)
    assume(can_be_summed(cohort, round, degree, dropped))
    replies = make_replies(clients, size, round=round, seed=round, bits=bits)
    weights = {reply.client: reply.weight for reply in replies}
    task = make_task(size, round=round, degree=degree, bits=bits, weight_sum=sum(weights.values()))
    assert task.word < 32
    secure = sum_together(task, clients, replies, dropped).total
    plain = WeightedSum().combine(task, weights, [r for r in replies if r.client in secure.participants])
    assert np.array_equal(secure.vectors, plain.vectors)
    assert replace(secure, vectors=plain.vectors) == plain
    assert SecureSum(minimum=2).combine(task, weights, secure) == secure


@pytest.mark.parametrize("bits", [1, 4, 15])
@pytest.mark.parametrize("sign", [-1, 1])
def test_the_largest_sums_fit_their_words(bits: int, sign: int) -> None:
    """Every number of every client is at its limit, and so is its magnitude."""
    clients = make_clients(6)
    most = np.full(3, sign * limit_of(bits))
    replies = [
        Reply(
            round=0,
            client=client,
            weight=MAX_WEIGHT,
            scalars=pack(most, bits),
            magnitudes=(MAX_WEIGHT * MOST_MAGNITUDE,),
            clipped=3,
            nonfinite=3,
        )
        for client in clients
    ]
    task = make_task(3, bits=bits, weight_sum=6 * MAX_WEIGHT)
    total = sum_together(task, clients, replies).total
    assert total.vectors.reshape(-1).tolist() == [sign * limit_of(bits) * 6 * MAX_WEIGHT] * 3
    assert total.magnitudes == (6 * MAX_WEIGHT * MOST_MAGNITUDE,)
    assert (total.weight_sum, total.clipped, total.nonfinite) == (6 * MAX_WEIGHT, 18, 18)


@pytest.mark.slow
def test_a_hundred_and_fifty_clients_in_a_graph() -> None:
    clients = make_clients(150, degree=20)
    replies = make_replies(clients, 10)
    dropped = Dropped(before_advert=[0], before_vector=range(3, 45, 6), before_shares=[444], before_last_shares=[300])
    total = sum_together(make_task(10, degree=20), clients, replies, dropped).total
    assert total.vectors.reshape(-1).tolist() == plain_sum(replies, total.participants)[0]
    assert len(total.participants) == 142
