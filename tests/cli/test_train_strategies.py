"""``baffle train``: how passes are evaluated is measured, recorded, and used again."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import baffle as bf
from baffle.runtimes import Runtime
from baffle.runtimes.pytorch.replica import Replica
from baffle.training import build as assemble
from cli_helpers import SMALL_RUN, cut, last_json
from helpers import Outcome, invoke


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
