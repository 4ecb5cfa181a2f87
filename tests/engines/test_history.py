"""Which states can be reached by replaying which rows."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

import baffle as bf
from baffle.engines.history import History
from baffle.protocol.encoding import decode_row, encode_message
from helpers import train_digits


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    out: Path = tmp_path_factory.mktemp("runs") / "run"
    train_digits(out, rounds=4)
    return list(bf.Journal.open(out).rows)


def test_rows_are_read_once_and_counted_in_bytes(rows: list[bytes]) -> None:
    history = History()
    assert history.read(rows[:2]) == [decode_row(row) for row in rows[:2]]
    assert history.read(rows[:2]) == []
    assert history.read(rows) == [decode_row(row) for row in rows[2:]]
    assert history.rows == len(rows)
    assert [history.bytes_after(n) for n in range(len(rows) + 1)] == [
        sum(map(len, rows[n:])) for n in range(len(rows) + 1)
    ]


def test_hashes_are_those_of_the_rows(rows: list[bytes]) -> None:
    history = History()
    history.read(rows)
    hashes = [decode_row(row).state_sha256 for row in rows]
    assert [history.hash_after(n) for n in range(-1, len(rows) + 2)] == [None, None, *hashes, None]


def test_nothing_before_a_return_leads_to_the_newest_state(rows: list[bytes]) -> None:
    history = History()
    returned = encode_message(msgspec.structs.replace(decode_row(rows[2]), restores=1))
    history.read([*rows[:2], returned, *rows[3:]])
    assert [history.leads_from(n) for n in range(len(rows) + 2)] == [
        *[False] * 3,
        *[True] * (len(rows) - 2),
        False,
    ]
