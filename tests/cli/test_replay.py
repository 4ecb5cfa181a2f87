"""``baffle replay``: the logged hash of every round, and what it says of damaged runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli_helpers import cut, last_json, metrics, refused
from helpers import Outcome, flip, invoke, places, tree


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
    flip(run / "rows.bin", places(run)[3].row + 60)
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
