"""Event files for TensorBoard, read back by its own loader: each round once, whatever happened to the run."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

import baffle as bf
from baffle.errors import JournalError, MissingExtraError
from baffle.report.events import EventLog
from baffle.runfolder.clients import RoundLog, Visit
from baffle.runfolder.metrics import Record, encode_record
from helpers import digits_engine, initial_weights, invoke, train_digits

METHOD = bf.Method(num_directions=2, batch_size=4)
RECORD = Record(
    round=0,
    applied=True,
    restores=None,
    loss=0.5,
    accuracy=0.75,
    lr=0.25,
    sigma=0.125,
    exponent=-4,
    clip_factor=1.0,
    scalar_rms=2.0,
    participants=3,
    clipped=1,
    nonfinite=0,
    forward_passes=12,
    samples_forwarded=24,
    bytes_up=100,
    bytes_down=200,
    seconds=1.5,
    weights_sha256="00",
)


def record(round: int, **changes: object) -> Record:
    return msgspec.structs.replace(RECORD, round=round, **changes)


def log(round: int, *visits: Visit, time: float = 1e9) -> RoundLog:
    return RoundLog(round=round, seconds=2.0, visits=visits, time=time, late=1)


def write_folder(run: Path, records: Sequence[Record], logs: Sequence[RoundLog] = ()) -> None:
    """The two files of a run folder that event files are made from."""
    run.mkdir(exist_ok=True)
    (run / "metrics.jsonl").write_bytes(b"".join(map(encode_record, records)))
    if logs:
        (run / "clients.jsonl").write_bytes(b"".join(msgspec.json.encode(line) + b"\n" for line in logs))


def read(folder: Path) -> dict[int, dict[str, float]]:
    """Every scalar by step, from all files; no step has two events."""
    found: dict[int, dict[str, float]] = {}
    for file in sorted(folder.iterdir()):
        for event in EventFileLoader(str(file)).Load():
            values = {value.tag: value.tensor.float_val[0] for value in event.summary.value}
            if values:
                assert event.step not in found
                found[event.step] = values
    return found


def times(folder: Path) -> dict[int, float]:
    (file,) = folder.iterdir()
    return {event.step: event.wall_time for event in EventFileLoader(str(file)).Load() if event.summary.value}


def test_a_record_becomes_scalars(tmp_path: Path) -> None:
    with EventLog(tmp_path / "events", None) as events:
        events.add(record(0))
        events.add(record(1, loss=None, accuracy=None, seconds=None, bytes_up=None))
        events.add(record(2, loss=math.inf))
        found = read(tmp_path / "events")  # it can be watched meanwhile
    assert found[0] == {
        "evaluation/loss": 0.5,
        "evaluation/accuracy": 0.75,
        "update/lr": 0.25,
        "update/sigma": 0.125,
        "update/scalar_rms": 2.0,
        "update/clip_factor": 1.0,
        "update/clipped": 1.0,
        "update/nonfinite": 0.0,
        "cost/participants": 3.0,
        "cost/forward_passes": 12.0,
        "cost/bytes_up": 100.0,
        "cost/bytes_down": 200.0,
        "cost/seconds": 1.5,
    }
    unknown = {"evaluation/loss", "evaluation/accuracy", "cost/seconds", "cost/bytes_up"}
    assert found[1].keys() == found[0].keys() - unknown
    assert found[2].keys() == found[0].keys() - {"evaluation/loss"}


def test_what_rounds_took_of_clients(tmp_path: Path) -> None:
    visits = (
        Visit(client=0, outcome="ok", seconds=0.25),
        Visit(client=1, outcome="ok", seconds=0.75),
        Visit(client=2, outcome="late"),
        Visit(client=3, outcome="refused"),
        Visit(client=4, outcome="failed", seconds=0.5),
        Visit(client=5, outcome="offline"),
    )
    write_folder(tmp_path, [record(0), record(1)], [log(0, *visits), log(1, Visit(client=5, outcome="offline"))])
    with EventLog(tmp_path / "events", tmp_path) as events:
        events.add(record(1))
        with (tmp_path / "clients.jsonl").open("ab") as file:
            file.write(msgspec.json.encode(log(2, visits[0], time=2e9)) + b"\n")
        events.add(record(2))
    found = read(tmp_path / "events")
    assert {tag: value for tag, value in found[0].items() if tag.startswith("clients/")} == {
        "clients/ok": 2.0,
        "clients/late": 1.0,
        "clients/refused": 1.0,
        "clients/failed": 1.0,
        "clients/offline": 1.0,
        "clients/late_answers": 1.0,
        "clients/refused_answers": 0.0,
        "clients/slowest_answer": 0.75,
        "clients/seconds": 2.0,
    }
    assert "clients/slowest_answer" not in found[1]
    assert (found[1]["clients/offline"], found[2]["clients/ok"]) == (1.0, 1.0)
    assert times(tmp_path / "events") == {0: 1e9, 1: 1e9, 2: 2e9}


def test_a_resume_writes_no_round_twice(tmp_path: Path) -> None:
    run, folder = tmp_path / "run", tmp_path / "run/events"

    def go_on(rounds: int) -> None:
        with EventLog(folder, run) as events:
            bf.resume(run, digits_engine(), rounds=rounds, progress=events.add)

    with EventLog(folder, run) as events:
        bf.train(METHOD, digits_engine(), initial_weights(), rounds=2, out=run, progress=events.add)
    assert read(folder).keys() == {0, 1, 2}
    (first,) = folder.iterdir()
    with first.open("r+b") as file:
        file.truncate(first.stat().st_size - 5)  # a kill
    bf.resume(run, digits_engine(), rounds=3)  # without event files
    (folder / "events.out.tfevents.1.mine").write_bytes(b"")  # another's: stays
    go_on(5)
    assert read(folder).keys() == {0, 1, 2, 3, 4, 5}
    assert not first.exists()
    assert (folder / "events.out.tfevents.1.mine").exists()
    go_on(5)  # nothing is left to do
    assert read(folder).keys() == {0, 1, 2, 3, 4, 5}
    for line in bf.Journal.open(run).records:
        assert read(folder)[line.round]["update/lr"] == pytest.approx(line.lr)


def test_event_files_of_a_run_that_had_none(tmp_path: Path) -> None:
    train_digits(tmp_path / "run", rounds=3)
    with EventLog(tmp_path / "run/events", tmp_path / "run"):
        pass
    assert read(tmp_path / "run/events").keys() == {0, 1, 2, 3}


def test_without_a_folder_nothing_is_written(tmp_path: Path) -> None:
    with EventLog(None, tmp_path) as events:
        events.add(record(0))
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_fails_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), EventLog(tmp_path / "run/events", tmp_path / "run"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(JournalError, match="cannot write events: Not a directory"),
        EventLog(tmp_path / "file/events", None) as events,
    ):
        events.add(record(0))


def test_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard.summary.writer", None)
    with pytest.raises(MissingExtraError, match=r"baffle\[tensorboard\]"):
        EventLog(tmp_path / "events", None)
    out = invoke(tmp_path, "train", "--model", "mlp", "--rounds", "1", "--out", "run", "--tensorboard")
    assert (out.code, list(tmp_path.iterdir())) == (2, [])
    assert "baffle[tensorboard]" in out.err


def test_neither_torch_nor_tensorflow_is_imported() -> None:
    code = (
        "import sys; from pathlib import Path; from baffle.report.events import EventLog; EventLog(Path('x'), None);"
        "sys.exit(bool({'torch', 'tensorflow', 'matplotlib'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_train_and_resume_write_them(tmp_path: Path) -> None:
    small = ("--model", "mlp", "--clients", "2", "--batch-size", "4", "--num-directions", "2", "--threads", "1")
    made = invoke(tmp_path, "train", *small, "--rounds", "2", "--out", "run", "--tensorboard", "--json")
    assert made.code == 0, made.err
    assert read(tmp_path / "run/events").keys() == {0, 1, 2}
    again = invoke(tmp_path, "resume", "run", "--rounds", "4", "--tensorboard", "--json")
    assert again.code == 0, again.err
    found = read(tmp_path / "run/events")
    assert found.keys() == {0, 1, 2, 3, 4}
    assert "clients/ok" not in found[0]
    base = invoke(tmp_path, "train", *small, "--rounds", "2", "--backprop", "fedsgd", "--out", "b", "--tensorboard")
    assert base.code == 0, base.err
    assert 2 in read(tmp_path / "b/events")
