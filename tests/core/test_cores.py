"""The number of cores that this process may use."""

from __future__ import annotations

import os

import pytest

from baffle.core.cores import cores


def test_at_least_one_and_at_most_those_of_the_machine() -> None:
    assert 1 <= cores() <= (os.cpu_count() or 1)


@pytest.mark.parametrize(("count", "expected"), [(6, 6), (None, 1)])
def test_elsewhere_it_is_the_machine_s(count: int | None, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.setattr("os.cpu_count", lambda: count)
    assert cores() == expected
