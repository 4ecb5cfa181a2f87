"""What ``deploy/flower/`` relies on in Flower, against a real SuperLink: a new Flower fails here first."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import ConfigRecord, Message, Metadata, RecordDict
from flwr.app.message import make_message, remove_content_from_message
from flwr.cli.build import build_fab_from_disk
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.superlink.grid.http_grid import HttpGrid

from baffle.client.examples import load_arrays
from baffle.client.participant import Participant
from baffle.deploy.certificates import private_bytes
from baffle.deploy.client_model import builder
from baffle.deploy.federation import Federation
from baffle.deploy.flower.app_bundle import app_folder, app_sha256
from baffle.deploy.flower.fleet import Fleet
from baffle.deploy.flower.grid import QuickGrid, quick
from baffle.deploy.flower.keys import read_key
from baffle.deploy.flower.objects import message_of
from baffle.deploy.node import run_node
from baffle.engines.remote.flower import from_records, to_records
from baffle.errors import FederationError, OptionError
from deploy_helpers import OPTIONS, Site, check_run, site, until


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with site(tmp_path_factory.mktemp("adapter"), clients=1) as found:
        yield found


def connected(fleet: Fleet, seconds: float = 40) -> int:
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
    """What a warm client does, by hand: a tiny run, a SuperLink that is killed, a crash of its own."""
    key = ec.generate_private_key(ec.SECP384R1())
    fleet = Fleet(federation.fed.address, key=key)
    node = fleet.connect()
    assert fleet.connect() == node  # while it is there already: nothing changes
    assert fleet.receive() is None
    stop = threading.Event()
    participant = Participant("alone", builder(load_arrays(federation.files[0])))
    told = {"trusted": [app_sha256(app_folder())], "stop": stop}
    thread = threading.Thread(target=run_node, args=(fleet, participant), kwargs=told, daemon=True)
    thread.start()
    federation.submit(OPTIONS | {"rounds": 6})
    federation.reach(3)
    kill_superlink(federation.fed)
    federation.fed.start_superlink()
    federation.finish()
    check_run(federation.out, 6)
    stop.set()
    thread.join(10)
    assert not thread.is_alive()
    assert fleet.connect() == node
    crash(fleet)
    again = Fleet(federation.fed.address, key=key)
    with pytest.raises(FederationError, match="refuses"):
        again.connect()  # inside the heartbeat window
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
    """What is left of a node that was killed: it beats no more, and has told nobody."""
    fleet._stop.set()
    assert fleet._heart is not None
    fleet._heart.join(5)
    fleet._client.close()


def test_a_superlink_that_is_not_there_is_told() -> None:
    with Fleet("127.0.0.1:9") as fleet, pytest.raises(FederationError, match=r"127\.0\.0\.1:9 cannot be reached"):
        fleet.connect()


def test_the_hash_of_an_app_is_that_of_the_bundle_that_flower_makes(tmp_path: Path) -> None:
    assert app_sha256(app_folder()) == app_sha256(app_folder())
    assert isinstance(build_fab_from_disk(app_folder()), bytes)
    with pytest.raises(OptionError, match="app = "):
        app_sha256(tmp_path)


def message(content: RecordDict) -> Message:
    """A message to node 7 of run 5."""
    return make_message(
        Metadata(5, "", 1, 7, "", "client-3", time.time(), 60.0, "train"),
        content=content,
    )


def taken_apart(whole: Message) -> tuple[Message, ObjectTree, Callable[[str], bytes]]:
    """A message as it travels: its head, the tree of its parts, the parts by their hash."""
    objects = get_all_nested_objects(whole)
    return remove_content_from_message(whole), get_object_tree(whole), lambda id: objects[id].deflate()


def test_messages_are_put_together_from_their_records_alone() -> None:
    whole = message(to_records(b"?", {"state": bytes(3_000_000)}))
    head, tree, pull = taken_apart(whole)
    asked: list[str] = []

    def ask(id: str) -> bytes:
        asked.append(id)
        return pull(id)

    found = message_of(head, tree, ask)
    assert from_records(found.content) == (b"?", {"state": bytes(3_000_000)})
    assert found.metadata.group_id == "client-3"
    assert len(asked) == len(set(whole.content))
    assert whole.object_id not in asked


def test_a_message_is_named_by_its_hash_which_the_adapter_sets() -> None:
    """``send`` and ``push_messages`` write this private field, as Flower's own Grid does."""
    one = message(RecordDict({"a": ConfigRecord({"b": 1})}))
    one.metadata.__dict__["_message_id"] = one.object_id
    assert one.metadata.message_id == one.object_id
    assert message_to_proto(remove_content_from_message(one)).metadata.message_id == one.object_id


def test_the_private_names_that_are_used_are_there() -> None:
    grid = HttpGrid("127.0.0.1:9", insecure=True, token="t")
    fast = quick(grid)
    assert isinstance(fast, QuickGrid)
    assert grid._runtime_client is fast._client
    for name in ("PushMessages", "PullMessages", "PushObject", "PullObject", "ConfirmMessageReceived", "GetNodes"):
        assert callable(getattr(grid._runtime_client, name))
    assert grid.node.node_id == 1
    grid.close()
    other = SimpleNamespace()
    assert quick(other) is other  # type: ignore[arg-type]  # any other Grid stays what it is


def test_keys_of_openssl_and_of_ssh_are_read(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization

    key = ec.generate_private_key(ec.SECP384R1())
    (tmp_path / "pem").write_bytes(private_bytes(key))
    form, none = serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    (tmp_path / "ssh").write_bytes(key.private_bytes(serialization.Encoding.PEM, form, none))
    assert {read_key(tmp_path / name).private_numbers() for name in ("pem", "ssh")} == {key.private_numbers()}
