"""A node's connection to the SuperLink: it stays, comes back after either side is killed, and reports refusals."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from baffle.client.examples import load_arrays
from baffle.client.participant import Participant
from baffle.deploy.client_model import builder
from baffle.deploy.federation import Federation
from baffle.deploy.flower.app_bundle import app_folder, app_sha256
from baffle.deploy.flower.fleet import Fleet
from baffle.deploy.node import run_node
from baffle.errors import FederationError
from deploy_helpers import OPTIONS, Site, check_run, site, until


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with site(tmp_path_factory.mktemp("adapter"), clients=1) as found:
        yield found


def connected(fleet: Fleet, seconds: float = 120) -> int:
    """The node's number, as soon as it is let in."""
    nodes: list[int] = []

    def let_in() -> bool:
        try:
            nodes.append(fleet.connect())
        except FederationError:
            time.sleep(0.5)
        return bool(nodes)

    until(let_in, seconds, "a connection")
    return nodes[0]


def test_a_node_connects_stays_and_comes_back(federation: Site) -> None:
    """What a node does, by hand: a tiny run, a SuperLink that is killed, a crash of its own."""
    key = ec.generate_private_key(ec.SECP384R1())
    fleet = Fleet(federation.fed.address, key=key)
    node = fleet.connect()
    assert fleet.connect() == node  # while it is there already: nothing changes
    assert fleet.receive() is None
    stop = threading.Event()
    participant = Participant("alone", builder(load_arrays(federation.files[0])))
    options = {"trusted": [app_sha256(app_folder())], "stop": stop}
    thread = threading.Thread(target=run_node, args=(fleet, participant), kwargs=options, daemon=True)
    thread.start()
    federation.submit(OPTIONS | {"rounds": 6})
    federation.reach(3)
    kill_superlink(federation.fed)
    federation.fed.start_superlink()
    federation.finish()
    check_run(federation.out, 6)
    stop.set()
    thread.join(120)
    assert not thread.is_alive()
    assert fleet.connect() == node
    again = Fleet(federation.fed.address, key=key)
    with pytest.raises(FederationError, match="refuses"):
        again.connect()  # the key is in use
    crash(fleet)
    assert connected(again) == node
    again.close()
    third = Fleet(federation.fed.address, key=key)
    assert third.connect() == node  # it had signed off: no waiting
    third.close()


def kill_superlink(fed: Federation) -> None:
    assert fed.superlink is not None
    fed.superlink.kill()
    fed.superlink.wait()


def crash(fleet: Fleet) -> None:
    """What is left of a node that was killed: it sends no heartbeats, and has not signed off."""
    fleet._stop.set()
    assert fleet._heart is not None
    fleet._heart.join(5)
    fleet._client.close()


def test_a_superlink_that_is_not_there_is_told() -> None:
    with Fleet("127.0.0.1:9") as fleet, pytest.raises(FederationError, match=r"127\.0\.0\.1:9 cannot be reached"):
        fleet.connect()
