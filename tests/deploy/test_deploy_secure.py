"""Secure sums in federations of real processes: the plain sums of whoever survived, whoever is killed when."""

from __future__ import annotations

import signal
import sys
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

import baffle as bf
import doomed_client
from baffle.core.aggregate import nothing
from baffle.core.state import State
from baffle.core.types import Task
from baffle.data import Dataset
from baffle.engines import Exchange
from baffle.protocol.encoding import decode_row
from baffle.runtimes import Runtime
from baffle.training.build import assemble_server
from baffle.training.options import train_config
from deploy_helpers import OPTIONS, Site, check_run, members, site, until

SECURE = OPTIONS | {"secure-sum": True, "schedule": "constant"}  # whatever the rounds of a submission


class PlainSums(bf.LocalEngine):
    """All clients in this process: plain sums of those that took part in each round, as the secure ones are handed on.

    A round in which nobody did is void.
    """

    def __init__(self, runtime: Runtime, clients: Sequence[Dataset], there: Sequence[Collection[int]]) -> None:
        super().__init__(runtime, clients, together=False)
        self._there = there

    def exchange(self, task: Task, participants: Sequence[int], state: State, rows: Sequence[bytes]) -> Exchange:
        there = sorted(self._there[task.round])
        if not there:
            return Exchange((), 0, 0, 0, 0, nothing(task))
        found = super().exchange(msgspec.structs.replace(task, secure=0), there, state, rows)
        cohort = {reply.client: reply.weight for reply in found.replies}
        return replace(found, replies=(), total=bf.weighted_sum().combine(task, cohort, found.replies))


def plain_sums(here: Site, there: Sequence[Collection[int]]) -> list[str]:
    """Hashes of the weights after each round of the same training in one process, where these took part."""
    options = train_config(here.folder / "train.toml", {"threads": 1})
    server = assemble_server(options)
    engine = PlainSums(server.runtime, bf.partition(server.train, clients=len(here.files)), there)
    run = bf.train(options.method(), engine, server.initial, rounds=len(there) - 1, seed=options.seed)
    return [record.weights_sha256 for record in run.records]


def hashes(run: Path) -> list[str]:
    """Hashes of the weights after each round of a run folder."""
    return [record.weights_sha256 for record in bf.Journal.open(run).records]


def who_took_part(run: Path) -> list[set[int]]:
    """The participants in each row of a run."""
    return [set(decode_row(row).participants) for row in bf.Journal.open(run).rows]


def doom(here: Site, number: int, stage: str = "never", round: int = -1, sent: str = "SIGKILL") -> None:
    """Start a client, or start it again, that gets a signal at a stage of a round; wait until it is connected."""
    name, before = f"client-{number}", here.log(f"client-{number}").count("connected as node")
    assert here.fed.certificates is not None
    key = here.fed.make_key(name, register=name not in here.fed.nodes)
    command: list[str | Path] = [sys.executable, doomed_client.__file__, here.fed.address, here.fed.certificates, key]
    command += [here.files[number], name, stage, str(round), sent]
    here.fed.nodes[name] = here.fed.start_process(name, command)
    until(lambda: here.log(name).count("connected as node") > before, 90, here.told)


def done(here: Site) -> None:
    """Wait until the newest submission has ended well."""
    until(lambda: here.fed.status(here.submitted[-1]) == "finished:completed", 60, here.told)


def test_secure_sums_over_the_network_give_the_weights_of_plain_sums(tmp_path: Path) -> None:
    rounds = 4
    with site(tmp_path, secure=True, clients=4) as here:
        here.start_nodes("--only-secure")  # there is no other answer to be had of them
        here.submit(SECURE | {"rounds": rounds, "num-directions": 100}, deadline=15.0)  # on a busy machine: seconds
        here.finish(90)
        digest = check_run(here.out, rounds)
        options = train_config(tmp_path / "train.toml", {"threads": 1, "secure_sum": False})
        server = assemble_server(options)
        engine = bf.LocalEngine(server.runtime, bf.partition(server.train, clients=4), together=False)
        plain = bf.train(options.method(), engine, server.initial, rounds=rounds, seed=options.seed)
        assert digest == plain.weights_sha256
        assert hashes(here.out) == [record.weights_sha256 for record in plain.records]
        assert who_took_part(here.out) == [{0, 1, 2, 3}] * (rounds + 1)
        assert sum(log.refused for log in here.logs()) == 0
        up = [visit.bytes_up for log in here.logs()[1:] for visit in log.visits]
        assert 4 * 100 < min(up) <= max(up) < 4096


@pytest.mark.slow
def test_the_sum_is_that_of_the_survivors_whatever_a_client_was_asked_when_it_was_killed(tmp_path: Path) -> None:
    """Of six clients four must be left. One is killed in each of four stretches and is back for the next."""
    with site(tmp_path, secure=True, clients=6) as here:
        for n in range(4):
            here.fed.start_node(f"client-{n}", here.files[n], "--only-secure")
        everyone, there = {0, 1, 2, 3, 4, 5}, list[set[int]]()

        def stretch(rounds: int, killed: Collection[int], expected: Sequence[set[int]]) -> None:
            here.submit(SECURE | {"rounds": rounds}, deadline=15.0)  # on a busy machine answers take seconds
            here.reach(rounds + 1, 180)
            done(here)
            there.extend(expected)
            assert who_took_part(here.out) == there, here.told()
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
        assert hashes(here.out) == plain_sums(here, there)
        assert hashes(here.out)[-1] == digest
        assert len(set(hashes(here.out))) == 14  # round 0 too: no two have the same weights
        assert sum(log.refused for log in here.logs()) == 0


@pytest.mark.slow
def test_a_server_killed_between_vectors_and_sum_loses_one_round(tmp_path: Path) -> None:
    with site(tmp_path, secure=True, clients=4) as here:
        for n in range(3):
            here.fed.start_node(f"client-{n}", here.files[n], "--only-secure")
        doom(here, 3, "shares", 3, "SIGSTOP")
        here.submit(SECURE | {"rounds": 8}, deadline=60.0)
        stopped = here.fed.nodes["client-3"]
        until(lambda: " T " in Path(f"/proc/{stopped.pid}/stat").read_text(), 90, here.told)
        here.kill_server_app()
        stopped.send_signal(signal.SIGCONT)
        assert len(bf.Journal.open(here.out).rows) == 3
        here.submit(SECURE | {"rounds": 8}, deadline=60.0)
        here.finish()
        check_run(here.out, 8)
        there = who_took_part(here.out)
        assert there[3] == set()  # all have answered it, and nobody answers twice
        assert there[:3] + there[4:] == [{0, 1, 2, 3}] * 8
        assert hashes(here.out) == plain_sums(here, there)
        assert len(set(hashes(here.out))) == 8  # that round changes nothing
