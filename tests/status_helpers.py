"""A small run, and the folder of a deployed run made by hand."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from baffle.cli.status import draw
from baffle.report.status import Status
from baffle.runfolder.clients import Member, RoundLog, Visit
from baffle.runfolder.journal import Journal
from baffle.runfolder.metrics import Record, encode_record
from helpers import train_digits

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
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four rounds in one process."""
    run = tmp_path_factory.mktemp("status") / "run"
    train_digits(run, rounds=4)
    return run


@pytest.fixture
def deployed(finished: Path, tmp_path: Path) -> Path:
    """The folder of a run after three of its four rounds, with three clients elsewhere."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_bytes((finished / "config.json").read_bytes())
    records = [
        changed(r, loss=2.0 - r.round if r.round < 2 else None, accuracy=0.5, bytes_up=30, bytes_down=300, seconds=s)
        for r, s in zip(Journal.open(finished).records, (1.0, 5.0, 6.0), strict=False)
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
