"""Which numbers a reply has, and which tensors each of them is about."""

from __future__ import annotations

import pytest

from baffle.core.credit import is_plain, model_table, numbers_of_rows, part_of, sizes_of, units_of
from baffle.core.types import Credit, ParamSpec, Table, make_table
from baffle.errors import ModelError

ROWS = Credit(1, "rows", ((2, 3, 0), (3, 0, 1)))
TABLE: Table = (
    ParamSpec("embed", (7, 2), 0),
    ParamSpec("qkv", (5, 4), 14, credit=ROWS),
    ParamSpec("qkv.bias", (5,), 34, credit=ROWS),
    ParamSpec("head", (3, 5), 39, credit=Credit(2, "exact")),
    ParamSpec("local", (2, 2), 54, credit=Credit(3, "exact", (), True)),
)


def test_units_have_the_numbers_of_their_kind() -> None:
    assert [(unit.kind, unit.tensors, unit.numbers) for unit in units_of(TABLE)] == [
        ("loss", (0,), 1),
        ("rows", (1, 2), 4),
        ("exact", (3,), 15),
        ("exact", (4,), 4),
    ]
    assert sizes_of(TABLE, directions=10) == (10, 40, 15, 4)
    assert part_of((10, 40))[1] == slice(10, 50)


def test_rows_that_share_a_number_and_rows_with_their_own() -> None:
    assert numbers_of_rows(TABLE[1]).tolist() == [3, 3, 0, 1, 2]
    assert numbers_of_rows(ParamSpec("w", (3, 2), 0, credit=Credit(0, "rows"))).tolist() == [0, 1, 2]


def test_a_model_without_credit_is_plain_and_local_heads_are_not_the_models() -> None:
    plain = make_table({"w": (2, 3), "b": (2,)})
    assert is_plain(plain)
    assert not is_plain(TABLE)
    assert [spec.name for spec in model_table(TABLE)] == ["embed", "qkv", "qkv.bias", "head"]
    assert all(spec.credit == Credit() for spec in model_table(TABLE))


@pytest.mark.parametrize(
    ("credits", "message"),
    [
        ([Credit(1), Credit(2)], r"units \[1, 2\]: expected 0 to 1"),
        ([Credit(0), Credit(0, "exact")], "unit 0: kinds exact, loss: expected one"),
        ([Credit(0, "rows", ((1, 0, 1),)), Credit(0, "rows")], "expected every row once"),
    ],
)
def test_what_does_not_fit_together_is_refused(credits: list[Credit], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        units_of(tuple(ParamSpec(f"t{i}", (2, 2), 4 * i, credit=credit) for i, credit in enumerate(credits)))
