"""Journals that earlier versions wrote still replay, bit for bit, to the weights that those versions had."""

import shutil
from pathlib import Path

import pytest

from baffle.core.state import weights_sha256
from baffle.protocol.encoding import decode_row
from baffle.runfolder.journal import Journal
from helpers import invoke

FORMAT_3 = Path(__file__).parents[1] / "fixtures" / "journals"
LAST_WEIGHTS = {  # as `baffle replay` of version 0.1.0 (journal format 3) printed them
    "adam-shared-rank1": "d33f537d1068fa961b8e764ae8d7727afb5749cf6b84b01ab93d1efbf15782d6",
    "diverged-and-back": "c242cd9487845ff7abce672f40038dfd275ed6389cff66a48342478586d306e2",
    "local-steps-sgd": "3319d08904d9af04c7f0afb9d55dd1b28010cc640a0f43ce9291ef334a3eab60",
    "per-client-gaussian": "ffb36aa1da2c1b3a40303c43b7e638f4bedfcc29bc58ec6b3f07b1c19dba4d9d",
    "secure-central-rademacher": "bca3bd01c7bee15750090127023fe523dde469a0ed9125790a4203b8369f197c",
}


@pytest.mark.parametrize("name", LAST_WEIGHTS)
def test_a_journal_of_format_3_replays_to_the_weights_it_logged(name: str, tmp_path: Path) -> None:
    shutil.copytree(FORMAT_3 / name, tmp_path / name)
    journal = Journal.open(tmp_path / name)
    assert journal.damage is None
    states = list(journal.states())
    assert len(states) == len(journal.rows)
    for state, row in zip(states, journal.rows, strict=True):
        assert weights_sha256(state.weights) == decode_row(row).weights_sha256
    assert weights_sha256(states[-1].weights).hex() == LAST_WEIGHTS[name]


def test_the_command_replays_a_journal_of_format_3(tmp_path: Path) -> None:
    name = "adam-shared-rank1"
    shutil.copytree(FORMAT_3 / name, tmp_path / name)
    assert invoke(tmp_path, "replay", name).out.strip() == LAST_WEIGHTS[name]
