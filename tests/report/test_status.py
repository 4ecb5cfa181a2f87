"""``baffle status``: what small run folders made by hand should tell, and how it is drawn."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from baffle.cli.status import draw, show_live, statuses
from baffle.errors import JournalError
from baffle.report.status import ClientStatus, Status, by_attention, read_status
from baffle.runfolder.clients import Member, RoundLog, Visit
from baffle.runfolder.journal import Journal
from baffle.runfolder.metrics import Record, encode_record
from helpers import invoke, train_digits

MEMBERS = (Member("a", "11", 100), Member("b", "22", 200), Member("c", "33", 300))
LOGS = (
    RoundLog(
        round=0,
        seconds=1.0,
        time=1000.0,
        visits=(
            Visit(client=0, outcome="ok", seconds=0.2, bytes_up=10, bytes_down=100),
            Visit(client=1, outcome="ok", seconds=0.4, bytes_up=11, bytes_down=100),
            Visit(client=2, outcome="offline"),
        ),
    ),
    RoundLog(
        round=1,
        seconds=5.0,
        time=1010.0,
        late=0,
        refused=1,
        visits=(
            Visit(client=0, outcome="ok", seconds=0.6, bytes_up=10, bytes_down=50),
            Visit(client=1, outcome="late", bytes_down=50),
            Visit(client=2, outcome="refused", bytes_up=9, bytes_down=70, reason="wrong K"),
        ),
    ),
    RoundLog(
        round=2,
        seconds=5.0,
        time=1020.0,
        late=1,
        visits=(
            Visit(client=0, outcome="ok", seconds=0.3, bytes_up=10, bytes_down=50),
            Visit(client=2, outcome="failed", seconds=0.1, bytes_up=8, bytes_down=60, reason="no memory"),
        ),
    ),
)


def changed(record: Record, **changes: object) -> Record:
    return msgspec.structs.replace(record, **changes)


def lines(values: Sequence[msgspec.Struct]) -> bytes:
    return b"".join(msgspec.json.encode(value) + b"\n" for value in values)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four rounds in one process."""
    run = tmp_path_factory.mktemp("status") / "run"
    train_digits(run, rounds=4)
    return run


@pytest.fixture
def deployed(trained: Path, tmp_path: Path) -> Path:
    """The folder of a run after three of its four rounds, with three clients elsewhere."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_bytes((trained / "config.json").read_bytes())
    records = [
        changed(r, loss=2.0 - r.round if r.round < 2 else None, accuracy=0.5, bytes_up=30, bytes_down=300, seconds=s)
        for r, s in zip(Journal.open(trained).records, (1.0, 5.0, 6.0), strict=False)
    ]
    records[2] = changed(records[2], accuracy=None, participants=1)
    (run / "metrics.jsonl").write_bytes(b"".join(map(encode_record, records)))
    (run / "clients.json").write_bytes(msgspec.json.encode(MEMBERS))
    (run / "clients.jsonl").write_bytes(lines(LOGS))
    return run


def text(status: Status, now: float, width: int = 120, most: int = 30) -> str:
    console = Console(record=True, width=width, file=io.StringIO())
    console.print(draw(status, now, most))
    return console.export_text()


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


def test_what_is_drawn(deployed: Path) -> None:
    shown = text(read_status(deployed), now=1080.0).splitlines()
    table = [" ".join(line.split()) for line in shown]
    assert table[1:5] == [
        "stage training, round 2 of 4, the last one 1 min ago",
        "model loss 1.0000, accuracy 0.5000 (round 1)",
        "time 5.00 s a round, 12 s in all, about 10 s to go",
        "bytes up 90 B, 30 B a round",
    ]
    assert table[-4:] == [
        "# client examples seen rounds up down seconds missed",
        "0 a 100 1 min 3/3 30 B 200 B 0.30",
        "1 b 200 1 min 1/2 11 B 150 B 0.40 1 late",
        "2 c 300 1 min 0/2 17 B 130 B 1 refused, 1 failed, 1 offline (no memory)",
    ]


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


def test_a_run_without_a_roster(trained: Path) -> None:
    status = read_status(trained)
    records = Journal.open(trained).records
    assert (status.stage, status.round, status.rounds, status.clients) == ("done", 4, 4, None)
    assert (status.evaluated, status.loss) == (None, None)  # it had no test data
    assert status.bytes_up == sum(r.bytes_up or 0 for r in records)
    assert status.time == (trained / "metrics.jsonl").stat().st_mtime
    assert status.seconds_left is None
    assert "client" not in text(status, 1080.0)


def test_a_run_that_was_continued_is_not_done(trained: Path, tmp_path: Path) -> None:
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


def test_of_many_clients_those_that_need_attention_are_shown(deployed: Path) -> None:
    base = read_status(deployed)
    many = tuple(
        ClientStatus(
            number=i, name=f"n{i}", examples=1, outcome="late" if i == 1500 else "ok", late=int(i in (7, 1500))
        )
        for i in range(2000)
    )
    assert [c.number for c in by_attention(many)[:4]] == [1500, 7, 0, 1]
    shown = text(msgspec.structs.replace(base, clients=many), 1080.0).splitlines()
    rows = shown[shown.index("") + 2 :]
    assert len(rows) == 31
    assert rows[0].split()[:2] == ["1500", "n1500"]
    assert rows[-1].strip() == "and 1,970 more clients; 1,970 of them answered when last asked"


def test_a_name_is_not_markup(deployed: Path) -> None:
    (deployed / "clients.json").write_bytes(msgspec.json.encode((Member("[red]x[/]", "11", 1),)))
    assert "[red]x[/]" in text(read_status(deployed), 1080.0)


def test_watch_ends_with_the_run(deployed: Path, trained: Path, tmp_path: Path) -> None:
    found = statuses(deployed)
    assert next(found).stage == "training"
    assert [status.stage for status in statuses(trained)] == ["done"]
    with (tmp_path / "screen").open("w") as file:
        show_live(statuses(trained), Console(file=file, force_terminal=True, width=100, height=40))
    assert "done, round 4 of 4" in (tmp_path / "screen").read_text().replace("\x1b[1;32mdone\x1b[0m", "done")


def test_the_command(deployed: Path, trained: Path) -> None:
    plain = invoke(trained.parent, "status", "run")
    assert (plain.code, plain.err) == (0, "")
    assert "round 4 of 4" in plain.out
    watched = invoke(trained.parent, "status", "run", "--watch")
    assert (watched.code, watched.out.split()[:4]) == (0, plain.out.split()[:4])
    told = invoke(deployed.parent, "status", "run", "--json")
    assert told.out.count("\n") == 1
    assert msgspec.json.decode(told.out, type=Status) == msgspec.structs.replace(read_status(deployed), run="run")
    both = invoke(trained.parent, "status", "run", "--json", "--watch")
    assert json.loads(both.out)["stage"] == "done"


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match=r"no config\.json"):
        read_status(tmp_path)
    out = invoke(tmp_path, "status", ".")
    assert (out.code, out.out, out.err.count("\n")) == (2, "", 1)
