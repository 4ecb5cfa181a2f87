"""Flower as the transport: requests and answers as records of its messages, sent over the Grid of a ServerApp.

Of Flower (arXiv 2007.14390) identity, TLS, the distribution of apps and the Ray simulation are used, and its public
Message API; the round loop is ``engines.remote``. An attachment is cut into records of 1 MiB, which Flower carries as
separate objects, named by their hash: a piece that many clients need is uploaded to the SuperLink once.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from typing import Protocol, cast

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # before the import: nothing is sent unless asked for
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

from baffle.errors import MissingExtraError, ReplyError

try:
    from flwr.app import ConfigRecord, Message, MessageType, RecordDict
except ImportError as error:
    raise MissingExtraError("Flower is not installed: pip install 'baffle[flower]'") from error

from baffle.client.participant import Participant
from baffle.engines.remote.transport import Arrival, Request, Sent

_PIECE = 2**20
_CLIENT = "client-"
_MESSAGE, _FIELD = "message", "data"
PART = "part"
"""Field of a record that names its piece, so that a record can be identified on its own."""


class Node(Protocol):
    """A node of the federation."""

    @property
    def node_id(self) -> int:
        """The node's number at the SuperLink."""
        ...

    @property
    def public_key(self) -> bytes:
        """The node's public key as PEM; empty in the simulation."""
        ...


class Post(Protocol):
    """The part of Flower's Grid that is used here."""

    def get_nodes(self) -> Iterable[Node]:
        """List the connected nodes."""
        ...

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages; returns their ids."""
        ...

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Fetch the replies that have arrived."""
        ...


class GridTransport:
    """Carry requests as Flower messages: ``RemoteEngine(GridTransport(grid), ...)`` trains with a federation's nodes.

    A node's identity is the hash of its public key, which the SuperLink has verified.
    ``baffle.deploy.server_app.serve`` is the complete ServerApp; this class is for one of your own, and
    ``baffle.deploy.flower.grid.quick`` makes its grid faster.

    Args:
        grid: that Flower passes to a ServerApp.
    """

    def __init__(self, grid: Post) -> None:
        self._grid = grid

    def nodes(self) -> Mapping[str, int]:
        """List the connected nodes: address by identity."""
        return {
            sha256(node.public_key).hexdigest() if node.public_key else f"node-{node.node_id}": node.node_id
            for node in self._grid.get_nodes()
        }

    def send(self, requests: Sequence[Request], ttl: float) -> list[Sent]:
        """Push one message per request."""
        messages = [
            Message(
                to_records(request.message, request.attachments),
                request.node,
                MessageType.TRAIN,
                ttl=ttl,
                group_id=f"{_CLIENT}{request.client}",
            )
            for request in requests
        ]
        sizes = [size_of(message) for message in messages]
        ids = list(self._grid.push_messages(messages))
        return [Sent(id or "", size) for id, size in zip(ids, sizes, strict=True)]

    def receive(self, ids: Sequence[str]) -> list[Arrival]:
        """Pull the replies that have arrived."""
        return [_arrival(message) for message in self._grid.pull_messages(ids)]


def _arrival(message: Message) -> Arrival:
    about, size = message.metadata.reply_to_message_id, size_of(message)
    if message.has_error():
        reason = f"error {message.error.code}: {message.error.reason or 'no answer'}"
        return Arrival(about, None, None, reason, size)
    node = message.metadata.src_node_id
    try:
        response, _ = from_records(message.content)
    except ReplyError:
        response = b""  # the engine rejects it as malformed
    return Arrival(about, node, response, None, size)


def reply_to(message: Message, participant: Participant) -> Message:
    """Answer a Flower message with a participant, in a ClientApp or a node.

    A message that baffle cannot read gets a FailedResponse.
    """
    try:
        request, attachments = from_records(message.content)
    except ReplyError:
        request, attachments = b"", {}
    number = message.metadata.group_id.removeprefix(_CLIENT)
    client = int(number) if number.isdecimal() else 0
    return Message(to_records(participant.answer(request, attachments, client), {}), reply_to=message)


def to_records(data: bytes, attachments: Mapping[str, bytes]) -> RecordDict:
    """Cut a message and its attachments into records.

    Examples:
        >>> from_records(to_records(b"?", {"state": bytes(3_000_000)}))[1]["state"] == bytes(3_000_000)
        True
    """
    records = RecordDict()
    for kind, whole in {_MESSAGE: data, **attachments}.items():
        for start in range(0, len(whole), _PIECE):
            part = f"{kind}.{start // _PIECE:06d}"
            records[part] = ConfigRecord({PART: part, _FIELD: whole[start : start + _PIECE]})
    return records


def from_records(records: RecordDict) -> tuple[bytes, dict[str, bytes]]:
    """Join a message and its attachments. Raises ReplyError for records that :func:`to_records` did not make."""
    pieces: dict[str, list[tuple[str, bytes]]] = {}
    for record in records.values():
        part, data = (record.get(name) if isinstance(record, ConfigRecord) else None for name in (PART, _FIELD))
        if not isinstance(part, str) or not isinstance(data, bytes):
            raise ReplyError(f"a record without text in {PART!r} and bytes in {_FIELD!r}: expected both")
        kind, _, number = part.partition(".")
        pieces.setdefault(kind, []).append((number, data))
    attachments = {kind: b"".join(data for _, data in sorted(parts)) for kind, parts in pieces.items()}
    if _MESSAGE not in attachments:
        raise ReplyError(f"records of {', '.join(attachments) or 'nothing'}: expected {_MESSAGE!r} among them")
    return attachments.pop(_MESSAGE), attachments


def size_of(message: Message) -> int:
    """Count the bytes of a message's objects as Flower sends them: itself, its records, and their contents."""
    return sum(len(part.deflate()) for part in _nested(message))


def _nested(part: object) -> Iterable[Message]:
    """Iterate over a message and its parts; each part can be deflated."""
    message = cast(Message, part)
    yield message
    for child in (message.children or {}).values():
        yield from _nested(child)
