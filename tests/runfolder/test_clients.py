"""The clients of a run and its rounds, as kept in the run folder."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from baffle.errors import CorruptRunError, JournalError
from baffle.runfolder.clients import Member, Roster, RoundLog, Visit, read_members, read_rounds


def log_of(round: int, seconds: float = 1.0) -> RoundLog:
    return RoundLog(round=round, seconds=seconds, visits=(Visit(client=0, outcome="ok", bytes_up=3),))


def test_the_roster_is_read_again(tmp_path: Path) -> None:
    roster = Roster(tmp_path)
    assert [roster.add(Member(name, f"key {name}", 5)) for name in ("a", "b\n", "é")] == [0, 1, 2]
    roster.save()
    again = Roster(tmp_path)
    assert again.members == roster.members == list(read_members(tmp_path))
    assert (again.number("key é"), again.number("key c")) == (2, None)
    assert again.add(Member("c", "key c", 1)) == 3
    again.save()
    assert len(read_members(tmp_path)) == 4


def test_rounds_are_read_again_and_counts_begin_anew(tmp_path: Path) -> None:
    roster = Roster(tmp_path)
    roster.count_late()
    roster.count_refused()
    roster.count_refused()
    roster.close(log_of(0))
    roster.close(log_of(1))
    assert [(r.round, r.late, r.refused, r.visits) for r in read_rounds(tmp_path)] == [
        (0, 1, 2, log_of(0).visits),
        (1, 0, 0, log_of(0).visits),
    ]
    assert read_rounds(tmp_path)[-1] == roster.last
    assert roster.last is not None
    assert roster.last.time > 1.6e9


def test_a_run_without_clients_elsewhere_has_none(tmp_path: Path) -> None:
    assert (read_members(tmp_path), read_rounds(tmp_path)) == ((), ())


@pytest.mark.parametrize("kept", [1, 10, -1])
def test_a_line_that_a_kill_cut_costs_that_line_only(tmp_path: Path, kept: int) -> None:
    for round in range(3):
        Roster(tmp_path).close(log_of(round))
    file = tmp_path / "clients.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:2]) + lines[2].rstrip()[:kept])
    assert [r.round for r in read_rounds(tmp_path)] == [0, 1]
    Roster(tmp_path).close(log_of(2, seconds=7.0))
    Roster(tmp_path).close(log_of(3))
    assert [(r.round, r.seconds) for r in read_rounds(tmp_path)] == [(0, 1.0), (1, 1.0), (2, 7.0), (3, 1.0)]


def test_of_a_round_that_was_repeated_the_last_line_counts(tmp_path: Path) -> None:
    for round, seconds in ((0, 1.0), (1, 2.0), (1, 3.0)):
        Roster(tmp_path).close(log_of(round, seconds))
    assert [(r.round, r.seconds) for r in read_rounds(tmp_path)] == [(0, 1.0), (1, 3.0)]


@pytest.mark.parametrize("damage", [b"{", b"[1]", b'[{"name":"\xff","identity":"","examples":1}]', b"", b"\0" * 50])
def test_damaged_files_are_told(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "clients.json").write_bytes(damage)
    with pytest.raises(CorruptRunError, match=r"clients\.json"):
        Roster(tmp_path)
    Roster(None).close(log_of(0))
    (tmp_path / "clients.jsonl").write_bytes(damage + b"\n" + msgspec.json.encode(log_of(4)) + b"\n")
    assert [r.round for r in read_rounds(tmp_path)] == [4]


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    roster = Roster(tmp_path / "none")
    roster.add(Member("a", "b", 1))
    with pytest.raises(JournalError, match=r"clients\.json: cannot write: No such file"):
        roster.save()
    with pytest.raises(JournalError, match=r"clients\.jsonl: cannot write: No such file"):
        roster.close(log_of(0))
