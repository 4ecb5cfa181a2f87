"""What ``status`` reads from small run folders made by hand."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from baffle.errors import JournalError
from baffle.report.status import ClientStatus, Status, read_status
from baffle.runfolder.journal import Journal
from baffle.runfolder.metrics import Record, encode_record
from helpers import invoke, train_digits
from status_helpers import LOGS, changed, lines, text


def test_a_summary_worked_by_hand(deployed: Path) -> None:
    assert read_status(deployed) == Status(
        run=str(deployed),
        stage="training",
        round=2,
        rounds=4,
        evaluated=1,
        loss=1.0,
        accuracy=0.5,
        time=1020.0,
        seconds=12.0,
        seconds_per_round=5.0,
        bytes_up=90,
        bytes_down=900,
        bytes_up_per_round=30.0,
        bytes_down_per_round=300.0,
        passes_per_example=5,
        numbers_per_reply=4,
        bits=15,
        numbers_of="4 of the loss (1 unit)",
        late_answers=1,
        refused_answers=1,
        participants=1,
        clients=(
            ClientStatus(
                number=0,
                name="a",
                examples=100,
                last_seen=1020.0,
                asked=3,
                answered=3,
                bytes_up=30,
                bytes_down=200,
                seconds=0.3,
                outcome="ok",
            ),
            ClientStatus(
                number=1,
                name="b",
                examples=200,
                last_seen=1000.0,
                asked=2,
                answered=1,
                late=1,
                bytes_up=11,
                bytes_down=150,
                seconds=0.4,
                outcome="late",
            ),
            ClientStatus(
                number=2,
                name="c",
                examples=300,
                last_seen=1020.0,
                asked=2,
                refused=1,
                failed=1,
                offline=1,
                bytes_up=17,
                bytes_down=130,
                outcome="failed",
                reason="no memory",
            ),
        ),
    )
    assert read_status(deployed).seconds_left == 10.0


def test_a_cut_last_line_and_a_round_in_flight(deployed: Path) -> None:
    before = read_status(deployed)
    with (deployed / "metrics.jsonl").open("ab") as file:
        file.write(b'{"round":3,"applied":tr')
    with (deployed / "clients.jsonl").open("ab") as file:
        file.write(lines([msgspec.structs.replace(LOGS[2], round=3, time=1030.0)]) + b'{"round":4,"sec')
    assert read_status(deployed) == before


def test_a_round_that_was_repeated_counts_once(deployed: Path) -> None:
    again = msgspec.structs.replace(LOGS[2], time=1040.0)
    with (deployed / "clients.jsonl").open("ab") as file:
        file.write(lines([again]))
    status = read_status(deployed)
    assert status.clients is not None
    assert (status.time, status.late_answers, status.clients[0].asked) == (1040.0, 1, 3)


def test_lines_that_were_damaged_are_told(deployed: Path) -> None:
    content = (deployed / "metrics.jsonl").read_bytes().split(b"\n", 1)
    (deployed / "metrics.jsonl").write_bytes(content[0] + b"\n{]\n" + content[1])
    status = read_status(deployed)
    assert (status.round, status.damage is not None and "line 2" in status.damage) == (0, True)
    assert "damage" in text(status, 1080.0)


def test_before_the_first_round(deployed: Path) -> None:
    (deployed / "metrics.jsonl").write_bytes(b"")
    (deployed / "clients.jsonl").unlink()
    status = read_status(deployed)
    assert (status.stage, status.round, status.time, status.seconds_per_round) == ("waiting", -1, None, None)
    assert status.clients is not None
    assert [(c.asked, c.last_seen, c.outcome) for c in status.clients] == [(0, None, None)] * 3
    assert "never" in text(status, 1080.0)


def test_a_run_without_a_roster(finished: Path) -> None:
    status = read_status(finished)
    records = Journal.open(finished).records
    assert (status.stage, status.round, status.rounds, status.clients) == ("done", 4, 4, None)
    assert (status.evaluated, status.loss) == (None, None)  # it had no test data
    assert status.bytes_up == sum(r.bytes_up or 0 for r in records)
    assert status.time == (finished / "metrics.jsonl").stat().st_mtime
    assert status.seconds_left is None
    assert "client" not in text(status, 1080.0)


def test_a_run_that_was_continued_is_not_done(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train_digits(run, rounds=4)
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"rounds": 9}))
    assert read_status(run).stage == "training"


def test_a_run_that_diverged_is_over(deployed: Path) -> None:
    records = [
        msgspec.json.decode(line, type=Record) for line in (deployed / "metrics.jsonl").read_bytes().splitlines()
    ]
    told = [changed(records[0], round=i, restores=0 if i else None) for i in range(5)]
    (deployed / "metrics.jsonl").write_bytes(b"".join(map(encode_record, told)))
    status = read_status(deployed)
    assert (status.stage, status.rollbacks, status.over) == ("diverged", 4, True)


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match=r"no config\.json"):
        read_status(tmp_path)
    out = invoke(tmp_path, "status", ".")
    assert (out.code, out.out, out.err.count("\n")) == (2, "", 1)
