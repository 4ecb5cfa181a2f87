"""``baffle resume``: to the same weights, and refused where the run is not the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import baffle as bf
from cli_helpers import (
    GROUPS,
    OF_USERS,
    SUMMARY,
    TRAIN_SHORT,
    TRAIN_TINY,
    cut,
    last_json,
    metrics,
    refused,
    refused_with,
    save_users,
)
from helpers import Outcome, copy_run, invoke, tree

pytestmark = pytest.mark.usefixtures("no_network", "no_environment", "tiny_model", "exports")


def test_resume_reaches_the_same_weights_and_totals(run: Path, trained: tuple[Path, Outcome]) -> None:
    cut(run, 2)
    resumed, undisturbed = last_json(invoke(run.parent, "resume", "run", "--json")), last_json(trained[1])
    for name in SUMMARY - {"seconds", "peak_rss_mb"}:
        assert resumed[name] == undisturbed[name]
    assert [m["round"] for m in metrics(run)] == [0, 1, 2, 3, 4]


def test_resume_of_a_finished_run_changes_nothing(run: Path, trained: tuple[Path, Outcome]) -> None:
    before = (run / "rows.bin").read_bytes()
    assert last_json(invoke(run.parent, "resume", "run", "--json"))["weights_sha256"] == metrics(run)[-1].get(
        "weights_sha256"
    )
    assert (run / "rows.bin").read_bytes() == before


def test_resume_with_more_rounds(run: Path) -> None:
    summary = last_json(invoke(run.parent, "resume", "run", "--rounds", "6", "--json"))
    assert summary["rounds"] == 6
    assert [m["round"] for m in metrics(run)] == [0, 1, 2, 3, 4, 5, 6]
    assert json.loads((run / "config.json").read_text())["rounds"] == 6


def test_resume_to_fewer_rounds_is_refused(run: Path) -> None:
    refused(invoke(run.parent, "resume", "run", "--rounds", "3"), "rounds = 3", "4")
    assert json.loads((run / "config.json").read_text())["rounds"] == 4


def test_a_run_that_another_process_writes_is_one_line(run: Path) -> None:
    journal = bf.Journal.open(run, write=True)
    refused(invoke(run.parent, "resume", "run"), "run", "another process")
    journal.close()
    assert invoke(run.parent, "resume", "run").code == 0


def test_a_run_of_the_library_says_how_to_continue(tmp_path: Path) -> None:
    from helpers import train_digits

    train_digits(tmp_path / "run", 2)
    refused(invoke(tmp_path, "resume", "run"), "run", "bf.resume")
    refused(invoke(tmp_path, "evaluate", "run"), "run")
    assert invoke(tmp_path, "replay", "run").code == 0


def test_resume_refuses_other_data(tmp_path: Path) -> None:
    save_users(tmp_path / "mine.npz")
    assert invoke(tmp_path, *TRAIN_SHORT, *OF_USERS, "--partition", "column", "--clients", "4").code == 0
    save_users(tmp_path / "mine.npz", groups_train=np.roll(GROUPS, 1))
    refused(invoke(tmp_path, "resume", "run"), "data differ")
    save_users(tmp_path / "mine.npz", groups_train=None)
    refused(invoke(tmp_path, "resume", "run"), "groups_train")


def test_resume_refuses_frozen_parameters_that_have_changed(tmp_path: Path, base: Path) -> None:
    copy_run(base, tmp_path / "base")
    flags = ("--start", "base", "--trainable", "head")
    assert invoke(tmp_path, *TRAIN_TINY, *flags).code == 0
    shutil.rmtree(tmp_path / "base")
    refused_with(
        invoke(tmp_path, "resume", "run"), "...base: expected a run folder or a .safetensors file (No such file..."
    )
    assert invoke(tmp_path, *TRAIN_TINY, "--seed", "1", "--out", "base").code == 0
    before = tree(tmp_path)
    refused_with(
        invoke(tmp_path, "resume", "run"),
        "run: the frozen parameters differ from those of the run: expected the same model",
    )
    refused_with(invoke(tmp_path, "export", "run"), "run: the run trained another model than its options make now")
    assert tree(tmp_path) == before
    assert invoke(tmp_path, "replay", "run").code == 0
