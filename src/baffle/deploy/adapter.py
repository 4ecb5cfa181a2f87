"""The only module that uses Flower's internals: the connection of a node, the hash of an app, shorter waits.

Flower's own SuperNode starts a process for every message and sleeps three seconds between looks. The same protocol
(protobuf over HTTP, requests signed by the node's key) is spoken here by one process that stays. Written against
flwr 1.41; ``tests/test_adapter.py`` says what it relies on.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import httpx
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.app.message import make_message, remove_content_from_message
from flwr.cli.build import build_fab_from_disk
from flwr.common.constant import ErrorCode
from flwr.common.serde import fab_from_proto, message_from_proto, message_to_proto, run_from_proto
from flwr.proto.fab_pb2 import GetFabRequest
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
    RegisterNodeFleetRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ObjectTree,
    PullObjectRequest,
    PullObjectResponse,
    PushObjectRequest,
    PushObjectResponse,
)
from flwr.proto.node_pb2 import Node, NodeInfo
from flwr.proto.run_pb2 import GetRunRequest
from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PushAppMessagesRequest
from flwr.serverapp import Grid
from flwr.supercore.error import FlowerError
from flwr.supercore.inflatable.inflatable_object import (
    InflatableObject,
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
from flwr.superlink.grid.http_grid import HttpGrid
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from baffle.engines.flower import PART, Post
from baffle.errors import FederationError, OptionError
from baffle.protocol.messages import printable

HEARTBEAT = 10
"""Seconds: the shortest interval that Flower allows; a node counts as gone after two."""
_BEAT_EVERY = 4.0
_AGAIN = 0.01
_ATTEMPTS = 8
_PULL_PATIENCE = 60.0
_LINGER = 3.0
_log = logging.getLogger("baffle")
Result = TypeVar("Result")


class Fleet:
    """A node's connection to a SuperLink. Every call may raise FederationError: wait, then ``connect`` again.

    ``certificates`` is a PEM file of the authority that signed the SuperLink's certificate; None: no TLS. ``key`` is
    the node's private key; without one a key is made that lasts as long as this object.
    """

    def __init__(
        self, superlink: str, certificates: Path | None = None, key: ec.EllipticCurvePrivateKey | None = None
    ) -> None:
        host, _, port = superlink.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise OptionError("superlink", superlink, "HOST:PORT")
        self._key = key or ec.generate_private_key(ec.SECP384R1())
        public = self._key.public_key()
        self._public = public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        try:
            pem = None if certificates is None else certificates.read_bytes()
            self._client = FleetHttpClient.from_server_address(
                superlink,
                pem is None,
                pem,
                interceptors=[
                    RuntimeVersionHttpInterceptor(component_name="SuperNode"),
                    NodeAuthHttpInterceptor(self._key, public),
                ],
            )
        except (OSError, UnicodeDecodeError) as error:  # ssl.SSLError is an OSError
            raise OptionError(
                "root-certificates", str(certificates), f"a PEM file of certificates ({error})"
            ) from error
        self._address, self._node = superlink, Node()
        self._stop = threading.Event()
        self._heart: threading.Thread | None = None
        self._apps: dict[int, str] = {}

    @property
    def identity(self) -> str:
        """The hash of the public key, by which the server knows this node."""
        return hashlib.sha256(self._public).hexdigest()

    def __enter__(self) -> Fleet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def connect(self) -> int:
        """Become a node of the SuperLink, or become so again; its number there."""
        if self._heart is not None and self._pulse():
            return self._node.node_id  # one that is there already cannot be activated
        request = RegisterNodeFleetRequest(public_key=self._public)
        try:
            self._call(self._client.RegisterNode, request)
        except FederationError as error:
            _log.debug("not registered: %s", error)  # it was before, or an operator has to
        activate = ActivateNodeRequest(public_key=self._public, heartbeat_interval=HEARTBEAT)
        try:
            self._node = Node(node_id=self._call(self._client.ActivateNode, activate).node_id)
        except FederationError as error:
            if "refuses" not in str(error):
                raise
            raise FederationError(f"{error} (expected a registered key, not in use for {2 * HEARTBEAT} s)") from error
        if self._heart is None:
            self._heart = threading.Thread(target=self._beat, daemon=True, name="heartbeat")
            self._heart.start()
        return self._node.node_id

    def receive(self) -> Message | None:
        """The next message for this node, if there is one."""
        response = self._call(self._client.PullMessages, PullMessagesRequest(node=self._node))
        if not response.messages_list:
            return None
        head = message_from_proto(response.messages_list[0])
        request = partial(PullObjectRequest, node=self._node, run_id=head.metadata.run_id)
        pull = partial(self._call, self._client.PullObject)
        tree = response.message_object_trees[0]
        try:
            return _assembled(head, tree, lambda id: _fetch(pull, request(object_id=id), _PULL_PATIENCE))
        except FederationError as error:  # it is not sent to this node again unless its sender knows
            self.send(refusal(head, str(error)))
            raise

    def confirm(self, message: Message) -> None:
        """Let the SuperLink forget a message's parts."""
        id = message.metadata.message_id
        request = ConfirmMessageReceivedRequest(node=self._node, run_id=message.metadata.run_id, message_object_id=id)
        self._call(self._client.ConfirmMessageReceived, request)

    def send(self, reply: Message) -> None:
        """Send a reply to a message of :meth:`receive`."""
        reply.metadata.__dict__["_message_id"] = reply.object_id
        run = reply.metadata.run_id
        with no_object_id_recompute():
            tree, objects = get_object_tree(reply), get_all_nested_objects(reply)
            request = PushMessagesRequest(
                node=self._node,
                messages_list=[message_to_proto(remove_content_from_message(reply))],
                message_object_trees=[tree],
                clientapp_runtime_list=[0.0],
            )
            response = self._call(self._client.PushMessages, request)
            push = partial(PushObjectRequest, node=self._node, run_id=run, session_id=response.session_id)
            call = partial(self._call, self._client.PushObject)
            for id in _records_last(response.objects_to_push, objects):
                if not _stored(call, push(object_id=id, object_content=objects[id].deflate())):
                    raise FederationError(f"the SuperLink does not store part {id[:12]} of a message")

    def app_of(self, message: Message) -> str:
        """SHA-256 of the app bundle that a message's run was started with, taken of the bundle itself."""
        run = message.metadata.run_id
        if run not in self._apps:
            info = run_from_proto(self._call(self._client.GetRun, GetRunRequest(node=self._node, run_id=run)).run)
            request = GetFabRequest(node=self._node, hash_str=info.fab_hash, run_id=run)
            fab = fab_from_proto(self._call(self._client.GetFab, request).fab)
            self._apps[run] = hashlib.sha256(fab.content).hexdigest()
        return self._apps[run]

    def close(self) -> None:
        """Tell the SuperLink that this node goes, if it can be told."""
        self._stop.set()
        if self._heart is not None:
            self._heart.join(timeout=1)
            try:
                self._call(self._client.DeactivateNode, DeactivateNodeRequest(node_id=self._node.node_id))
            except FederationError as error:
                _log.debug("not signed off: %s", error)
        self._client.close()

    def _pulse(self) -> bool:
        """Send a heartbeat; whether this node is one of the SuperLink's."""
        request = SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=HEARTBEAT)
        try:
            return self._call(self._client.SendNodeHeartbeat, request).success
        except FederationError as error:
            _log.debug("heartbeat: %s", error)
            return False

    def _beat(self) -> None:
        while not self._stop.wait(_BEAT_EVERY):
            self._pulse()

    def _call(self, method: Callable[..., Result], *request: object) -> Result:
        try:
            return _patient(lambda: method(*request))
        except httpx.HTTPStatusError as error:
            told = FlowerError.from_json(error.response.text)
            reason = f"{told.message} {told.public_details or ''}" if told is not None else error.response.text
            raise FederationError(
                f"{self._address} refuses ({error.response.status_code}): {printable(reason, 200)}"
            ) from error
        except httpx.HTTPError as error:
            raise FederationError(f"{self._address} cannot be reached: {error}") from error
        except (ValueError, RuntimeError) as error:  # no protobuf; a client that is being closed
            raise FederationError(f"{self._address}: {error}") from error


class QuickGrid:
    """The Grid of a ServerApp with fewer requests and shorter waits: of a reply only the records are fetched.

    Raises FederationError for what may go by. What the SuperLink fails to store (its database may be locked for a
    moment) is sent again; a message of which it does not has no id. A reply whose parts do not come within seconds is
    an error message in its place. The SuperLink may forget a reply some seconds after it was read: its sender is then
    done with sending the rest.
    """

    def __init__(self, grid: HttpGrid) -> None:
        self._grid, self._client = grid, grid._runtime_client
        self._read: deque[tuple[float, str]] = deque()  # replies, and when they were read

    def get_nodes(self) -> Iterable[NodeInfo]:
        """Who is connected."""
        return _told(lambda: self._grid.get_nodes())

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send messages; their ids."""
        return _told(lambda: self._push(messages))

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies that have come."""
        return _told(lambda: self._pull(message_ids))

    def _push(self, messages: Iterable[Message]) -> list[str]:
        objects: dict[str, InflatableObject] = {}
        heads, trees = [], []
        with no_object_id_recompute():
            for message in messages:
                message.metadata.__dict__["_message_id"] = message.object_id
                heads.append(message_to_proto(remove_content_from_message(message)))
                trees.append(get_object_tree(message))
                objects.update(get_all_nested_objects(message))
            request = PushAppMessagesRequest(messages_list=heads, message_object_trees=trees)
            response = _patient(lambda: self._client.PushMessages(request))
            push = partial(
                PushObjectRequest, node=self._grid.node, run_id=self._grid.run.run_id, session_id=response.session_id
            )
            lost = {
                id
                for id in _records_last(response.objects_to_push, objects)
                if not _stored(self._push_object, push(object_id=id, object_content=objects[id].deflate()))
            }
        parts = ({part.object_id for part in iterate_object_tree(tree)} for tree in trees)
        return ["" if lost & ids else id for id, ids in zip(response.message_ids, parts, strict=True)]

    def _pull(self, message_ids: Iterable[str]) -> list[Message]:
        request = PullAppMessagesRequest(message_ids=message_ids)
        response = _patient(lambda: self._client.PullMessages(request))
        pairs = zip(response.messages_list, response.message_object_trees, strict=True)
        found = [self._read_whole(message_from_proto(head), tree) for head, tree in pairs]
        while self._read and self._read[0][0] < time.monotonic() - _LINGER:
            _, id = self._read.popleft()
            node, run = self._grid.node, self._grid.run.run_id
            confirm = ConfirmMessageReceivedRequest(node=node, run_id=run, message_object_id=id)
            with contextlib.suppress(httpx.HTTPStatusError):  # it is forgotten with the run at the latest
                self._client.ConfirmMessageReceived(confirm)
        return found

    def _push_object(self, request: PushObjectRequest) -> PushObjectResponse:
        return _patient(lambda: self._client.PushObject(request))

    def _pull_object(self, request: PullObjectRequest) -> PullObjectResponse:
        return _patient(lambda: self._client.PullObject(request))

    def _read_whole(self, head: Message, tree: ObjectTree) -> Message:
        node, run = self._grid.node, self._grid.run.run_id
        request = partial(PullObjectRequest, node=node, run_id=run)
        try:
            message = _assembled(head, tree, lambda id: _fetch(self._pull_object, request(object_id=id), 10))
        except FederationError as error:
            message = make_message(head.metadata, error=Error(ErrorCode.MESSAGE_UNAVAILABLE, str(error)))
        self._read.append((time.monotonic(), head.metadata.message_id))
        return message


def _patient(call: Callable[[], Result]) -> Result:
    """What is asked of the SuperLink, again if it fails inside, as when its database is locked for a moment."""
    for attempt in range(_ATTEMPTS):
        try:
            return call()
        except httpx.HTTPStatusError as error:
            if error.response.status_code < 500:
                raise
            time.sleep(_AGAIN * 2**attempt)
    return call()


def _told(call: Callable[[], Result]) -> Result:
    """What the SuperLink cannot do now is no reason for the run to end. Connection errors are waited out by Flower."""
    try:
        return call()
    except httpx.HTTPStatusError as error:
        raise FederationError(f"the SuperLink answers {error.response.status_code}") from error


def quick(grid: Grid) -> Post:
    """A quicker grid, where it is one that speaks HTTP; else (in the simulation) itself."""
    return QuickGrid(grid) if isinstance(grid, HttpGrid) else grid


def _fetch(
    call: Callable[[PullObjectRequest], PullObjectResponse], request: PullObjectRequest, patience: float
) -> bytes:
    """An object, as soon as its sender has put it there."""
    give_up, pause = time.monotonic() + patience, _AGAIN
    while True:
        response = call(request)
        if response.object_available:
            return response.object_content
        if not response.object_found or time.monotonic() > give_up:
            raise FederationError(f"part {request.object_id[:12]} of a message is not there")
        time.sleep(pause)
        pause = min(1.0, 1.5 * pause)  # many may be waiting for the same


def _records_last(ids: Iterable[str], objects: Mapping[str, InflatableObject]) -> list[str]:
    """The order in which to send objects: who has the records confirms the message, and all of it is forgotten."""
    return sorted(ids, key=lambda id: isinstance(objects[id], ConfigRecord))


def _stored(call: Callable[[PushObjectRequest], PushObjectResponse], request: PushObjectRequest) -> bool:
    """Put an object where the other side fetches it."""
    for attempt in range(_ATTEMPTS):
        if call(request).stored:
            return True
        time.sleep(_AGAIN * 2**attempt)
    return False


def _assembled(head: Message, tree: ObjectTree, pull: Callable[[str], bytes]) -> Message:
    """A message from its head and its records. What is not a record of ours is left out."""
    if head.has_error():
        return head
    records = RecordDict()
    for part in iterate_object_tree(tree):
        if part.object_id == tree.object_id or part.children:
            continue
        content = pull(part.object_id)
        try:
            record = inflate_object_from_contents(part.object_id, {part.object_id: content})
        except (KeyError, ValueError, TypeError) as error:
            raise FederationError(f"part {part.object_id[:12]} of a message cannot be read: {error}") from error
        if isinstance(record, ConfigRecord):
            records[str(record.get(PART, part.object_id))] = record
    return make_message(head.metadata, content=records)


def refusal(message: Message, reason: str) -> Message:
    """An error in reply to a message."""
    return Message(Error(ErrorCode.INVALID_FAB, reason), reply_to=message)


def read_key(file: Path) -> ec.EllipticCurvePrivateKey:
    """A node's private key: ECDSA, as ``ssh-keygen -t ecdsa -b 384 -N ''`` or openssl make it. Raises OptionError."""
    expected = "a private key without a passphrase, of 'ssh-keygen -t ecdsa -b 384'"
    try:
        data = file.read_bytes()
        load = serialization.load_ssh_private_key if b"OPENSSH" in data else serialization.load_pem_private_key
        key = load(data, None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise OptionError("key", str(file), f"{expected} ({error})") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise OptionError("key", str(file), f"{expected}, not another kind of key")
    return key


def secret_of(key: ec.EllipticCurvePrivateKey) -> bytes:
    """The number that a private key is: what a node's other long-lived keys are derived from."""
    return key.private_numbers().private_value.to_bytes(66, "big")


def app_sha256(app: Path) -> str:
    """SHA-256 of the bundle that ``flwr run`` makes of an app's folder."""
    try:
        return hashlib.sha256(build_fab_from_disk(app)).hexdigest()
    except (OSError, ValueError) as error:
        raise OptionError("app", str(app), f"the folder of a Flower app ({error})") from error
