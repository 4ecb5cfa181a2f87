"""The C library is configured to keep or to return freed memory."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from baffle.runtimes.pytorch.allocator import give_back_freed_memory, keep_freed_memory


@pytest.mark.parametrize("tell", [give_back_freed_memory, keep_freed_memory])
def test_the_c_library_is_told(tell: Callable[[], bool]) -> None:
    glibc = sys.platform == "linux" and bool(sys.modules["os"].confstr("CS_GNU_LIBC_VERSION"))
    assert tell() is glibc


def test_a_glibc_that_refuses_large_thresholds_is_told_a_smaller_one(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int]] = []

    def mallopt(option: int, value: int) -> bool:
        told.append((option, value))
        return option != -3 or value <= 2**25  # M_MMAP_THRESHOLD before glibc 2.35

    monkeypatch.setattr("baffle.runtimes.pytorch.allocator._mallopt", mallopt)
    assert keep_freed_memory()
    assert told == [(-3, 2**30), (-3, 2**25), (-1, 2**30)]
