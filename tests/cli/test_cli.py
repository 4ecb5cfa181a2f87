"""The commands: what they print, what they write, and one line for everything that can be wrong with the input."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.numpy import load_file

import baffle as bf
from baffle.client.calibrate import DIRECTIONS, LADDER
from baffle.runtimes import Runtime
from baffle.runtimes.choose import Choice
from baffle.runtimes.pytorch.replica import Replica
from baffle.training import build as assemble
from helpers import Outcome, copy_run, flip, invoke, places, spawn, tree

SMALL = (
    *("--model", "mlp", "--num-directions", "4", "--batch-size", "8", "--clients", "3", "--rounds", "4"),
    *("--threads", "1"),  # two threads crawl where the cores are shared
)
SMALL_RUN = ("train", *SMALL, "--evaluate-every", "2", "--snapshot-every", "3", "--json")
SUMMARY = {
    "accuracy",
    "loss",
    "rounds",
    "clients",
    "num_directions",
    "lattice",
    "sigma",
    "forward_passes",
    "samples_forwarded",
    "bytes_up",
    "bytes_down",
    "seconds",
    "peak_rss_mb",
    "parameters",
    "weights_sha256",
    "run",
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """A small run of the command line and what it printed. Never changed: tests take copies."""
    folder = tmp_path_factory.mktemp("trained")
    return folder / "run", invoke(folder, *SMALL_RUN, "--out", "run")


@pytest.fixture
def run(trained: tuple[Path, Outcome], tmp_path: Path) -> Path:
    """A copy of the run to damage."""
    return copy_run(trained[0], tmp_path / "run")


def last_json(outcome: Outcome) -> dict[str, object]:
    assert outcome.code == 0, outcome.err
    result: dict[str, object] = json.loads(outcome.out.splitlines()[-1])
    return result


def metrics(run: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def total(run: Path, name: str) -> float:
    values = [m[name] for m in metrics(run)]
    return sum(v for v in values if isinstance(v, (int, float)))


def refused(outcome: Outcome, *words: str) -> None:
    """Exit code 2, and one line on stderr that names what is wrong."""
    assert outcome.code == 2, outcome
    assert outcome.out == ""
    lines = outcome.err.splitlines()
    assert len(lines) == 1, outcome.err
    assert lines[0].startswith("error: ")
    assert "Traceback" not in outcome.err
    for word in words:
        assert word in lines[0], (word, lines[0])


# --- train


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


def test_progress_goes_to_stderr_and_nothing_else_is_left(trained: tuple[Path, Outcome]) -> None:
    path, outcome = trained
    assert outcome.err.splitlines()[-1].startswith("round 4/4 ")
    assert [p.name for p in path.parent.iterdir()] == ["run"]


def test_train_is_the_same_as_the_library(trained: tuple[Path, Outcome]) -> None:
    import torch.nn.functional as F

    from baffle.models import build
    from baffle.training.options import TrainConfig

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


TOML = """
model = "mlp"
clients = 4
num-directions = 3
batch_size = 8
rounds = 2
family = "rademacher"
lr = 0.5
optimizer = "sgd"
momentum = 0.9
threads = 1
clip-update = 0.25
"""


def test_a_toml_file_gives_options_and_flags_win(tmp_path: Path) -> None:
    (tmp_path / "options.toml").write_text(TOML)
    summary = last_json(invoke(tmp_path, "train", "options.toml", "--clients", "3", "--json", "--out", "r"))
    assert (summary["clients"], summary["num_directions"], summary["rounds"]) == (3, 3, 2)
    assert summary["family"] == "rademacher"
    config = json.loads((tmp_path / "r/config.json").read_text())
    expected = {
        "model": "mlp",
        "clients": 3,
        "num_directions": 3,
        "batch_size": 8,
        "family": "rademacher",
        "lr": 0.5,
        "momentum": 0.9,
        "threads": 1,
        "clip_update": 0.25,
        "seed": 0,
        "dataset": "digits",
    }
    assert {k: config["command"][k] for k in expected} == expected
    assert config["method"]["optimizer"]["type"] == "sgd"
    assert config["method"]["optimizer"]["momentum"] == 0.9
    assert config["method"]["server"][0]["max_norm"] == 0.25
    flags = [
        *("--model", "mlp", "--clients", "3", "--num-directions", "3", "--batch-size", "8", "--rounds", "2"),
        *("--family", "rademacher", "--lr", "0.5", "--optimizer", "sgd", "--momentum", "0.9", "--threads", "1"),
        *("--clip-update", "0.25"),
    ]
    same = last_json(invoke(tmp_path, "train", *flags, "--json", "--out", "flags"))
    assert same["weights_sha256"] == summary["weights_sha256"]


def test_seeds_differ_to_the_last_bit(tmp_path: Path) -> None:
    seeds = [0, 1, 2**64 - 2, 2**64 - 1]
    done = [last_json(invoke(tmp_path, *SMALL_RUN, "--seed", str(s), "--out", str(s))) for s in seeds]
    assert len({str(d["weights_sha256"]) for d in done}) == len(seeds)


# --- resume, replay, evaluate


def cut(run: Path, row: int) -> None:
    """Leave rows before ``row``, and half of it."""
    at = places(run)[row]
    with (run / "rows.bin").open("r+b") as file:
        file.truncate((at.start + at.end) // 2)


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


@pytest.mark.parametrize("options", [(), ("--threads", "2"), ("--block", "7"), ("--slow",)])
def test_replay_prints_the_logged_hash_of_every_round(
    trained: tuple[Path, Outcome], options: tuple[str, ...], tmp_path: Path
) -> None:
    path, _ = trained
    hashes = [m["weights_sha256"] for m in metrics(path)]
    for round, expected in enumerate(hashes):
        outcome = invoke(tmp_path, "replay", path, "--round", str(round), *options)
        assert (outcome.code, outcome.out.split()) == (0, [expected])
    last = last_json(invoke(tmp_path, "replay", path, "--json", *options))
    assert (last["round"], last["weights_sha256"], last["run"]) == (4, hashes[-1], str(path))


def test_reading_commands_change_nothing(run: Path) -> None:
    before = {p: Path(p).read_bytes() for p in tree(run) if Path(p).is_file()}
    assert invoke(run.parent, "replay", "run").code == 0
    assert invoke(run.parent, "evaluate", "run").code == 0
    assert {p: Path(p).read_bytes() for p in tree(run) if Path(p).is_file()} == before


def test_evaluate_agrees_with_train(trained: tuple[Path, Outcome], tmp_path: Path) -> None:
    path, outcome = trained
    summary, result = last_json(outcome), last_json(invoke(tmp_path, "evaluate", path, "--json"))
    assert (result["accuracy"], result["loss"]) == (summary["accuracy"], summary["loss"])
    assert result["round"] == 4
    assert isinstance(result["raw_accuracy"], float)
    assert result["raw_loss"] != result["loss"]
    table = invoke(tmp_path, "evaluate", path)
    assert table.code == 0
    assert f"{summary['accuracy']:.4f}" in table.out


def test_the_model_file_scores_what_train_says(trained: tuple[Path, Outcome]) -> None:
    import torch

    from baffle.models import build

    path, outcome = trained
    model = build("mlp", (1, 8, 8), 10)
    model.load_state_dict({k: torch.from_numpy(v) for k, v in load_file(path / "model.safetensors").items()})
    _, test = bf.load("digits")
    with torch.no_grad():
        hits = model(torch.tensor(test.x)).argmax(dim=1).numpy() == test.y
    assert float(hits.mean()) == last_json(outcome)["accuracy"]


def test_help_of_every_command(tmp_path: Path) -> None:
    for command in ((), ("train",), ("resume",), ("replay",), ("evaluate",)):
        outcome = invoke(tmp_path, *command, "--help")
        assert outcome.code == 0
        assert "Usage" in outcome.out
    assert "--num-directions" in invoke(tmp_path, "train", "--help").out


# --- how passes are evaluated


def plan_of(run: Path) -> dict[str, object]:
    """What a run recorded of how its passes were evaluated."""
    plan: dict[str, object] = json.loads((run / "config.json").read_text())["plan"]
    return plan


def planned(outcome: Outcome) -> list[str]:
    """What was told of a measurement."""
    return [line for line in outcome.err.splitlines() if line.startswith("plan: ")]


@pytest.fixture
def not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be measured."""

    def choose(*arguments: object, **options: object) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr(assemble, "choose", choose)


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The measurement is over at once, and finds what this list has first; more ways are added as they are offered."""
    wanted: list[str] = []

    def choose(candidates: dict[str, Callable[[], Runtime]], *arguments: object, **options: object) -> Choice:
        name = wanted[0]
        wanted[:] = list(candidates)
        return Choice(candidates[name](), name, dict.fromkeys(candidates, 1234.5))

    monkeypatch.setattr(assemble, "choose", choose)
    return wanted


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str | int]]:
    """The plans of the engines that are made."""
    made: list[dict[str, str | int]] = []

    class Engine(bf.LocalEngine):
        def __init__(self, runtime: Runtime, clients: tuple[bf.Dataset, ...]) -> None:
            super().__init__(runtime, clients)
            made.append(self.plan)

    monkeypatch.setattr(assemble, "LocalEngine", Engine)
    return made


def test_by_default_two_ways_are_measured_told_and_one_is_recorded(trained: tuple[Path, Outcome]) -> None:
    [line] = planned(trained[1])
    number = r"[\d,.]+"
    told = re.fullmatch(rf"plan: (copies|stacked) \(passes a second: copies {number}, stacked {number}\)", line)
    assert told, line
    assert plan_of(trained[0])["strategy"] == told[1]
    assert json.loads((trained[0] / "config.json").read_text())["command"]["strategy"] == "auto"


@pytest.mark.parametrize("strategy", ["copies", "stacked", "streaming"])
def test_a_strategy_that_is_told_is_taken_and_not_measured(
    tmp_path: Path, trained: tuple[Path, Outcome], strategy: str, not_measured: None
) -> None:
    outcome = invoke(tmp_path, *SMALL_RUN, "--strategy", strategy, "--out", "run")
    summary, other = last_json(outcome), last_json(trained[1])
    assert planned(outcome) == []
    assert plan_of(tmp_path / "run")["strategy"] == strategy
    assert "memory" not in plan_of(tmp_path / "run")
    assert summary["loss"] == pytest.approx(other["loss"], rel=1e-2)
    assert summary["forward_passes"] == other["forward_passes"]
    cut(tmp_path / "run", 2)
    assert last_json(invoke(tmp_path, "resume", "run", "--json"))["weights_sha256"] == summary["weights_sha256"]
    assert last_json(invoke(tmp_path, "evaluate", "run", "--json"))["loss"] == summary["loss"]


@pytest.mark.parametrize(
    ("told", "number"),
    [("64MB", 64_000_000), ("64MiB", 64 * 2**20), ("0.5 gb", 500_000_000), ("8000000", 8_000_000)],
)
def test_a_budget_is_kept_and_recorded_in_bytes(tmp_path: Path, told: str, number: int) -> None:
    flags = ("--memory", told, "--strategy", "streaming", "--rounds", "1")
    assert last_json(invoke(tmp_path, *SMALL_RUN, *flags, "--out", "run"))["rounds"] == 1
    assert plan_of(tmp_path / "run")["memory"] == number
    assert json.loads((tmp_path / "run/config.json").read_text())["command"]["memory"] == told


def test_a_smaller_budget_evaluates_fewer_examples_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    forward = Replica.forward

    def seen(self: Replica, x: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        sizes.append(len(x))
        return forward(self, x, *arguments, **options)

    monkeypatch.setattr(Replica, "forward", seen)
    largest: dict[str, int] = {}
    for told in ("64MB", "200KB"):
        flags = ("--memory", told, "--strategy", "copies", "--rounds", "1", "--sigma", "1e-3")
        last_json(invoke(tmp_path, *SMALL_RUN, *flags, "--out", told))
        largest[told] = max(sizes)
        sizes.clear()
    assert largest["64MB"] == 128  # of the test data
    assert 1 <= largest["200KB"] < 24  # less than a batch of all clients


def test_a_toml_file_has_strategy_and_memory_and_flags_win(tmp_path: Path, not_measured: None) -> None:
    (tmp_path / "options.toml").write_text('strategy = "streaming"\nmemory = "8MiB"\n')
    for name, flags, strategy, memory in (
        ("file", (), "streaming", 2**23),
        ("flags", ("--strategy", "stacked", "--memory", "9MB"), "stacked", 9_000_000),
    ):
        last_json(invoke(tmp_path, *SMALL_RUN[:1], "options.toml", *SMALL_RUN[1:], *flags, "--out", name))
        plan = plan_of(tmp_path / name)
        assert (plan["strategy"], plan["memory"]) == (strategy, memory)


@pytest.mark.parametrize("strategy", ["copies", "stacked"])
def test_what_was_measured_is_used_again_and_not_measured_again(
    tmp_path: Path, strategy: str, chosen: list[str], engines: list[dict[str, str | int]], request: Any
) -> None:
    chosen.append(strategy)
    outcome = invoke(tmp_path, *SMALL_RUN, "--out", "run")
    assert chosen == ["copies", "stacked"]
    assert planned(outcome) == [f"plan: {strategy} (passes a second: copies 1,234, stacked 1,234)"]
    recorded = plan_of(tmp_path / "run")
    assert recorded["strategy"] == strategy
    request.getfixturevalue("not_measured")
    cut(tmp_path / "run", 2)
    resumed = invoke(tmp_path, "resume", "run", "--json")
    assert last_json(resumed)["weights_sha256"] == last_json(outcome)["weights_sha256"]
    assert planned(resumed) == []
    assert last_json(invoke(tmp_path, "evaluate", "run", "--json"))["loss"] == last_json(outcome)["loss"]
    assert engines == [recorded] * 3


def test_a_run_from_before_strategies_goes_on_with_copies(
    tmp_path: Path, not_measured: None, engines: list[dict[str, str | int]]
) -> None:
    summary = last_json(invoke(tmp_path, *SMALL_RUN, "--strategy", "copies", "--out", "run"))
    path = tmp_path / "run/config.json"
    config = json.loads(path.read_text())
    for part, name in (("plan", "strategy"), ("plan", "activations"), ("command", "strategy"), ("command", "memory")):
        del config[part][name]
    path.write_text(json.dumps(config))
    cut(tmp_path / "run", 2)
    assert last_json(invoke(tmp_path, "resume", "run", "--json"))["weights_sha256"] == summary["weights_sha256"]
    assert last_json(invoke(tmp_path, "evaluate", "run", "--json"))["loss"] == summary["loss"]
    assert [plan["strategy"] for plan in engines] == ["copies"] * 3


# --- arrays of the user's own


def arrays() -> dict[str, npt.NDArray[np.generic]]:
    """Three classes that a linear cut tells apart, 60 + 15 examples."""
    labels = np.arange(75) % 3
    x = (np.random.default_rng(0).normal(size=(75, 5)) * 0.3 + np.eye(3, 5)[labels]).astype(np.float32)
    return {"x_train": x[:60], "y_train": labels[:60], "x_test": x[60:], "y_test": labels[60:]}


def save(path: Path, **changes: object) -> Path:
    """An .npz file of ``arrays`` with changes; None leaves an array out."""
    kept = {name: np.asarray(value) for name, value in (arrays() | changes).items() if value is not None}
    with path.open("wb") as file:
        np.savez(file, **kept)  # type: ignore[arg-type]  # numpy's stub takes a keyword for allow_pickle
    return path


def changed(name: str, where: int | tuple[int, ...], value: float) -> npt.NDArray[np.generic]:
    """One of ``arrays`` with one entry set."""
    array = arrays()[name].copy()
    array[where] = value
    return array


ARRAYS = ("train", "--dataset", "arrays", "--data", "mine.npz", *SMALL)


@pytest.mark.parametrize("partition", [("--partition", "iid"), ("--partition", "dirichlet", "--alpha", "0.1")])
def test_arrays_train_resume_and_evaluate(tmp_path: Path, partition: tuple[str, ...]) -> None:
    save(tmp_path / "mine.npz")
    summary = last_json(invoke(tmp_path, *ARRAYS, *partition, "--out", "run", "--json"))
    assert summary["parameters"] == 5 * 200 + 200 + 200 * 64 + 64 + 64 * 3 + 3
    sizes = json.loads((tmp_path / "run/config.json").read_text())["clients"]
    assert sum(sizes) == 60
    assert min(sizes) >= 1
    assert (sizes == [20, 20, 20]) == (partition[1] == "iid")
    assert last_json(invoke(tmp_path, "evaluate", "run", "--json"))["accuracy"] == summary["accuracy"]
    cut(tmp_path / "run", 3)
    assert last_json(invoke(tmp_path, "resume", "run", "--json"))["weights_sha256"] == summary["weights_sha256"]


def test_arrays_are_learned(tmp_path: Path) -> None:
    save(tmp_path / "mine.npz")
    options = ("--rounds", "60", "--num-directions", "20", "--lr", "0.03", "--ema", "0.9")
    summary = last_json(invoke(tmp_path, *ARRAYS, *options, "--out", "run", "--json"))
    assert isinstance(summary["accuracy"], float)
    assert summary["accuracy"] >= 0.8


def test_a_run_whose_data_is_gone_is_one_line(tmp_path: Path) -> None:
    save(tmp_path / "mine.npz")
    assert invoke(tmp_path, *ARRAYS, "--out", "run").code == 0
    (tmp_path / "mine.npz").unlink()
    for command in ("resume", "evaluate"):
        refused(invoke(tmp_path, command, "run"), "mine.npz", "no such file")
    assert invoke(tmp_path, "replay", "run").code == 0


# --- bad input

BAD_OPTIONS: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    (("--dataset", "digit"), ("dataset", "'digit'", "digits")),
    (("--model", "lenets"), ("model", "'lenets'", "lenet")),
    (("--model", "nosuch.module:build"), ("model", "nosuch.module:build", "nosuch")),
    (("--model", "math:nosuch"), ("model", "math:nosuch")),
    (("--model", "math:pi"), ("model", "math:pi", "callable")),
    (("--model", "a:cat:b"), ("model", "'a:cat:b'")),
    (("--model", "[red]"), ("model", "'[red]'")),
    (("--model", "two\nlines"), ("model",)),
    (("--nosuch", "3"), ("--nosuch",)),
    (("--clients", "many"), ("--clients", "integer")),
    (("--clients", "0"), ("clients = 0",)),
    (("--clients", "-3"), ("clients = -3",)),
    (("--clients", "1439"), ("clients = 1439", "1438")),
    (("--family", "rank2"), ("family", "'rank2'", "rank1")),
    (("--sharing", "none"), ("sharing", "'none'", "per-client")),
    (("--difference", "backward"), ("difference", "'backward'", "central")),
    (("--partition", "even"), ("partition", "'even'", "iid")),
    (("--optimizer", "lion"), ("optimizer", "'lion'", "adamw")),
    (("--schedule", "step"), ("schedule", "'step'", "cosine")),
    (("--num-directions", "0"), ("num_directions = 0",)),
    (("--num-directions", "-5"), ("num_directions = -5",)),
    (("--num-directions", "1.5"), ("--num-directions", "integer")),
    (("--num-directions", "99999999"), ("num_directions = 99999999",)),
    (("--sigma", "0"), ("sigma = 0.0",)),
    (("--sigma", "-0.001"), ("sigma = -0.001",)),
    (("--sigma", "nan"), ("sigma = nan",)),
    (("--sigma", "inf"), ("sigma = inf",)),
    (("--sigma", "1e39"), ("sigma = 1e+39",)),
    (("--sigma", "1e-50"), ("sigma = 1e-50",)),
    (("--lr", "nan"), ("lr = nan",)),
    (("--lr", "inf"), ("lr = inf",)),
    (("--lr", "0"), ("lr = 0.0",)),
    (("--lr", "-1"), ("lr = -1.0",)),
    (("--lr", "1e39"), ("lr = 1e+39",)),
    (("--alpha", "0"), ("alpha = 0.0",)),
    (("--alpha", "nan"), ("alpha = nan",)),
    (("--participation", "0"), ("participation = 0.0",)),
    (("--participation", "2"), ("participation = 2.0",)),
    (("--participation", "nan"), ("participation = nan",)),
    (("--batch-size", "0"), ("batch_size = 0",)),
    (("--rounds", "0"), ("rounds = 0",)),
    (("--rounds", "-1"), ("rounds = -1",)),
    (("--seed", "-1"), ("seed = -1",)),
    (("--seed", str(2**64)), (f"seed = {2**64}",)),
    (("--threads", "0"), ("threads = 0",)),
    (("--strategy", "fastest"), ("strategy = 'fastest'", "auto, copies, stacked, streaming")),
    (("--memory", "64"), ("memory = 64 bytes a thread", "at least")),
    (("--memory", "100KB"), ("memory = 100000 bytes a thread", "at least", "streaming")),
    (("--memory", "100KB", "--strategy", "copies"), ("memory = 100000 bytes a thread", "at least")),
    (("--memory", "1KiB", "--strategy", "streaming"), ("memory = 1024 bytes a thread", "at least")),
    *(
        (("--memory", value), (f"memory = {value!r}", "64MB, 64MiB or 64000000"))
        for value in ("", "much", "MB", "0", "0MB", "-1MB", "64 M", "64XB", "1,5MB", "1e6", "nan", "64MB 2")
    ),
    *(
        ((*flags, "--runtime", runtime), (f"{flags[0][2:]} = '{flags[1]}'", f"runtime torch with it, not {runtime}"))
        for flags in (("--strategy", "streaming"), ("--strategy", "copies"), ("--memory", "64MB"))
        for runtime in ("ort", "openvino", "auto")
    ),
    *(
        ((*flags, "--backprop", "fedsgd"), (f"{flags[0][2:]} = '{flags[1]}'", "none with backprop fedsgd"))
        for flags in (("--strategy", "stacked"), ("--memory", "64MB"))
    ),
    (("--evaluate-every", "0"), ("evaluate_every = 0",)),
    (("--snapshot-every", "0"), ("snapshot_every = 0",)),
    (("--ema", "1"), ("ema = 1.0",)),
    (("--ema", "nan"), ("ema = nan",)),
    (("--momentum", "0.9"), ("momentum = 0.9", "sgd")),
    (("--momentum", "1", "--optimizer", "sgd"), ("momentum = 1.0",)),
    (("--weight-decay", "-1"), ("weight_decay = -1.0",)),
    (("--clip-update", "0"), ("clip_update", "0.0")),
    (("--clip-scalars", "-2"), ("clip_scalars", "-2.0")),
    (("--local-steps", "0"), ("local_steps = 0",)),
    (("--local-steps", "2"), ("local_steps = 2", "adam", "local_lr")),
    (("--local-steps", "2", "--local-lr", "nan"), ("local_lr = nan",)),
    (("--local-steps", "2", "--local-lr", "0.1", "--sharing", "per-client"), ("local_steps", "per-client")),
    (("--data", "x.npz"), ("data", "'x.npz'", "arrays")),
    (("--dataset", "arrays"), ("arrays", "x_train")),
    (("--dataset", "arrays", "--data", "none.npz"), ("none.npz", "no such file")),
    (("--dataset", "arrays", "--data", "."), (".npz",)),
    (("--out", "../here/taken"), ("here/taken", "exists", "baffle resume")),
    (("--out", "../here/file"), ("here/file", "exists")),
    (("--out", "../here/file/run"), ("here/file/run",)),
    (("--out", "x" * 300), ("x" * 300, "too long")),
]


@pytest.mark.parametrize(("options", "words"), BAD_OPTIONS, ids=[" ".join(o)[:60] for o, _ in BAD_OPTIONS])
def test_a_bad_option_is_one_line(tmp_path: Path, options: tuple[str, ...], words: tuple[str, ...]) -> None:
    (tmp_path / "here/taken").mkdir(parents=True)
    (tmp_path / "here/file").write_text("")
    before = tree(tmp_path)
    out = () if "--out" in options else ("--out", "run")
    refused(invoke(tmp_path / "here", "train", *SMALL, *out, *options), *words)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (("nosuch",), ("'nosuch'",)),
        (("--nosuch",), ("--nosuch",)),
        (("trian", "--rounds", "3"), ("'trian'",)),
        (("resume",), ("RUN",)),
        (("replay", "run", "--block", "0"), ("--block", "1")),
        (("replay", "run", "--threads", "0"), ("--threads", "1")),
        (("resume", "run", "--rounds", "0"), ("--rounds", "1")),
        (("resume", "run", "extra"), ("extra",)),
    ],
)
def test_a_bad_command_is_one_line(run: Path, command: tuple[str, ...], words: tuple[str, ...]) -> None:
    before = tree(run.parent)
    refused(invoke(run.parent, *command), *words)
    assert tree(run.parent) == before


def test_no_command_shows_the_help(tmp_path: Path) -> None:
    outcome = invoke(tmp_path)
    assert "Usage" in outcome.out + outcome.err
    assert "error:  " not in outcome.err


def test_a_bad_option_is_one_line_in_a_process_of_its_own(tmp_path: Path) -> None:
    refused(spawn(tmp_path, "train", "--sigma", "nan", "--out", "run"), "sigma = nan")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"clint = 3", ("clint", "clients")),
        (b"[train]\nclients = 3", ("train",)),
        (b"clients = 'three'", ("clients", "'three'", "int")),
        (b"clients = true", ("clients", "True", "int")),
        (b"rounds = 2.5", ("rounds", "2.5", "int")),
        (b"lr = '0.1'", ("lr", "'0.1'", "float")),
        (b"strategy = 'fast'", ("strategy = 'fast'", "auto, copies, stacked, streaming")),
        (b"memory = 64000000", ("memory", "64000000", "str")),
        (b"memory = '64 apples'", ("memory = '64 apples'", "64MB")),
        (b"memory = '64MB'\nruntime = 'ort'", ("memory = '64MB'", "runtime torch")),
        (b"lr = nan", ("lr = nan",)),
        (b"sigma = 0", ("sigma = 0",)),
        (b"family = 'rank2'", ("family", "'rank2'", "rank1")),
        (b"family = 3", ("family", "3")),
        (b"model = 3", ("model", "3", "str")),
        (b"model = ['mlp']", ("model", "mlp", "str")),
        (b"seed = 99999999999999999999", ("seed = 99999999999999999999",)),
        (b"clients = ", ("options.toml", "TOML")),
        (b"clients = 3\nclients = 4", ("options.toml", "TOML")),
        (b"{\n", ("options.toml", "TOML")),
        (b"\xff\xfe", ("options.toml", "TOML")),
        (b"out = 'run'", ("out",)),
        (None, ("options.toml", "No such file")),
    ],
)
def test_a_bad_toml_file_is_one_line(tmp_path: Path, content: bytes | None, words: tuple[str, ...]) -> None:
    if content is not None:
        (tmp_path / "options.toml").write_bytes(content)
    before = tree(tmp_path)
    refused(invoke(tmp_path, "train", "options.toml", "--out", "run"), *words)
    assert tree(tmp_path) == before


def test_a_folder_is_no_toml_file(tmp_path: Path) -> None:
    refused(invoke(tmp_path, "train", ".", "--out", "run"), ".", "directory")


BAD_ARRAYS: dict[str, tuple[dict[str, object], tuple[str, ...]]] = {
    "NaN": ({"x_train": changed("x_train", (7, 2), np.nan)}, ("train.x[7, 2] = nan", "finite")),
    "infinity in test": ({"x_test": changed("x_test", (0, 4), np.inf)}, ("test.x[0, 4] = inf",)),
    "label out of range": ({"y_test": changed("y_test", 3, 7)}, ("test.y[3] = 7", "0..2")),
    "negative label": ({"y_train": changed("y_train", 5, -1)}, ("train.y[5] = -1",)),
    "enormous label": ({"y_train": changed("y_train", 5, 10**11)}, ("train.y[5] = 100000000000",)),
    "labels that are no integers": ({"y_train": np.linspace(0, 1, 60)}, ("train.y", "float")),
    "two labels an example": ({"y_train": np.zeros((60, 2), int)}, ("train.y",)),
    "two test labels an example": ({"y_test": np.zeros((15, 2), int)}, ("test.y",)),
    "unequal lengths": ({"y_train": np.zeros(59, int)}, ("train", "60", "59")),
    "missing key": ({"x_test": None}, ("x_test",)),
    "no examples": ({"x_train": np.zeros((0, 5)), "y_train": np.zeros(0, int)}, ("0 training",)),
    "other shape in test": ({"x_test": np.zeros((15, 4))}, ("(5,)", "(4,)")),
    "text": ({"x_train": np.array(["a"] * 60)}, ("train.x", "U1")),
    "numbers without shape": ({"x_train": np.zeros(60, np.float32), "x_test": np.zeros(15, np.float32)}, ()),
}


@pytest.mark.parametrize("name", BAD_ARRAYS)
def test_bad_arrays_are_one_line(tmp_path: Path, name: str) -> None:
    changes, words = BAD_ARRAYS[name]
    save(tmp_path / "mine.npz", **changes)
    before = tree(tmp_path)
    refused(invoke(tmp_path, *ARRAYS, "--out", "run"), *words)
    assert tree(tmp_path) == before


def test_integer_images_are_trained_on_or_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = {f"x_{s}": rng.integers(0, 255, (n, 5), dtype=np.uint8) for s, n in (("train", 60), ("test", 15))}
    save(tmp_path / "mine.npz", **images)
    before = tree(tmp_path)
    outcome = invoke(tmp_path, *ARRAYS, "--out", "run", "--json")
    if outcome.code != 0:
        refused(outcome, "mlp", "integer")
        assert tree(tmp_path) == before


def test_a_model_that_does_not_fit_the_data_is_one_line(tmp_path: Path) -> None:
    save(tmp_path / "mine.npz")
    before = tree(tmp_path)
    refused(invoke(tmp_path, *ARRAYS, "--model", "lenet-small", "--out", "run"), "lenet-small", "(5,)")
    assert tree(tmp_path) == before


def npy(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.zeros(3))


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"hello\n"),
        lambda path: path.write_bytes(save(path).read_bytes()[:400]),
        lambda path: flip(save(path), 300),
        npy,
        lambda path: path.mkdir(),
    ],
    ids=["empty", "text", "truncated", "edited", "npy", "folder"],
)
def test_what_is_no_npz_is_one_line(tmp_path: Path, write: Callable[[Path], object]) -> None:
    write(tmp_path / "mine.npz")
    before = tree(tmp_path)
    refused(invoke(tmp_path, *ARRAYS, "--out", "run"), "mine.npz")
    assert tree(tmp_path) == before


# --- damaged runs


@pytest.mark.parametrize("command", ["resume", "replay", "evaluate"])
def test_what_is_no_run_is_one_line(tmp_path: Path, command: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    before = tree(tmp_path)
    for path in ("empty", "file", "missing"):
        refused(invoke(tmp_path, command, path), path)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("round", ["5", "99999999999999999999"])
def test_replay_out_of_range(run: Path, round: str) -> None:
    refused(invoke(run.parent, "replay", "run", "--round", round), f"round = {round}", "0..4")


def test_replay_of_a_negative_round(run: Path) -> None:
    refused(invoke(run.parent, "replay", "run", "--round", "-1"), "--round", "0")


def test_replay_of_a_run_without_rounds(run: Path) -> None:
    (run / "rows.bin").write_bytes(b"")
    outcome = invoke(run.parent, "replay", "run")
    refused(outcome, "run")
    assert "-1" not in outcome.err


def test_a_truncated_run_replays_what_it_holds(run: Path) -> None:
    hashes = [m["weights_sha256"] for m in metrics(run)]
    cut(run, 3)
    assert invoke(run.parent, "replay", "run").out.split() == [hashes[2]]
    refused(invoke(run.parent, "replay", "run", "--round", "3"), "round = 3", "0..2")


def test_an_edited_run_is_reported_and_earlier_rounds_replay(run: Path) -> None:
    hashes = [m["weights_sha256"] for m in metrics(run)]
    flip(run / "rows.bin", places(run)[3].row + 200)
    before = {p: Path(p).read_bytes() for p in tree(run) if Path(p).is_file()}
    assert invoke(run.parent, "replay", "run", "--round", "2").out.split() == [hashes[2]]
    for arguments in (("replay", "run", "--round", "3"), ("replay", "run", "--round", "4"), ("replay", "run")):
        refused(invoke(run.parent, *arguments), "rows.bin", "round 3")
    refused(invoke(run.parent, "resume", "run"), "rows.bin", "round 3", "--repair")
    refused(invoke(run.parent, "evaluate", "run"), "rows.bin", "round 3")
    assert {p: Path(p).read_bytes() for p in tree(run) if Path(p).is_file()} == before
    summary = last_json(invoke(run.parent, "resume", "run", "--repair", "--json"))
    assert summary["weights_sha256"] == hashes[-1]
    assert (run / "rows.bin.damaged").read_bytes() == before[str(run / "rows.bin")]


def test_an_edited_learning_rate_is_reported(run: Path) -> None:
    text = (run / "config.json").read_text()
    (run / "config.json").write_text(text.replace('"lr": 0.01,\n      "beta1"', '"lr": 0.02,\n      "beta1"'))
    assert (run / "config.json").read_text() != text
    refused(invoke(run.parent, "resume", "run"), "config.json", "round 0")
    refused(invoke(run.parent, "replay", "run"), "config.json", "round 0")
    refused(invoke(run.parent, "replay", "run", "--round", "2"), "config.json", "round 0")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"dataset": "digits"', '"dataset": "digit"', ("digit",)),
        ('"model": "mlp"', '"model": "lenet-small"', ("same model",)),
        ('"command": {', '"command": {"nosuch": 1, ', ("config.json", "nosuch")),
        ('"threads": 1,', '"threads": "x",', ("config.json", "threads")),
        ('"num_directions": 4', '"num_directions": 0', ("config.json", "num_directions = 0")),
        ('"strategy": "copies"', '"strategy": "x"', ("strategy = 'x'", "copies")),
        ('"runtime": "torch",\n    "torch"', '"runtime": "tflite",\n    "torch"', ("runtime = 'tflite'", "torch")),
        ('"threads": 1,\n    "clients"', '"threads": "x",\n    "clients"', ("threads = 'x'", "integer")),
    ],
)
def test_an_edited_configuration_is_one_line(run: Path, old: str, new: str, words: tuple[str, ...]) -> None:
    text = (run / "config.json").read_text()
    assert old in text
    (run / "config.json").write_text(text.replace(old, new))
    refused(invoke(run.parent, "resume", "run"), *words)


def test_an_edited_metrics_line_is_reported(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join([*lines[:2], lines[2][:40] + "\n", *lines[3:]]))
    refused(invoke(run.parent, "resume", "run"), "metrics.jsonl", "line 3")
    assert invoke(run.parent, "replay", "run", "--round", "3").code == 0  # needs the rows alone
    assert invoke(run.parent, "replay", "run", "--round", "1").code == 0


def test_edited_initial_weights_are_reported(run: Path) -> None:
    flip(run / "initial.safetensors", -10)
    for command in ("resume", "replay", "evaluate"):
        refused(invoke(run.parent, command, "run"), "initial.safetensors", "round 0")
    (run / "initial.safetensors").write_bytes(b"nothing")
    for command in ("resume", "replay", "evaluate"):
        refused(invoke(run.parent, command, "run"), "initial.safetensors")


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
