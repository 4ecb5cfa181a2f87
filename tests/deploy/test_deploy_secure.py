"""Secure sums in federations of real processes: the plain sums of the survivors, whichever client is killed when."""

from __future__ import annotations

import signal
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

import pytest

import baffle as bf
import doomed_client
from deploy_helpers import (
    OPTIONS,
    WAITS_FOR_ALL,
    Site,
    check_run,
    hashes_in_one_process,
    members,
    participants,
    site,
    until,
    weights_hashes,
)

SECURE = OPTIONS | {"secure-sum": True, "schedule": "constant"}
"""Constant, so that rounds do not depend on how many there will be."""


def doom(here: Site, number: int, stage: str = "never", round: int = -1, sent: str = "SIGKILL") -> None:
    """Start a client, or start it again, that gets a signal at a stage of a round; wait until it is connected."""
    name, before = f"client-{number}", here.log(f"client-{number}").count("connected as node")
    assert here.fed.certificates is not None
    key = here.fed.make_key(name, register=name not in here.fed.nodes)
    command: list[str | Path] = [sys.executable, doomed_client.__file__, here.fed.address, here.fed.certificates, key]
    command += [here.files[number], name, stage, str(round), sent]
    here.fed.nodes[name] = here.fed.start_process(name, command)
    until(lambda: here.log(name).count("connected as node") > before, 300, here.tails)


def done(here: Site) -> None:
    """Wait until the newest submission has ended well."""
    until(lambda: here.fed.status(here.submitted[-1]) == "finished:completed", 300, here.tails)


def test_secure_sums_over_the_network_give_the_weights_of_plain_sums(tmp_path: Path) -> None:
    rounds = 4
    with site(tmp_path, secure=True, clients=4) as here:
        here.start_nodes("--only-secure")  # they answer in no other way
        here.submit(SECURE | {"rounds": rounds, "num-directions": 100}, deadline=WAITS_FOR_ALL)
        here.finish()
        digest = check_run(here.out, rounds)
        there = participants(here.out)
        assert weights_hashes(here.out) == hashes_in_one_process(here, there)
        assert weights_hashes(here.out)[-1] == digest
        assert all(len(clients) in (0, 3, 4) for clients in there), there  # a sum needs two thirds, or is void
        assert any(there)
        assert sum(log.refused for log in here.logs()) == 0
        up = [visit.bytes_up for log in here.logs()[1:] for visit in log.visits if visit.outcome == "ok"]
        assert 4 * 100 < min(up) <= max(up) < 4096


@pytest.mark.slow
def test_the_sum_is_that_of_the_survivors_whatever_a_client_was_asked_when_it_was_killed(tmp_path: Path) -> None:
    """Of six clients four must survive. One is killed in each of four stretches and is back for the next."""
    with site(tmp_path, secure=True, clients=6) as here:
        for n in range(4):
            here.fed.start_node(f"client-{n}", here.files[n], "--only-secure")
        everyone, there = {0, 1, 2, 3, 4, 5}, list[set[int]]()

        def stretch(rounds: int, killed: Collection[int], expected: Sequence[set[int]]) -> None:
            here.submit(SECURE | {"rounds": rounds}, deadline=WAITS_FOR_ALL)  # or until the SuperLink misses a client
            here.reach(rounds + 1)
            done(here)
            there.extend(expected)
            assert participants(here.out) == there, here.tails()
            for n in (4, 5):
                code = here.fed.nodes[f"client-{n}"].poll()
                assert code == (-signal.SIGKILL if n in killed else None)

        doom(here, 4)
        doom(here, 5, "advert", 0)
        stretch(2, {5}, [everyone - {5}] * 3)
        doom(here, 5, "vector", 4)  # it does not send what it was asked for
        stretch(5, {5}, [everyone, everyone - {5}, everyone - {5}])
        doom(here, 5, "shares", 7)  # its vector is there: the others' shares unmask it
        stretch(8, {5}, [everyone, everyone, everyone - {5}])
        doom(here, 5, "lost", 10)
        here.kill_node("client-4")
        doom(here, 4, "vector", 10)  # so that shares of a lost client are asked for
        stretch(11, {4, 5}, [everyone, everyone - {4}, everyone - {4, 5}])
        doom(here, 4)
        doom(here, 5)
        stretch(13, set(), [everyone, everyone])
        digest = check_run(here.out, 13)
        assert members(here.out) == [f"client-{n}" for n in range(6)]
        assert weights_hashes(here.out) == hashes_in_one_process(here, there)
        assert weights_hashes(here.out)[-1] == digest
        assert len(set(weights_hashes(here.out))) == 14  # round 0 too: no two have the same weights
        assert sum(log.refused for log in here.logs()) == 0


@pytest.mark.slow
def test_a_server_killed_between_vectors_and_sum_loses_one_round(tmp_path: Path) -> None:
    with site(tmp_path, secure=True, clients=4) as here:
        for n in range(3):
            here.fed.start_node(f"client-{n}", here.files[n], "--only-secure")
        doom(here, 3, "shares", 3, "SIGSTOP")
        here.submit(SECURE | {"rounds": 8}, deadline=WAITS_FOR_ALL)
        stopped = here.fed.nodes["client-3"]
        until(lambda: " T " in Path(f"/proc/{stopped.pid}/stat").read_text(), 300, here.tails)
        here.kill_server_app()
        stopped.send_signal(signal.SIGCONT)
        assert len(bf.Journal.open(here.out).rows) == 3
        here.submit(SECURE | {"rounds": 8}, deadline=WAITS_FOR_ALL)
        here.finish()
        check_run(here.out, 8)
        there = participants(here.out)
        assert there[3] == set()  # all have answered it, and no client answers a round twice
        assert there[:3] + there[4:] == [{0, 1, 2, 3}] * 8
        assert weights_hashes(here.out) == hashes_in_one_process(here, there)
        assert len(set(weights_hashes(here.out))) == 8  # that round changes nothing
