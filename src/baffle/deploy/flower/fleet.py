"""A node's connection to a SuperLink, in one process that stays.

Flower's own SuperNode starts a process for every message and sleeps three seconds between polls. The same protocol
(protobuf over HTTP, requests signed by the node's key) is spoken here.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import TracebackType

import httpx
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Error, Message
from flwr.app.message import remove_content_from_message
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
    PullObjectRequest,
    PushObjectRequest,
)
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest
from flwr.supercore.error import FlowerError
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from baffle.deploy.flower.objects import Result, _log, fetch, message_of, patiently, records_last, store
from baffle.errors import FederationError, OptionError
from baffle.protocol.messages import printable

HEARTBEAT = 10
"""Interval in seconds: the shortest that Flower allows; a node counts as offline after two."""

_BEAT_EVERY = 4.0
_PULL_PATIENCE = 60.0


class Fleet:
    """A node's connection to a SuperLink. Every call may raise FederationError: wait, then ``connect`` again.

    Args:
        superlink: ``HOST:PORT``.
        certificates: PEM file of the authority that signed the SuperLink's certificate; None: no TLS.
        key: The node's private key; by default a new one that lasts as long as this object.

    Raises:
        OptionError: The address is malformed, or the file has no certificates.
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
        """Become a node of the SuperLink, or become one again; return the node's number there."""
        if self._heart is not None and self._pulse():
            return self._node.node_id  # one that is still online cannot be activated
        request = RegisterNodeFleetRequest(public_key=self._public)
        try:
            self._call(self._client.RegisterNode, request)
        except FederationError as error:
            _log.debug("not registered: %s", error)  # it was registered before, or its operator has to do it
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
            return message_of(head, tree, lambda id: fetch(pull, request(object_id=id), _PULL_PATIENCE))
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
            for id in records_last(response.objects_to_push, objects):
                if not store(call, push(object_id=id, object_content=objects[id].deflate())):
                    raise FederationError(f"the SuperLink does not store part {id[:12]} of a message")

    def app_of(self, message: Message) -> str:
        """SHA-256 of the app bundle that a message's run was started with, computed from the bundle itself."""
        run = message.metadata.run_id
        if run not in self._apps:
            info = run_from_proto(self._call(self._client.GetRun, GetRunRequest(node=self._node, run_id=run)).run)
            request = GetFabRequest(node=self._node, hash_str=info.fab_hash, run_id=run)
            fab = fab_from_proto(self._call(self._client.GetFab, request).fab)
            self._apps[run] = hashlib.sha256(fab.content).hexdigest()
        return self._apps[run]

    def close(self) -> None:
        """Sign off, if the SuperLink can be reached."""
        self._stop.set()
        if self._heart is not None:
            self._heart.join(timeout=1)
            try:
                self._call(self._client.DeactivateNode, DeactivateNodeRequest(node_id=self._node.node_id))
            except FederationError as error:
                _log.debug("not signed off: %s", error)
        self._client.close()

    def _pulse(self) -> bool:
        """Send a heartbeat; return whether the SuperLink knows this node."""
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
            return patiently(lambda: method(*request))
        except httpx.HTTPStatusError as error:
            details = FlowerError.from_json(error.response.text)
            reason = f"{details.message} {details.public_details or ''}" if details is not None else error.response.text
            raise FederationError(
                f"{self._address} refuses ({error.response.status_code}): {printable(reason, 200)}"
            ) from error
        except httpx.HTTPError as error:
            raise FederationError(f"{self._address} cannot be reached: {error}") from error
        except (ValueError, RuntimeError) as error:  # not protobuf; or the client is being closed
            raise FederationError(f"{self._address}: {error}") from error


def refusal(message: Message, reason: str) -> Message:
    """An error in reply to a message."""
    return Message(Error(ErrorCode.INVALID_FAB, reason), reply_to=message)
