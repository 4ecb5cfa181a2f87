"""Packing of integers, and the table of trainable tensors."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from baffle.core.types import Integers, make_table, pack_int32, table_size, unpack_int32
from baffle.errors import ReplyError


@given(st.lists(st.integers(-(2**31) + 1, 2**31 - 1), max_size=50))
def test_packing_is_lossless(values: list[int]) -> None:
    integers: Integers = np.array(values, np.int64)
    assert unpack_int32(pack_int32(integers)).tolist() == values


def test_packing_refuses_what_does_not_fit() -> None:
    with pytest.raises(ReplyError, match="expected a magnitude below"):
        pack_int32(np.array([2**31]))


def test_tensors_lie_one_after_another_in_the_flat_weights() -> None:
    table = make_table({"w": (2, 3), "s": (), "empty": (0, 4), "b": (2,)})
    assert [(spec.slice.start, spec.slice.stop) for spec in table] == [(0, 6), (6, 7), (7, 7), (7, 9)]
    assert [spec.matrix for spec in table] == [(2, 3), None, None, None]
    assert table_size(table) == 9
