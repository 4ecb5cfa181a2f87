"""Processes that are killed: whatever the moment, resuming gives the weights of an undisturbed run.

A moment is hit exactly, however fast the machine: the model itself stops its process (SIGSTOP) in a forward pass
once the journal holds N lines, and the test, which waits for that, then sends the signal.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import baffle as bf
from helpers import Outcome, invoke, spawn, start

ROUNDS = 40
OPTIONS = (
    *("--rounds", str(ROUNDS), "--snapshot-every", "10", "--out", "r", "--json"),
    *("--num-directions", "20", "--batch-size", "8", "--clients", "4", "--threads", "1"),
    *("--strategy", "copies"),  # not measured: undisturbed runs are compared with others
)

STOPS = '''
"""The model mlp, whose forward pass stops the process once the run has as many lines of metrics as STOP_AT says."""

import os
import signal

from baffle.models import mlp
from torch import Tensor, nn

at = int(os.environ.get("STOP_AT", 0))


class Stops(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        global at
        if at and os.path.exists("r/metrics.jsonl"):
            with open("r/metrics.jsonl", "rb") as file:
                if file.read().count(b"\\n") >= at:
                    at = 0
                    os.kill(os.getpid(), signal.SIGSTOP)
        return super().forward(x)


def build(shape: tuple[int, ...], classes: int) -> nn.Module:
    return Stops(*mlp(shape, classes))
'''


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """The summary of a run that nothing happened to: the plain model, which computes the same."""
    return summary_of(spawn(tmp_path_factory.mktemp("undisturbed"), "train", "--model", "mlp", *OPTIONS))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working directory with the model that stops."""
    (tmp_path / "stops.py").write_text(STOPS)
    return tmp_path


def summary_of(outcome: Outcome) -> dict[str, object]:
    assert outcome.code == 0, outcome.err
    summary: dict[str, object] = json.loads(outcome.out.splitlines()[-1])
    return summary


@contextmanager
def stopped(
    folder: Path, at: int, *arguments: str, sigint: signal.Handlers = signal.SIG_DFL
) -> Iterator[subprocess.Popen[str]]:
    """A ``baffle`` process, stopped in a forward pass of round ``at``; ended at the latest when this ends."""
    process = start(folder, *arguments, env={"STOP_AT": str(at), "PYTHONPATH": python_path(folder)}, sigint=sigint)
    try:
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        if not os.WIFSTOPPED(status):
            process.returncode = os.waitstatus_to_exitcode(status)
            pytest.fail(f"ended before it stopped: {process.communicate()}")
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def kill_at(folder: Path, at: int, *arguments: str) -> None:
    """Start ``baffle``, and ``kill -9`` it in the middle of round ``at``."""
    with stopped(folder, at, *arguments) as process:
        process.kill()
        process.wait()
        assert process.returncode == -signal.SIGKILL
    assert len((folder / "r/metrics.jsonl").read_bytes().splitlines()) == at


def python_path(folder: Path) -> str:
    return os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])


def resume(folder: Path) -> dict[str, object]:
    return summary_of(spawn(folder, "resume", "r", "--json", env={"PYTHONPATH": python_path(folder)}))


def same(resumed: dict[str, object], undisturbed: dict[str, object]) -> None:
    """All but the times are those of the undisturbed run."""
    assert {k: v for k, v in resumed.items() if k not in ("seconds", "peak_rss_mb")} == {
        k: v for k, v in undisturbed.items() if k not in ("seconds", "peak_rss_mb")
    }


@pytest.mark.parametrize("at", [1, 25])
def test_a_killed_run_resumes_to_the_same_weights(folder: Path, undisturbed: dict[str, object], at: int) -> None:
    kill_at(folder, at, "train", "--model", "stops:build", *OPTIONS)
    journal = bf.Journal.open(folder / "r")
    assert journal.damage is None
    assert [r.round for r in journal.records] == list(range(at))
    snapshots = sorted(file.name for file in (folder / "r/snapshots").iterdir())
    assert snapshots == [f"{n:08d}.safetensors" for n in (10, 20) if n <= at]
    assert not (folder / "r/model.safetensors").exists()
    assert invoke(folder, "replay", "r").out.split() == [journal.records[-1].weights_sha256]
    same(resume(folder), undisturbed)
    lines = [json.loads(line) for line in (folder / "r/metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == list(range(ROUNDS + 1))
    assert (folder / "r/model.safetensors").exists()
    assert sorted(p.name for p in folder.iterdir() if p.name not in ("stops.py", "__pycache__")) == ["r"]


def test_a_resume_that_is_killed_resumes_again(folder: Path, undisturbed: dict[str, object]) -> None:
    kill_at(folder, 9, "train", "--model", "stops:build", *OPTIONS)
    kill_at(folder, 17, "resume", "r")
    same(resume(folder), undisturbed)


def test_a_kill_while_rows_are_written_resumes(folder: Path, undisturbed: dict[str, object]) -> None:
    """What a kill between the two writes of a round leaves: a whole line of metrics, half a row."""
    kill_at(folder, 9, "train", "--model", "stops:build", *OPTIONS)
    rows = folder / "r/rows.bin"
    rows.write_bytes(rows.read_bytes()[:-100])
    assert len(bf.Journal.open(folder / "r").rows) == 8
    same(resume(folder), undisturbed)


def test_a_plain_run_killed_at_no_chosen_moment_resumes(tmp_path: Path, undisturbed: dict[str, object]) -> None:
    process = start(tmp_path, "train", "--model", "mlp", *OPTIONS)
    metrics = tmp_path / "r/metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 3):
        time.sleep(0.005)
    process.kill()
    process.communicate()
    assert len(bf.Journal.open(tmp_path / "r").rows) >= 3 - 1
    same(summary_of(spawn(tmp_path, "resume", "r", "--json")), undisturbed)


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_end_says_how_to_resume(
    folder: Path, undisturbed: dict[str, object], sent: signal.Signals, code: int
) -> None:
    with stopped(folder, 5, "train", "--model", "stops:build", *OPTIONS) as process:
        process.send_signal(sent)
        process.send_signal(signal.SIGCONT)
        out, err = process.communicate()
    assert process.returncode == code
    assert "baffle resume" in err.splitlines()[-1]
    assert "Traceback" not in err
    assert out == ""
    assert len(bf.Journal.open(folder / "r").rows) == 5
    same(resume(folder), undisturbed)


def test_a_background_job_ends_on_sigterm(folder: Path) -> None:
    """A shell starts background jobs with SIGINT ignored."""
    with stopped(folder, 5, "train", "--model", "stops:build", *OPTIONS, sigint=signal.SIG_IGN) as process:
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGCONT)
        _, err = process.communicate()
    assert process.returncode == 143
    assert "baffle resume" in err.splitlines()[-1]


@pytest.mark.slow
def test_kills_at_random_moments_until_the_run_is_done(tmp_path: Path, undisturbed: dict[str, object]) -> None:
    rng = random.Random(0)
    command: tuple[str, ...] = ("train", "--model", "mlp", *OPTIONS)
    for _ in range(30):
        process = start(tmp_path, *command)
        try:
            process.wait(timeout=rng.uniform(0.5, 5))
        except subprocess.TimeoutExpired:
            process.kill()
        process.communicate()
        if (tmp_path / "r").exists():
            journal = bf.Journal.open(tmp_path / "r")
            assert journal.damage is None
            list(journal.states())  # raises if a row does not fit
            command = ("resume", "r")
    same(summary_of(spawn(tmp_path, *command, *(() if "--json" in command else ("--json",)))), undisturbed)
