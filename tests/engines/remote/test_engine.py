"""Clients on other machines: the same weights as in one process, whichever client drops out or a run is resumed."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import baffle as bf
from baffle.client.calibrate import LADDER
from baffle.engines.remote.downlink import Downlink
from baffle.engines.remote.memory import Twist
from baffle.engines.remote.transport import Arrival, Request
from baffle.errors import FederationError
from baffle.protocol.messages import (
    EnrolRequest,
    TrainRequest,
    TrainResponse,
    encode,
)
from baffle.runfolder.clients import Roster, read_rounds
from baffle.runfolder.metrics import Record
from remote_helpers import (
    DEADLINE,
    METHOD,
    METHODS,
    SETUP_OF_DIGITS,
    Federation,
    Node,
    federation,
    local,
    lost,
    who_answered,
)


@pytest.mark.parametrize("downlink", ["replay", "weights"])
@pytest.mark.parametrize("name", METHODS)
def test_the_weights_are_those_of_one_process(fed: Federation, name: str, downlink: Downlink) -> None:
    run = fed.train(method=METHODS[name], engine=fed.engine(downlink=downlink))
    reference = local(fed.data, method=METHODS[name])
    assert run.weights_sha256 == reference.weights_sha256
    for ours, theirs in zip(run.records, reference.records, strict=True):
        assert (ours.forward_passes, ours.samples_forwarded) == (theirs.forward_passes, theirs.samples_forwarded)


def test_every_client_proves_the_servers_state_in_every_round(fed: Federation) -> None:
    fed.train(rounds=8)
    for node in fed.nodes:
        deliveries = [c for c in fed.network.deliveries if c.node is node and isinstance(c.response, TrainResponse)]
        assert len(deliveries) == 9
        for delivery in deliveries:
            assert isinstance(delivery.message, TrainRequest)
            assert isinstance(delivery.response, TrainResponse)
            assert delivery.response.state_sha256 == delivery.message.task.state_sha256


def test_bytes_are_those_that_were_sent(fed: Federation, tmp_path: Path) -> None:
    run = fed.train(tmp_path / "run")
    down = sum(c.size for c in fed.network.deliveries)
    up = sum(len(encode(c.response)) for c in fed.network.deliveries)
    assert sum(r.bytes_down or 0 for r in run.records) == down
    assert sum(r.bytes_up or 0 for r in run.records) == up
    visits = [v for log in read_rounds(tmp_path / "run") for v in log.visits]
    enrolled = [c for c in fed.network.deliveries if isinstance(c.message, EnrolRequest)]
    assert sum(v.bytes_down for v in visits) == down - sum(c.size for c in enrolled)
    assert {v.outcome for v in visits} == {"ok"}


@pytest.mark.parametrize("downlink", ["replay", "weights"])
def test_clients_find_sigma(fed: Federation, tmp_path: Path, downlink: Downlink) -> None:
    method = msgspec.structs.replace(METHOD, sigma="auto")
    run = fed.train(tmp_path / "run", method=method, engine=fed.engine(downlink=downlink))
    assert run.records[-1].sigma in LADDER
    assert (
        run.weights_sha256
        == local(fed.data, method=msgspec.structs.replace(METHOD, sigma=run.records[-1].sigma)).weights_sha256
    )
    assert bf.Journal.open(tmp_path / "run").state().weights.tobytes() == run.weights.tobytes()


def test_an_engine_serves_one_run_after_another(fed: Federation) -> None:
    engine = fed.engine()
    first = fed.train(engine=engine)
    began = fed.clock.now
    second = fed.train(engine=engine, method=METHODS["central"], rounds=4)
    assert first.weights_sha256 == local(fed.data).weights_sha256
    assert second.weights_sha256 == local(fed.data, method=METHODS["central"], rounds=4).weights_sha256
    assert fed.clock.now - began < DEADLINE  # what it knew of the first run is forgotten at once


Fate = str  # of a request to one client


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    fates=st.lists(st.lists(st.sampled_from(["on", "slow", "dead", "restart"]), max_size=8), min_size=3, max_size=3),
    away=st.lists(st.sets(st.integers(0, 2)), max_size=8),
    downlink=st.sampled_from(["replay", "weights"]),
)
def test_whoever_drops_out_the_run_ends_with_the_weights_of_its_rows(
    tmp_path_factory: pytest.TempPathFactory,
    fates: list[list[Fate]],
    away: list[set[int]],
    downlink: Downlink,
) -> None:
    out = tmp_path_factory.mktemp("runs") / "run"
    fed = federation()
    engine = fed.engine(downlink=downlink, roster=Roster(out))
    for node, fate in zip(fed.nodes, fates, strict=True):
        node.twist = _fate(node, list(fate))
    absences = list(away)

    def look() -> None:
        gone = absences.pop(0) if absences else set[int]()
        for i, node in enumerate(fed.nodes):
            node.online = i not in gone

    fed.network.on_look = look
    run = fed.train(out, rounds=5, engine=engine)
    answered = who_answered(out)
    assert all(len(clients) >= 2 for clients in answered)
    assert bf.Journal.open(out).state().weights.tobytes() == run.weights.tobytes()
    reference = local(fed.data, rounds=5, answers=lambda round, client: client in answered[round])
    assert run.weights_sha256 == reference.weights_sha256
    for log, clients in zip(read_rounds(out), answered, strict=True):
        assert tuple(v.client for v in log.visits if v.outcome == "ok") == clients
        assert log.refused == 0


def _fate(node: Node, fates: list[Fate]) -> Twist:
    def twist(request: Request, arrival: Arrival) -> list[Arrival]:
        fate = fates.pop(0) if fates else "on"
        node.seconds = 1.3 * DEADLINE if fate == "slow" else 0.1
        if fate == "restart":
            node.restart()
        return [] if fate in ("dead", "restart") else [arrival]

    return twist


def test_with_too_few_the_engine_gives_up_after_its_patience_and_the_run_goes_on_from_there(
    fed: Federation, tmp_path: Path
) -> None:
    def progress(record: Record) -> None:
        if record.round == 2:
            fed.nodes[0].twist = fed.nodes[1].twist = lost

    engine = fed.engine(patience=100.0, roster=Roster(tmp_path / "run"))
    began = fed.clock.now
    with pytest.raises(FederationError, match="round 3: 1 of the 2 replies it needs within 100 s"):
        fed.train(tmp_path / "run", engine=engine, progress=progress)
    assert 100 <= fed.clock.now - began < 100 + 2 * DEADLINE
    fed.nodes[0].twist = fed.nodes[1].twist = lambda request, arrival: [arrival]
    run = bf.resume(tmp_path / "run", fed.engine(roster=Roster(tmp_path / "run")))
    assert run.weights_sha256 == local(fed.data).weights_sha256


@pytest.mark.parametrize("memory", ["kept", "lost"])
def test_a_run_that_is_continued_has_the_weights_of_an_undisturbed_one(
    fed: Federation, memory: str, tmp_path: Path
) -> None:
    def progress(record: Record) -> None:
        if record.round == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fed.train(tmp_path / "run", rounds=8, progress=progress)
    if memory == "lost":
        for node in fed.nodes:
            node.restart()
    before = len(fed.network.deliveries)
    run = bf.resume(tmp_path / "run", fed.engine(roster=Roster(tmp_path / "run")))
    assert run.weights_sha256 == local(fed.data, rounds=8).weights_sha256
    assert not any(isinstance(c.message, EnrolRequest) for c in fed.network.deliveries[before:])


def test_a_run_is_continued_by_clients_that_served_another_one_since(fed: Federation, tmp_path: Path) -> None:
    fed.train(tmp_path / "run", rounds=3)
    other = msgspec.structs.replace(SETUP_OF_DIGITS, options={"seed": 1})
    fed.train(engine=fed.engine(setup=other), method=METHODS["central"], rounds=2)
    run = bf.resume(tmp_path / "run", fed.engine(roster=Roster(tmp_path / "run")), rounds=6)
    assert run.weights_sha256 == local(fed.data).weights_sha256
