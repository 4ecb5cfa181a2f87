"""``--help``, and one line for commands that do not exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from baffle.training.options import TrainConfig
from cli_helpers import refused
from helpers import Outcome, invoke, spawn, tree

pytestmark = pytest.mark.usefixtures("no_network", "no_environment")


def test_help_of_every_command(tmp_path: Path) -> None:
    for command in ((), ("train",), ("resume",), ("replay",), ("evaluate",)):
        outcome = invoke(tmp_path, *command, "--help")
        assert outcome.code == 0
        assert "Usage" in outcome.out
    assert "--num-directions" in invoke(tmp_path, "train", "--help").out


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


OPTIONS: dict[str, set[str]] = {
    "train": {"out", "json", "tensorboard", *(field.replace("_", "-") for field in TrainConfig.__struct_fields__)},
    "resume": {"rounds", "repair", "tensorboard", "json"},
    "status": {"watch", "json"},
    "replay": {"round", "threads", "block", "slow", "json"},
    "evaluate": {"json"},
    "report": {"out", "json"},
    "compare": {"out", "json"},
    "node": {
        *(
            "superlink",
            "data",
            "name",
            "bundle",
            "model",
            "threads",
            "strategy",
            "memory",
            "root-certificates",
            "insecure",
            "key",
        ),
        *("only-secure", "minimum-cohort", "trust"),
    },
    "up": {
        *("clients", "out", "secure", "folder", "tensorboard", "downlink", "quorum", "deadline", "json"),
    },
    "app": {"json"},
    "export": {
        *("to", "out", "dataset", "data", "activation", "norm", "start", "trainable", "prune", "prune-by", "seed"),
        *("precision", "branches", "credit", "head", "json"),
    },
    "calibrate": {
        *("dataset", "data", "model", "activation", "norm", "start", "trainable", "prune", "prune-by", "seed"),
        *("runtime", "precision", "branches", "lattice", "family", "difference", "batch-size", "num-directions"),
        *("plot", "json"),
    },
    "models": {"batch-size", "threads", "seconds", "json"},
    "data": {
        *("dataset", "data", "clients", "partition", "alpha", "shards", "holdout", "seed"),
        *("plot", "json"),
    },
}


def plain_text(outcome: Outcome) -> str:
    assert (outcome.code, outcome.err) == (0, "")
    return re.sub(r"\x1b\[[0-9;]*m", "", outcome.out)


@pytest.mark.parametrize("command", OPTIONS)
def test_help_names_every_option_once(tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for width in ("75", "105", "115", "80"):  # wherever lines break
        monkeypatch.setenv("COLUMNS", width)
        text = plain_text(invoke(tmp_path, command, "--help"))
        named = re.findall(r"^[│|][ *]*--([\w-]+)", text, re.MULTILINE)
        assert sorted(named) == sorted([*OPTIONS[command], "help"])
    assert len(text.split("Options")[0].split()) > 12  # it says what it is for


def test_help_names_every_command(tmp_path: Path) -> None:
    text = plain_text(invoke(tmp_path, "--help"))
    assert re.findall(r"^[│|] +([a-z]+)  ", text, re.MULTILINE) == list(OPTIONS)


WATCHED = """
import sys
network = []
sys.addaudithook(lambda event, arguments: network.append(event) if event.startswith("socket.") else None)
from baffle import cli
for line in sys.argv[1:]:
    sys.argv = ["baffle", *line.split()]
    try:
        cli.main()
    except SystemExit as exit:
        assert not exit.code, line
print(sorted({"torch", "matplotlib", "sklearn"} & sys.modules.keys()), network, file=sys.stderr)
"""


def test_help_and_the_list_of_data_wait_for_neither_torch_nor_a_network(tmp_path: Path) -> None:
    lines = ["--help", *(f"{command} --help" for command in OPTIONS), "data", "data --json"]
    process = subprocess.run(
        [sys.executable, "-c", WATCHED, *lines], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert process.stderr == "[] []\n"
    assert process.stdout.count("Usage: baffle") == len(OPTIONS) + 1
