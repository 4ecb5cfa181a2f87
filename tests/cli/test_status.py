"""``baffle status``: how it is drawn, once and live."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
from rich.console import Console

from baffle.cli.status import show_live, statuses
from baffle.report.status import ClientStatus, Status, by_attention, read_status
from baffle.runfolder.clients import Member
from helpers import invoke
from status_helpers import text


def test_what_is_drawn(deployed: Path) -> None:
    shown = text(read_status(deployed), now=1080.0).splitlines()
    table = [" ".join(line.split()) for line in shown]
    assert table[1:7] == [
        "stage training, round 2 of 4, the last one 1 min ago",
        "model loss 1.0000, accuracy 0.5000 (round 1)",
        "time 5.00 s a round, 12 s in all, about 10 s to go",
        "passes 5 over each example of a mini-batch",
        "reply 4 numbers of 15 bits: 4 of the loss (1 unit)",
        "bytes up 90 B, 30 B a round",
    ]
    assert table[-4:] == [
        "# client examples seen rounds up down seconds missed",
        "0 a 100 1 min 3/3 30 B 200 B 0.30",
        "1 b 200 1 min 1/2 11 B 150 B 0.40 1 late",
        "2 c 300 1 min 0/2 17 B 130 B 1 refused, 1 failed, 1 offline (no memory)",
    ]


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


def test_watch_ends_with_the_run(deployed: Path, finished: Path, tmp_path: Path) -> None:
    found = statuses(deployed)
    assert next(found).stage == "training"
    assert [status.stage for status in statuses(finished)] == ["done"]
    with (tmp_path / "screen").open("w") as file:
        show_live(statuses(finished), Console(file=file, force_terminal=True, width=100, height=40))
    assert "done, round 4 of 4" in (tmp_path / "screen").read_text().replace("\x1b[1;32mdone\x1b[0m", "done")


def test_the_command(deployed: Path, finished: Path) -> None:
    plain = invoke(finished.parent, "status", "run")
    assert (plain.code, plain.err) == (0, "")
    assert "round 4 of 4" in plain.out
    watched = invoke(finished.parent, "status", "run", "--watch")
    assert (watched.code, watched.out.split()[:4]) == (0, plain.out.split()[:4])
    told = invoke(deployed.parent, "status", "run", "--json")
    assert told.out.count("\n") == 1
    assert msgspec.json.decode(told.out, type=Status) == msgspec.structs.replace(read_status(deployed), run="run")
    both = invoke(finished.parent, "status", "run", "--json", "--watch")
    assert json.loads(both.out)["stage"] == "done"
