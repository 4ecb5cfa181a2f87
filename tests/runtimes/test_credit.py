"""Every engine gives the numbers of a credited model that PyTorch gives in float32, which tests/runtimes/pytorch holds
against derivatives by autograd."""

from __future__ import annotations

import numpy as np
import pytest

from baffle.core.credit import part_of, sizes_of, units_of
from baffle.core.types import Credit, ParamSpec
from baffle.runtimes.credit import CreditRows, map_of
from contract import HAS_BF16
from credited import BOUNDS, K, expected, numbers, runtime

# engine, precision, credit, lattice, largest relative error of a unit's numbers
KINDS = [
    ("torch", "fp32", "local", 0, 1e-9),
    ("torch", "bf16", "local", 0, 0.5),
    ("ort", "fp32", "local", 0, 2e-4),
    ("openvino", "fp32", "local", 0, 2e-4),
    ("ort", "fp32", "feature", 0, 2e-4),
    ("openvino", "fp32", "feature", 0, 2e-4),
    ("ort", "fp32", "global", 0, 2e-4),
    ("openvino", "fp32", "global", 0, 2e-4),
    ("ort", "fp16", "local", 0, 0.03),
    ("openvino", "fp16", "local", 0, 0.03),
    ("openvino", "bf16", "local", 0, 0.5),
    ("ort", "int8-weights", "local", 8, 1e-3),
    ("openvino", "int8-weights", "local", 8, 1e-3),
    ("ort", "int8", "local", 8, 0.15),
    ("openvino", "int8", "local", 8, 0.15),
]
HERE = [kind for kind in KINDS if HAS_BF16 or kind[:2] != ("openvino", "bf16")]


@pytest.mark.parametrize(("engine", "precision", "credit", "lattice", "error"), HERE)
def test_each_unit_has_the_numbers_of_pytorch(
    engine: str, precision: str, credit: str, lattice: int, error: float
) -> None:
    made = runtime(engine, precision, credit)
    found, wanted = numbers(made, made, lattice), expected(credit, lattice)
    sizes = sizes_of(made.table, K * (len(BOUNDS) - 1))
    for unit, part in zip(units_of(made.table), part_of(sizes), strict=True):
        off = np.linalg.norm(found[:, part] - wanted[:, part]) / np.linalg.norm(wanted[:, part])
        assert off <= error, (unit, off)


def test_a_number_without_features_adds_all_of_them_up() -> None:
    assert map_of(np.array([1, 0, 1]), 2).tolist() == [[0, 1], [1, 0], [0, 1]]
    assert map_of(np.array([-1, -1]), 1).tolist() == [[1], [1]]


def test_rows_take_turns_only_where_some_share_a_number_with_others() -> None:
    own = ParamSpec("w", (3, 2), 0, credit=Credit(0, "rows", ((1, 2, 0), (2, 0, 1))))
    table = (own, ParamSpec("p", (2,), 6, credit=Credit(0, "rows", ((2, 2, 0),))))
    sharing = CreditRows(0, 0, map_of(np.array([0, 0, 1, 1]), 3)).sharing(table)
    assert {place: rows.tolist() for place, rows in sharing.items()} == {0: [True, False, False], 1: [True, True]}
    assert CreditRows(0, 0, map_of(np.array([0, -1, 1, 2]), 3)).sharing(table) == {}
    assert CreditRows(0, 0, map_of(np.array([-1, -1]), 1)).sharing(table) == {}
