"""Rounding to 16 bits is PyTorch's, for every upper half, size and layout."""

from __future__ import annotations

import numpy as np
import pytest

from baffle.runtimes.perturb import Layout
from baffle.runtimes.rounding import mask_of, to_bfloat16, to_float16
from layouts import rounded, settled, widened


@pytest.mark.parametrize("lower", [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, None])
def test_bfloat16_is_that_of_torch_for_every_upper_half(lower: int | None) -> None:
    low = np.random.default_rng(0).integers(0, 2**16, 2**16, np.uint32) if lower is None else np.uint32(lower)
    values = (np.arange(2**16, dtype=np.uint32) << 16 | low).view(np.float32)
    assert settled(Layout("bf16"), to_bfloat16(values)) == settled(Layout("bf16"), rounded(Layout("bf16"), values))


def test_bfloat16_by_hand() -> None:
    values = [1.0, -2.0, 1 + 2**-8, 1 + 2**-8 + 2**-20, 1 + 3 * 2**-8, np.inf, -np.inf, 3.4e38, -0.0, 2**-133]
    bits = [0x3F80, 0xC000, 0x3F80, 0x3F81, 0x3F82, 0x7F80, 0xFF80, 0x7F80, 0x8000, 0x0001]
    assert to_bfloat16(np.array(values, np.float32)).tolist() == bits
    assert to_float16(np.array([65519, 65520, -1e30, 2**-24], np.float32)).tolist() == [0x7BFF, 0x7C00, 0xFC00, 1]


@pytest.mark.parametrize("bits", [0x7F800001, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF, 0x7FC00000])
def test_no_nan_becomes_infinite_or_a_number(bits: int) -> None:
    """The payload of some is in the lower half alone; of others the sum runs over."""
    values = np.array([bits], np.uint32).view(np.float32)
    assert np.isnan(widened(to_bfloat16(values))).all()
    assert np.isnan(to_float16(values).view(np.float16)).all()


@pytest.mark.parametrize("shape", [(0,), (3, 0), (1,), (7, 5), (2**15 + 1,), (3, 2**15)])
def test_bfloat16_of_any_size_and_layout(shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    assert np.array_equal(to_bfloat16(values), rounded(Layout("bf16"), values))
    assert np.array_equal(to_bfloat16(values.T), to_bfloat16(values).T)


def test_masks_have_all_bits_of_a_word_or_none() -> None:
    signs = np.array([[1, -1], [-1, 1]], np.int8)
    for word, full in ((np.uint8, 0xFF), (np.uint16, 0xFFFF)):
        found = mask_of(signs, word)
        assert found.dtype == word
        assert found.tolist() == [[0, full], [full, 0]]
