"""Lanes: each thread evaluates on its own, and gives the losses of the whole runtime."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from baffle.errors import ModelError
from baffle.runtimes.lanes import Lane, side_by_side
from contract import HERE, SIGMA, Kind, batch, passes, runtime_of


class TestThreads:
    @pytest.mark.parametrize("parts", [1, 4])
    def test_side_by_side_raises_what_a_worker_raises(self, parts: int) -> None:
        def work(i: int) -> int:
            if i == parts - 1:
                raise ModelError(f"part {i}")
            return i

        with pytest.raises(ModelError, match=f"part {parts - 1}"):
            side_by_side(work, parts)

    def test_side_by_side_keeps_the_order_and_works_at_once(self) -> None:
        together = threading.Barrier(4)

        def work(i: int) -> int:
            together.wait(10)
            return i * i

        assert side_by_side(work, 4) == [0, 1, 4, 9]


LANED = [k for k in HERE if not k.branches and k.precision in ("fp32", "bf16", "int8") and k.models != "wrn-10-2"]


@pytest.mark.parametrize("kind", LANED, ids=str)
def test_a_lane_gives_the_losses_of_all_together(kind: Kind) -> None:
    """One lane after another, and all at once, whatever was evaluated before; a stack of one lane is larger."""
    runtime = runtime_of(kind, kind.models.split()[0], 3)
    weights, asked, data = runtime.initial_weights(), passes(runtime, (SIGMA, -SIGMA), k=5), batch(300)
    others = [passes(runtime, (SIGMA, -SIGMA), baseline=False, k=i + 1) for i in range(3)]
    together = runtime.losses(weights, asked, data)
    lanes: Sequence[Lane[Any]] = runtime.lanes
    assert len(lanes) == 3
    expected, *rest = [lane.losses(weights, asked, data) for lane in lanes]
    assert all(np.array_equal(losses, expected) for losses in rest)
    assert np.array_equal(expected, together) or kind.strategy == "stacked"
    assert np.abs(expected - together).max() < kind.losses
    small = [lane.losses(weights * 2, other, batch(7)) for lane, other in zip(lanes, others, strict=True)]

    def work(i: int) -> bool:
        lane = lanes[i]
        found = [lane.losses(weights, asked, data), lane.losses(weights * 2, others[i], batch(7))]
        found.append(lane.losses(weights, asked, data))
        return all(np.array_equal(a, b) for a, b in zip(found, (expected, small[i], expected), strict=True))

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(work, range(3))) == [True] * 3
