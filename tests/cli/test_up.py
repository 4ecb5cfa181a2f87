"""``baffle up``: a federation on this machine, from its start to the end of all its processes."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from baffle.runfolder.clients import read_members, read_rounds
from helpers import Outcome, invoke, start

OPTIONS = 'model = "mlp"\nrounds = 4\nbatch-size = 4\nnum-directions = 2\nsigma = 1e-3\nevaluate-every = 2\n'
LIMIT = 240  # seconds: it takes about 15 where nothing else runs


def processes_of(folder: Path) -> list[int]:
    """Processes that a folder is named to, as the parts of a federation are told theirs; this one is not."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if b"FLWR_HOME=" + os.fsencode(folder) in (place / "environ").read_bytes():
                found.append(int(place.name))
    return found


def children_of(pid: int) -> set[int]:
    with suppress(OSError):
        found = {int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}
        return found.union(*map(children_of, found))
    return set()


@contextmanager
def up(folder: Path, *arguments: str | Path) -> Iterator[subprocess.Popen[str]]:
    """``baffle up`` as a process; whatever the test does, it is ended."""
    process = start(folder, "up", *arguments, env={"TMPDIR": str(folder)})
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            process.communicate(timeout=30)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "mine.toml").write_text(OPTIONS)
    return Path("mine.toml")


def test_it_trains_and_ends(tmp_path: Path, config: Path) -> None:
    with up(tmp_path, config, "--clients", "2", "--out", "run", "--tensorboard", "--json") as process:
        out, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, err
    summary = json.loads(out)
    replayed = json.loads(invoke(tmp_path, "replay", "run", "--json").out)
    assert (summary["rounds"], summary["clients"]) == (4, 2)
    assert summary["weights_sha256"] == replayed["weights_sha256"]
    run = tmp_path / "run"
    assert [member.name for member in read_members(run)] == ["client-0000", "client-0001"]
    assert all(visit.outcome == "ok" for log in read_rounds(run) for visit in log.visits)
    assert summary == json.loads((run / "summary.json").read_text())
    assert len(list((run / "events").iterdir())) == 1
    keys = sorted((run / "keys").iterdir())
    assert [key.name for key in keys] == ["client-0000.key", "client-0001.key"]
    assert all(key.stat().st_mode & 0o077 == 0 for key in keys)
    assert "starting client 2 of 2" in err
    assert "done, round 4 of 4" in err
    assert processes_of(tmp_path) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.toml", "run"]

    (tmp_path / config).write_text(OPTIONS.replace("rounds = 4", "rounds = 6"))
    with up(tmp_path, config, "--clients", "2", "--out", "run") as process:  # the same command continues
        out, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, err
    assert re.search(r"rounds +│ 6 ", out)
    assert [log.round for log in read_rounds(run)] == [0, 1, 2, 3, 4, 5, 6]
    assert len(read_members(run)) == 2
    assert processes_of(tmp_path) == []


def test_without_a_run_it_says_how_to_start_one(tmp_path: Path, config: Path) -> None:
    with up(tmp_path, config, "--clients", "1", "--folder", "place", "--quorum", "0.25") as process:
        assert process.stdout is not None
        told = []
        for line in process.stdout:
            told.append(line)
            if line.startswith("Ctrl-C"):
                break
        began = children_of(process.pid)
        assert len(began) >= 3  # SuperLink, SuperExec, client
        (command,) = [line.strip() for line in told if " flwr run " in line]
        words = shlex.split(command)
        assert f"FLWR_HOME={tmp_path / 'place/flwr'}" in words
        assert {f'config="{tmp_path / "mine.toml"}"', "clients=1", "quorum=0.25"} <= set(words)
        listed = re.sub(" run .*", " list local --format json", command)  # a federation is there
        done = subprocess.run(listed, shell=True, capture_output=True, text=True, timeout=LIMIT, check=False)
        assert '"success": true' in done.stdout, done
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    give_up = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in began) and time.monotonic() < give_up:
        time.sleep(0.1)
    assert not [pid for pid in began if Path(f"/proc/{pid}").exists()]
    assert (tmp_path / "place/client-0000.npz").exists()


def test_a_run_that_fails_is_told(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text(OPTIONS + 'start = "/nowhere/to.safetensors"\n')
    with up(tmp_path, "bad.toml", "--clients", "1", "--out", "run") as process:
        out, err = process.communicate(timeout=LIMIT)
    assert (process.returncode, out) == (2, "")
    last = err.splitlines()[-1]
    assert last.startswith("error: the run failed (failed): ")
    assert "/nowhere/to.safetensors" in last
    assert processes_of(tmp_path) == []


def refused(outcome: Outcome, words: str) -> None:
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1), outcome
    assert words in outcome.err


def test_what_cannot_work_is_refused_before_anything_is_started(tmp_path: Path, config: Path) -> None:
    def refuse(words: str, *arguments: str) -> None:
        refused(invoke(tmp_path, "up", *arguments), words)

    refuse("downlink = 'x': expected one of replay, weights", "--downlink", "x")
    refuse("out = None", "--json")
    refuse("nothing.toml: cannot be read", "nothing.toml")
    (tmp_path / "relative.toml").write_text('dataset = "arrays"\ndata = "mine.npz"\n')
    refuse("data = 'mine.npz': expected an absolute path", "relative.toml")
    (tmp_path / "baseline.toml").write_text('backprop = "fedsgd"\n')
    refuse("backprop = 'fedsgd': expected none", "baseline.toml")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/clients.json").write_text('[{"name": "elsewhere", "identity": "ab", "examples": 3}]')
    refuse("out = 'run': expected a new folder", str(config), "--out", "run")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["baseline.toml", "mine.toml", "relative.toml", "run"]
