"""The rebuild of rows that are credited one by one, and of exact gradients, against loops over whole numbers."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from baffle.core.credit import numbers_of_rows, sizes_of
from baffle.core.directions import Directions
from baffle.core.rebuild import Execution, gradient
from baffle.core.types import Credit, Family, ParamSpec, Table, table_size
from helpers import TASK

KEPT = np.packbits(np.arange(20) % 3 > 0, bitorder="little").tobytes()
ROWS = Credit(1, "rows", ((2, 3, 0), (3, 0, 1)))
TABLE: Table = (
    ParamSpec("first", (4, 3), 0),
    ParamSpec("qkv", (5, 4), 12, KEPT, ROWS),
    ParamSpec("qkv.bias", (5,), 32, b"", ROWS),
    ParamSpec("head", (3, 2), 37, b"", Credit(2, "exact")),
)


@pytest.mark.parametrize("family", ["rank1", "rademacher", "gaussian"])
def test_every_kind_of_number_against_a_loop(family: Family) -> None:
    task = msgspec.structs.replace(TASK, family=family, num_directions=3, slices=2, exponents=(-2, 1, -5))
    sizes = sizes_of(TABLE, 6)
    rng = np.random.default_rng(0)
    terms = [(Directions(TABLE, family, (9, 4), step=step), rng.integers(-1000, 1000, sum(sizes))) for step in range(2)]
    expected = np.zeros(table_size(TABLE))
    for directions, numbers in terms:
        for k in range(6):
            for i, spec in enumerate(TABLE[:3]):
                entries = directions.entries(i, slice(k, k + 1))[0].reshape(spec.shape).astype(float)
                if i == 0:
                    change = numbers[k] * entries * 2.0**-2
                else:
                    own = numbers[6 + 4 * k + numbers_of_rows(spec)]
                    change = (own * entries.reshape(5, -1).T).T.reshape(spec.shape) * 2.0**1
                expected[spec.slice] += change.reshape(-1) * directions.unit / 6
        expected[TABLE[3].slice] += numbers[30:36] * 2.0**-5
    found = gradient(terms, task, 4)
    assert np.allclose(found, expected * 0.25, rtol=1e-6)
    assert not found[12:32][np.arange(20) % 3 == 0].any()  # pruned
    for execution in (Execution(threads=1), Execution(threads=2, block=3), Execution(slow=True)):
        assert gradient(terms, task, 4, execution).tobytes() == found.tobytes()


def test_rows_that_are_credited_one_by_one_have_signs_of_their_own() -> None:
    directions = Directions(TABLE, "rank1", (9, 4))
    assert directions.is_rank1(0)
    assert not directions.is_rank1(1)
    rows = directions.entries(1, slice(0, 1))[0].reshape(5, 4)[:, 1:3]
    assert len({tuple(np.abs(np.cumsum(row))) for row in rows}) > 1  # no row is a multiple of all others
