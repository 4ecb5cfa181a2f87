"""Packing of integers, and the table of trainable tensors."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from baffle.core.types import Integers, bits_of, limit_of, make_table, pack, packed_size, table_size, unpack
from baffle.errors import ReplyError


@st.composite
def packable(draw: st.DrawFn) -> tuple[int, list[int]]:
    bits = draw(st.integers(1, 40))
    value = st.sampled_from([-1, 1]) if bits == 1 else st.integers(-limit_of(bits), limit_of(bits))
    return bits, draw(st.lists(value, max_size=50))


@given(packable())
def test_packing_is_lossless_and_as_small_as_it_can_be(case: tuple[int, list[int]]) -> None:
    bits, values = case
    data = pack(np.array(values, np.int64), bits)
    assert unpack(data, bits, len(values)).tolist() == values
    assert len(data) == packed_size(len(values), bits) == -(-len(values) * bits // 8)


@given(st.lists(st.integers(-(2**40), 2**40), max_size=20))
def test_the_fewest_bits_are_enough_and_no_more(values: list[int]) -> None:
    integers: Integers = np.array(values, np.int64)
    bits = bits_of(integers)
    pack(integers, bits)
    if bits > 2:
        with pytest.raises(ReplyError, match="expected a magnitude of at most"):
            pack(integers, bits - 1)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ReplyError, match="integer 8: expected a magnitude of at most 7"):
        pack(np.array([8]), 4)
    with pytest.raises(ReplyError, match="2 bytes of integers: expected 1"):
        unpack(b"\0\0", 4, 2)
    with pytest.raises(ReplyError, match="bits behind the last integer"):
        unpack(b"\xf1", 4, 1)


def test_tensors_lie_one_after_another_in_the_flat_weights() -> None:
    table = make_table({"w": (2, 3), "s": (), "empty": (0, 4), "b": (2,)})
    assert [(spec.slice.start, spec.slice.stop) for spec in table] == [(0, 6), (6, 7), (7, 7), (7, 9)]
    assert [spec.matrix for spec in table] == [(2, 3), None, None, None]
    assert table_size(table) == 9
