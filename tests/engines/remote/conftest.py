"""Fixtures of all tests of the remote engine."""

from __future__ import annotations

import os

import pytest

from remote_helpers import (
    Federation,
    federation,
)


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """No power fails here."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def fed() -> Federation:
    return federation()
