"""The training loop: the same run again, continued, longer, and refused where it is another."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch.nn.functional as F

import baffle as bf
from baffle.errors import OptionError, PlanError
from baffle.runtimes.pytorch.runtime import TorchRuntime
from helpers import (
    Place,
    digits_engine,
    linear,
    train_digits,
)
from runfolder_helpers import ROUNDS, resume_digits


def test_a_run_without_folder_gives_the_same(final: str) -> None:
    assert train_digits(None, ROUNDS).weights_sha256 == final


def test_two_runs_have_the_same_rows(whole: Path, tmp_path: Path) -> None:
    train_digits(tmp_path / "again", ROUNDS)
    assert (tmp_path / "again/rows.bin").read_bytes() == (whole / "rows.bin").read_bytes()


def test_no_rows_at_all_starts_over(run: Path, whole: Path, final: str) -> None:
    (run / "rows.bin").write_bytes(b"")
    journal = bf.Journal.open(run)
    assert (journal.damage, journal.rows, journal.records) == (None, [], [])
    assert journal.last_row() is None
    assert journal.state().round == 0
    assert list(journal.states()) == []
    assert resume_digits(run).weights_sha256 == final
    assert (run / "rows.bin").read_bytes() == (whole / "rows.bin").read_bytes()


def test_a_finished_run_resumes_to_itself(run: Path, final: str) -> None:
    (run / "model.safetensors").unlink()
    before = (run / "rows.bin").read_bytes()
    assert resume_digits(run).weights_sha256 == final
    assert (run / "rows.bin").read_bytes() == before
    assert (run / "model.safetensors").exists()


def narrow() -> bf.LocalEngine:
    half = bf.Dataset(np.zeros((30, 32), np.float32), np.zeros(30, np.int64))
    runtime = TorchRuntime(linear(32), F.cross_entropy, threads=1)
    return bf.LocalEngine(runtime, bf.partition(half, 3))


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        (narrow, "same model"),
        (lambda: digits_engine(2), "same partition"),
        (lambda: digits_engine(4), "same partition"),
    ],
)
def test_another_model_or_partition_is_refused_and_changes_nothing(
    run: Path, where: list[Place], final: str, engine: Callable[[], bf.LocalEngine], words: str
) -> None:
    with (run / "rows.bin").open("r+b") as file:
        file.truncate(where[5].start)
    with pytest.raises(PlanError, match=words):
        bf.resume(run, engine(), rounds=20)
    assert json.loads((run / "config.json").read_text())["rounds"] == ROUNDS
    assert resume_digits(run).weights_sha256 == final


def test_more_rounds_equal_a_longer_run(run: Path, final: str, tmp_path: Path) -> None:
    longer = train_digits(tmp_path / "longer", ROUNDS + 4)
    assert longer.weights_sha256 != final
    resumed = resume_digits(run, rounds=ROUNDS + 4)
    assert resumed.weights_sha256 == longer.weights_sha256
    assert [r.round for r in resumed.records] == list(range(ROUNDS + 5))
    assert (run / "rows.bin").read_bytes() == (tmp_path / "longer/rows.bin").read_bytes()
    assert bf.Journal.open(run).config.rounds == ROUNDS + 4
    assert resumed.summary()["rounds"] == ROUNDS + 4
    costs = [(r.bytes_up, r.bytes_down, r.forward_passes, r.samples_forwarded) for r in resumed.records]
    assert costs == [(r.bytes_up, r.bytes_down, r.forward_passes, r.samples_forwarded) for r in longer.records]


@pytest.mark.parametrize("rounds", [0, -1])
def test_a_bad_number_of_rounds_is_refused_and_lets_go(run: Path, final: str, rounds: int) -> None:
    with pytest.raises(OptionError, match=f"rounds = {rounds}"):
        resume_digits(run, rounds=rounds)
    assert resume_digits(run).weights_sha256 == final
