"""What the tests of run folders share."""

from __future__ import annotations

from pathlib import Path

import pytest

import baffle as bf
from baffle.core.state import weights_sha256
from baffle.runfolder.metrics import Record
from helpers import (
    Place,
    copy_run,
    digits_engine,
    places,
    train_digits,
)

ROUNDS = 8
"""Rows 0 to 8; snapshots behind rounds 5 and 8 (their states' ``round`` is 6 and 9)."""


def resume_digits(path: Path, *, rounds: int | None = None, repair: bool = False) -> bf.Run:
    return bf.resume(path, digits_engine(), rounds=rounds, repair=repair)


def logged(records: list[Record]) -> list[str]:
    return [r.weights_sha256 for r in records]


def replayed(path: Path) -> list[str]:
    return [weights_sha256(state.weights).hex() for state in bf.Journal.open(path).states()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run. Never changed: tests take copies."""
    path = tmp_path_factory.mktemp("journal") / "run"
    train_digits(path, ROUNDS)
    return path


@pytest.fixture(scope="module")
def final(whole: Path) -> str:
    """The hash of the weights that every continuation must reach."""
    return bf.Journal.open(whole).records[-1].weights_sha256


@pytest.fixture(scope="module")
def where(whole: Path) -> list[Place]:
    return places(whole)


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return copy_run(whole, tmp_path / "run")
