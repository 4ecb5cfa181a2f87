"""Neighbourhoods: regular, connected, redrawn each round; and the threshold."""

from __future__ import annotations

import numpy as np
import pytest

from baffle.secure.graph import neighbourhoods, threshold
from secure_helpers import KEY


def test_the_threshold_is_above_half_of_holders_and_colluders() -> None:
    for holders in range(2, 252):
        need, colluders = threshold(holders), -(-holders // 3) - 1  # fewer than a third
        assert need <= holders
        assert 2 * need > holders + colluders
        assert need > colluders
        assert need == max(2, int(np.ceil(2 * holders / 3 - 1e-9)))


@pytest.mark.parametrize(("count", "degree"), [(2, 100), (5, 4), (6, 4), (7, 5), (50, 6), (300, 100), (1000, 20)])
def test_the_graph_is_regular_and_connected(count: int, degree: int) -> None:
    around = neighbourhoods(range(count), (KEY, 4), degree)
    expected = count if count - 1 <= degree else 2 * (degree // 2) + 1
    assert {len(near) for near in around.values()} == {expected}
    assert all(client in near and list(near) == sorted(set(near)) for client, near in around.items())
    assert all(client in around[other] for client, near in around.items() for other in near)
    seen, front = {0}, {0}
    while front:
        front = {other for client in front for other in around[client]} - seen
        seen |= front
    assert len(seen) == count


def test_the_graph_is_another_each_round_and_the_same_on_every_machine() -> None:
    first, second = (neighbourhoods(range(12), (KEY, round), 4) for round in (0, 1))
    assert first != second
    assert first == neighbourhoods(list(range(12))[::-1], (KEY, 0), 4)
    assert [first[0], first[11]] == GRAPH


GRAPH = [(0, 1, 3, 4, 11), (0, 1, 3, 8, 11)]
