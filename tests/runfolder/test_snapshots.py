"""Weights and states as files: which are kept, and what happens where they are damaged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

import baffle as bf
from baffle.core.method import replay
from baffle.core.rebuild import Execution
from baffle.core.state import State, state_sha256, weights_sha256
from baffle.core.types import Row, Table
from baffle.errors import CorruptRunError
from baffle.runfolder.metrics import Record
from helpers import (
    Place,
    copy_run,
    flip,
    initial_weights,
    train_digits,
)
from runfolder_helpers import ROUNDS, resume_digits


def test_the_model_file_holds_the_average_by_name(whole: Path) -> None:
    tensors = load_file(whole / "model.safetensors")
    assert {name: t.shape for name, t in tensors.items()} == {"1.weight": (10, 64), "1.bias": (10,)}
    average = bf.Journal.open(whole).state().ema_weights
    assert (np.concatenate([tensors["1.weight"].reshape(-1), tensors["1.bias"]]) == average).all()


def test_every_changed_byte_of_the_initial_weights_is_noticed(run: Path) -> None:
    file = run / "initial.safetensors"
    good = file.read_bytes()
    header = 8 + int.from_bytes(good[:8], "little")
    for position in [*range(header), *range(header, len(good), 97), len(good) - 1]:
        file.write_bytes(good)
        flip(file, position)
        try:
            damage = bf.Journal.open(run).damage
        except CorruptRunError as error:
            damage = str(error)
        if position >= header:
            assert damage is not None, position
        if damage is None:  # white space of the header
            assert (bf.Journal.open(run).initial == initial_weights()).all()
        else:
            assert "initial.safetensors" in damage


def test_only_the_newest_two_snapshots_are_kept(tmp_path: Path) -> None:
    def names() -> list[str]:
        return sorted(file.name for file in (tmp_path / "run/snapshots").iterdir())

    seen: dict[int, list[str]] = {}

    def look(record: Record) -> None:
        seen[record.round] = names()

    train_digits(tmp_path / "run", 6, snapshot_every=1, progress=look)
    assert seen[0] == ["00000001.safetensors"]
    assert seen[1] == ["00000001.safetensors", "00000002.safetensors"]
    for round in range(2, 7):
        assert seen[round] == [f"{round:08d}.safetensors", f"{round + 1:08d}.safetensors"]
    with safe_open(tmp_path / "run/snapshots/00000007.safetensors", "numpy") as file:
        assert set(file.keys()) == {"weights", "average", "slots.momentum"}


def count_replays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rounds that are replayed from here on."""
    rounds: list[int] = []

    def counted(state: State, table: Table, row: Row, execution: Execution, earlier: Callable[[int], State]) -> State:
        rounds.append(row.round)
        return replay(state, table, row, execution, earlier)

    monkeypatch.setattr("baffle.runfolder.journal.replay", counted)
    return rounds


def test_resuming_from_a_snapshot_equals_resuming_from_the_start(
    whole: Path, where: list[Place], final: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds = count_replays(monkeypatch)
    for name, snapshots, expected in (("with", True, [6]), ("without", False, [0, 1, 2, 3, 4, 5, 6])):
        path = copy_run(whole, tmp_path / name)
        with (path / "rows.bin").open("r+b") as file:
            file.truncate(where[-2].start)  # rows 0 to 6
        if not snapshots:
            for snapshot in (path / "snapshots").iterdir():
                snapshot.unlink()
        rounds.clear()
        assert resume_digits(path).weights_sha256 == final
        assert rounds == expected
    for name in ("rows.bin", "model.safetensors"):
        assert (tmp_path / "with" / name).read_bytes() == (tmp_path / "without" / name).read_bytes()


def test_snapshots_ahead_of_the_rows_do_not_push_out_the_new_ones(
    run: Path, where: list[Place], final: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (run / "rows.bin").open("r+b") as file:
        file.truncate(where[2].start)  # rows 0 and 1: both snapshots are ahead
    rounds = count_replays(monkeypatch)
    journal = bf.Journal.open(run, write=True)
    assert journal.state().round == 2
    assert rounds == [0, 1]
    journal.snapshot(journal.state())
    rounds.clear()
    assert journal.state().round == 2
    assert rounds == []
    journal.close()
    assert resume_digits(run).weights_sha256 == final


def snapshot_positions(file: Path) -> list[int]:
    data = file.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    return [*range(header), *range(header, len(data), 211)]


def test_every_damaged_snapshot_is_skipped(run: Path, final: str) -> None:
    states = {s.round: s for s in bf.Journal.open(run).states()}
    newest = run / "snapshots/00000009.safetensors"
    good = newest.read_bytes()
    for position in snapshot_positions(newest):
        for mask in (1, 0x20):
            newest.write_bytes(good)
            flip(newest, position, mask)
            journal = bf.Journal.open(run)
            assert journal.damage is None
            state = journal.state()
            assert state.round == ROUNDS + 1
            assert state_sha256(state) == state_sha256(states[ROUNDS + 1])
            assert sorted(state.slots) == ["momentum"], (position, mask)
            assert state.ema_weights.tobytes() == states[ROUNDS + 1].ema_weights.tobytes()
    for content in (b"", good[:4], good[:-1], b"\xff" * 64):
        newest.write_bytes(content)
        assert weights_sha256(bf.Journal.open(run).state().weights).hex() == final


def test_a_damaged_snapshot_falls_back_to_the_older_one(
    run: Path, where: list[Place], final: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    flip(run / "snapshots/00000009.safetensors", -1)
    rounds = count_replays(monkeypatch)
    assert resume_digits(run).weights_sha256 == final
    assert rounds == [6, 7, 8]
    flip(run / "snapshots/00000006.safetensors", -1)
    rounds.clear()
    assert resume_digits(run).weights_sha256 == final
    assert rounds == list(range(ROUNDS + 1))
