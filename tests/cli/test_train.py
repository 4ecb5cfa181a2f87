"""``baffle train``: what it prints and writes, and how a run that diverges ends."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.numpy import load_file

import baffle as bf
from baffle.client.calibrate import DIRECTIONS, LADDER
from baffle.models import build
from baffle.training.options import TrainConfig
from cli_helpers import SMALL, SMALL_RUN, SUMMARY, TRAIN_SHORT, last_json, metrics
from helpers import Outcome, invoke, spawn

pytestmark = pytest.mark.usefixtures("no_network", "no_environment")


def total(run: Path, name: str) -> float:
    values = [m[name] for m in metrics(run)]
    return sum(v for v in values if isinstance(v, (int, float)))


def test_train_prints_its_summary_as_the_last_line(trained: tuple[Path, Outcome]) -> None:
    path, outcome = trained
    summary = last_json(outcome)
    assert summary.keys() >= SUMMARY
    assert len(outcome.out.splitlines()) == 1
    assert summary["rounds"] == 4
    assert summary["clients"] == 3
    assert summary["num_directions"] == 4
    assert summary["lattice"] == 0
    assert summary["sigma"] in LADDER
    assert {m["sigma"] for m in metrics(path)} == {summary["sigma"]}
    assert summary["parameters"] == 26514
    measured = len(LADDER) * (DIRECTIONS + 1)  # passes over the three batches, for sigma
    assert summary["forward_passes"] == 5 * 3 * (4 + 1) + measured
    assert summary["samples_forwarded"] == (5 * 3 * (4 + 1) + 3 * measured) * 8
    for name in ("forward_passes", "samples_forwarded", "bytes_up", "bytes_down"):
        assert summary[name] == total(path, name)
    assert summary["seconds"] == pytest.approx(total(path, "seconds"), abs=1e-3)
    assert isinstance(summary["peak_rss_mb"], float)
    assert summary["peak_rss_mb"] > 10
    assert summary["run"] == "run"
    assert summary["weights_sha256"] == metrics(path)[-1]["weights_sha256"]
    assert isinstance(summary["accuracy"], float)
    assert 0 <= summary["accuracy"] <= 1
    assert (summary["accuracy"], summary["loss"]) == tuple(metrics(path)[-1][k] for k in ("accuracy", "loss"))


def test_metrics_have_a_line_a_round(trained: tuple[Path, Outcome]) -> None:
    path, _ = trained
    assert [m["round"] for m in metrics(path)] == [0, 1, 2, 3, 4]
    assert [m["accuracy"] is not None for m in metrics(path)] == [True, False, True, False, True]
    assert [m["participants"] for m in metrics(path)] == [3] * 5


def test_train_is_the_same_as_the_library(trained: tuple[Path, Outcome]) -> None:

    options = TrainConfig(model="mlp", num_directions=4, batch_size=8, clients=3, rounds=4)
    data, test = bf.load("digits")
    runtime = bf.TorchRuntime(build("mlp", (1, 8, 8), 10), F.cross_entropy, 1)
    engine = bf.LocalEngine(runtime, bf.partition(data, 3))
    run = bf.train(options.method(), engine, runtime.initial_weights(), rounds=4, test=test)
    summary = last_json(trained[1])
    assert run.weights_sha256 == summary["weights_sha256"]
    assert (run.accuracy, run.loss) == (summary["accuracy"], summary["loss"])


def test_a_table_is_printed_without_json(tmp_path: Path) -> None:
    outcome = invoke(tmp_path, "train", *SMALL, "--out", "run")
    assert outcome.code == 0
    for word in ("accuracy", "26,514", "weights_sha256", "run"):
        assert word in outcome.out


def test_the_default_folder_is_under_runs(tmp_path: Path) -> None:
    summary = last_json(invoke(tmp_path, "train", *SMALL, "--json"))
    [folder] = (tmp_path / "runs").iterdir()
    assert folder.name.endswith("-mlp")
    assert summary["run"] == f"runs/{folder.name}"


def test_a_process_of_its_own_gives_the_same(trained: tuple[Path, Outcome], tmp_path: Path) -> None:
    outcome = spawn(tmp_path, *SMALL_RUN, "--out", "run")
    ours, theirs = last_json(outcome), last_json(trained[1])
    assert len(outcome.out.splitlines()) == 1
    for name in SUMMARY - {"seconds", "peak_rss_mb"}:
        assert ours[name] == theirs[name]
    assert (tmp_path / "run/rows.bin").read_bytes() == (trained[0] / "rows.bin").read_bytes()


def test_seeds_differ_to_the_last_bit(tmp_path: Path) -> None:
    seeds = [0, 1, 2**64 - 2, 2**64 - 1]
    done = [last_json(invoke(tmp_path, *SMALL_RUN, "--seed", str(s), "--out", str(s))) for s in seeds]
    assert len({str(d["weights_sha256"]) for d in done}) == len(seeds)


def test_the_model_file_scores_what_train_says(trained: tuple[Path, Outcome]) -> None:

    path, outcome = trained
    model = build("mlp", (1, 8, 8), 10)
    model.load_state_dict({k: torch.from_numpy(v) for k, v in load_file(path / "model.safetensors").items()})
    _, test = bf.load("digits")
    with torch.no_grad():
        hits = model(torch.tensor(test.x)).argmax(dim=1).numpy() == test.y
    assert float(hits.mean()) == last_json(outcome)["accuracy"]


def test_divergence_is_one_more_line_and_the_run_stays(tmp_path: Path) -> None:
    outcome = invoke(
        tmp_path, "train", *SMALL, "--optimizer", "sgd", "--lr", "3e38", "--weight-decay", "99", "--out", "run"
    )
    assert outcome.code == 2
    errors = [line for line in outcome.err.splitlines() if not line.startswith(("plan: ", "round "))]
    assert [line[:14] for line in errors] == [f"note: round {i}:" for i in (1, 2, 3, 4)] + ["error: round 4"]
    assert "after round 0" in errors[-1]
    assert "3e+38" in errors[-1]
    assert bf.Journal.open(tmp_path / "run").damage is None


HUGE: dict[str, tuple[str, ...]] = {
    "adam": ("--lr", "1e4"),
    "adam to overflow": ("--lr", "3e38"),
    "adamw": ("--optimizer", "adamw", "--lr", "3e37", "--weight-decay", "1"),
    "sgd": ("--optimizer", "sgd", "--lr", "1e4", "--momentum", "0.9"),
    "sgd to overflow": ("--optimizer", "sgd", "--lr", "3e38", "--weight-decay", "99"),
    "local steps": ("--optimizer", "sgd", "--lr", "1e20", "--local-steps", "2"),
    "local steps to overflow": ("--optimizer", "sgd", "--lr", "1", "--local-steps", "3", "--local-lr", "3e38"),
    "central": ("--lr", "1e30", "--difference", "central", "--sigma", "10"),
    "held out": ("--lr", "1e10", "--holdout", "5"),
    "without a guard": ("--lr", "1e4", "--guard", "off"),
    "without a guard to overflow": ("--optimizer", "sgd", "--lr", "3e38", "--weight-decay", "99", "--guard", "off"),
}


@pytest.mark.parametrize("name", HUGE)
def test_a_huge_learning_rate_ends_in_order(tmp_path: Path, name: str) -> None:
    outcome = invoke(tmp_path, *TRAIN_SHORT, "--schedule", "constant", "--rounds", "8", *HUGE[name])
    run, told = tmp_path / "run", outcome.err.splitlines()
    journal = bf.Journal.open(run)
    rollbacks = sum(record.restores is not None for record in journal.records)
    assert [line.split()[0] for line in told if not line.startswith(("plan: ", "round "))] == [
        *("note:" for _ in range(rollbacks)),
        *("error:" for _ in range(outcome.code // 2)),
    ]
    assert rollbacks == 0 or "off" not in HUGE[name]
    assert journal.damage is None
    assert np.isfinite(journal.state().weights).all()
    assert np.isfinite(journal.state().ema_weights).all()
    digest = metrics(run)[-1]["weights_sha256"]
    assert invoke(tmp_path, "replay", "run").out.split() == [digest]
    if outcome.code == 0:
        summary = last_json(outcome)
        assert (summary["weights_sha256"], summary["rollbacks"], summary["rounds"]) == (digest, rollbacks, 8)
        assert all(np.isfinite(v).all() for v in load_file(run / "model.safetensors").values())
        assert "NaN" not in outcome.out
    else:
        assert (outcome.code, outcome.out) == (2, "")


def test_rollbacks_bring_a_run_back(tmp_path: Path) -> None:
    options = ("--lr", "30", "--num-directions", "20", "--batch-size", "32", "--schedule", "constant")
    arguments = (*TRAIN_SHORT, *options, "--rounds", "24", "--ema", "0")
    guarded = last_json(invoke(tmp_path, *arguments))
    alone = last_json(invoke(tmp_path, *arguments, "--guard", "off", "--out", "alone"))
    first = metrics(tmp_path / "run")[0]
    assert isinstance(guarded["rollbacks"], int)
    assert guarded["rollbacks"] >= 1
    assert alone["rollbacks"] == 0
    assert isinstance(guarded["loss"], float)
    assert isinstance(first["loss"], float)
    assert guarded["loss"] <= first["loss"]
    assert alone["loss"] is None or float(str(alone["loss"])) > 10 * first["loss"]
    assert first["weights_sha256"] == metrics(tmp_path / "alone")[0]["weights_sha256"]


def test_guard_stop_ends_with_the_last_good_weights(tmp_path: Path) -> None:
    outcome = invoke(
        tmp_path, *TRAIN_SHORT, "--lr", "1e4", "--guard", "stop", "--schedule", "constant", "--rounds", "9"
    )
    assert (outcome.code, outcome.out) == (2, "")
    [error] = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert outcome.err.splitlines()[-1] == error
    assert "stops with the weights" in error
    assert "10000" in error
    *before, last = metrics(tmp_path / "run")
    assert isinstance(last["restores"], int)
    assert f"after round {last['restores']}" in error
    assert last["round"] != 9
    assert last["weights_sha256"] == before[last["restores"]]["weights_sha256"]
    assert [m["restores"] for m in before] == [None] * len(before)
    assert invoke(tmp_path, "replay", "run").out.split() == [last["weights_sha256"]]
    assert last_json(invoke(tmp_path, "evaluate", "run", "--json"))["loss"] == pytest.approx(
        before[last["restores"]]["loss"]
    )
