"""What ``baffle train`` decides where nothing is set: told, recorded, and the same when the run is continued."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli_helpers import config, cut, last_json, refused
from helpers import Outcome, copy_run, invoke

pytestmark = pytest.mark.usefixtures("no_network", "no_environment")

ARGUMENTS = ("train", "--model", "mlp", "--clients", "3", "--batch-size", "16", "--rounds", "4", "--threads", "1")


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """A run without any option of the method."""
    folder = tmp_path_factory.mktemp("usual")
    return folder / "run", invoke(folder, *ARGUMENTS, "--snapshot-every", "2", "--json", "--out", "run")


def test_the_choice_is_told_and_recorded(usual: tuple[Path, Outcome]) -> None:
    run, outcome = usual
    [plan] = [line for line in outcome.err.splitlines() if line.startswith("plan: ")]
    assert plan == (
        "plan: a number per row, through a head on each layer; 6 passes over each example, 13,220 numbers of 8 bits "
        "(13,220 bytes)"
    )
    command, method = config(run)["command"], config(run)["method"]
    decided = {"num_directions": 5, "slices": 8, "bits": 8}
    assert {name: command[name] for name in decided} == {name: method[name] for name in decided} == decided
    assert (command["credit"], command["head"], command["lr"], method["optimizer"]["lr"]) == (
        *("local", "exact"),
        *(0.03, 0.03),
    )


def test_the_summary_says_what_a_reply_is(usual: tuple[Path, Outcome]) -> None:
    summary = last_json(usual[1])
    assert (summary["passes_per_example"], summary["numbers_per_reply"], summary["bits"]) == (6, 13_220, 8)
    assert summary["numbers_of"] == "10,560 of rows (2 units), 2,660 of gradients (2 units)"


def test_status_says_what_a_reply_is(usual: tuple[Path, Outcome]) -> None:
    status = last_json(invoke(usual[0].parent, "status", "run", "--json"))
    assert (status["passes_per_example"], status["numbers_per_reply"], status["bits"]) == (6, 13_220, 8)
    drawn = " ".join(invoke(usual[0].parent, "status", "run").out.split())
    assert "passes 6 over each example of a mini-batch" in drawn
    assert "reply 13,220 numbers of 8 bits: 10,560 of rows" in drawn


def test_a_run_by_default_is_continued_to_the_same_bits(usual: tuple[Path, Outcome], tmp_path: Path) -> None:
    run = copy_run(usual[0], tmp_path / "run")
    cut(run, 2)
    resumed = last_json(invoke(tmp_path, "resume", "run", "--json"))
    assert resumed["weights_sha256"] == last_json(usual[1])["weights_sha256"]


def test_what_was_decided_may_as_well_be_set(usual: tuple[Path, Outcome], tmp_path: Path) -> None:
    numbers = ("--num-directions", "5", "--slices", "8", "--bits", "8", "--lr", "0.03")
    outcome = invoke(tmp_path, *ARGUMENTS, "--credit", "local", *numbers, "--json", "--out", "run")
    assert last_json(outcome)["weights_sha256"] == last_json(usual[1])["weights_sha256"]


def test_one_number_that_is_set_changes_no_other(tmp_path: Path) -> None:
    assert invoke(tmp_path, *ARGUMENTS, "--rounds", "1", "--num-directions", "2", "--out", "run").code == 0
    method = config(tmp_path / "run")["method"]
    assert [method[name] for name in ("num_directions", "slices", "bits")] == [2, 8, 8]


def test_slices_are_no_more_than_the_smallest_client_has_examples(tmp_path: Path) -> None:
    uneven = ("--clients", "10", "--partition", "dirichlet", "--alpha", "0.1")
    assert invoke(tmp_path, *ARGUMENTS, *uneven, "--rounds", "1", "--out", "run").code == 0
    found = config(tmp_path / "run")
    assert found["method"]["slices"] == min(found["clients"]) < 8
    refused(invoke(tmp_path, *ARGUMENTS, *uneven, "--slices", "8"), "slices = 8", f"{min(found['clients'])} examples")


@pytest.mark.parametrize(
    "options",
    [
        ("--sharing", "per-client"),
        ("--family", "gaussian"),
        ("--difference", "central"),
        ("--lattice", "1"),
        ("--local-steps", "2", "--local-lr", "0.01"),
        ("--prune", "0.5"),
        ("--precision", "bf16"),
        ("--trainable", "head"),
    ],
)
def test_options_that_work_with_rows_keep_them(options: tuple[str, ...], tmp_path: Path) -> None:
    outcome = invoke(tmp_path, *ARGUMENTS, *options, "--rounds", "2", "--json", "--out", "run")
    assert outcome.code == 0, outcome.err
    assert config(tmp_path / "run")["command"]["credit"] == "local"
    assert last_json(outcome)["updates"] == 2


@pytest.mark.parametrize(("option", "value"), [("strategy", "stacked"), ("memory", "64MB"), ("head", "directions")])
def test_options_about_one_scalar_fall_back_or_are_refused(option: str, value: str, tmp_path: Path) -> None:
    outcome = invoke(tmp_path, *ARGUMENTS, f"--{option}", value, "--rounds", "1", "--out", "run")
    assert f"plan: a scalar per direction (no rows: {option} = {value} is about that alone); 101 passes" in outcome.err
    assert config(tmp_path / "run")["command"]["credit"] == "global"
    refused(invoke(tmp_path, *ARGUMENTS, f"--{option}", value, "--credit", "local"), f"{option} = '{value}'")
