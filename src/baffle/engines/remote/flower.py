"""Flower as the transport: questions and answers as records of its messages, sent over the Grid of a ServerApp.

Of Flower (arXiv 2007.14390) identity, TLS, the distribution of apps and the Ray simulation are used, and its public
Message API; the round loop is ``engines.remote``. A parcel is cut into records of 1 MiB, which Flower carries as
objects of their own, named by their hash: what many clients need goes to the SuperLink once.
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
from baffle.engines.remote.transport import Arrival, Letter, Sent

_PIECE = 2**20
_CLIENT = "client-"
_MESSAGE, _FIELD = "message", "data"
PART = "part"
"""Field of a record that says which piece of what it is, so that a record alone tells."""


class Node(Protocol):
    """A node of the federation."""

    @property
    def node_id(self) -> int:
        """Its number at the SuperLink."""
        ...

    @property
    def public_key(self) -> bytes:
        """As PEM; empty in the simulation."""
        ...


class Post(Protocol):
    """What is used of a Grid."""

    def get_nodes(self) -> Iterable[Node]:
        """Who is connected."""
        ...

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages; their ids."""
        ...

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies that have come."""
        ...


class GridTransport:
    """Letters as Flower messages: ``RemoteEngine(GridTransport(grid), ...)`` trains with the nodes of a federation.

    A node is known by the hash of its public key, which the SuperLink has checked.
    ``baffle.deploy.server_app.serve`` is the whole ServerApp; this is for one of your own, and
    ``baffle.deploy.flower.grid.quick`` makes its grid faster.
    """

    def __init__(self, grid: Post) -> None:
        self._grid = grid

    def nodes(self) -> Mapping[str, int]:
        """The nodes that are connected, by identity."""
        return {
            sha256(node.public_key).hexdigest() if node.public_key else f"node-{node.node_id}": node.node_id
            for node in self._grid.get_nodes()
        }

    def send(self, letters: Sequence[Letter], ttl: float) -> list[Sent]:
        """Push a message a letter."""
        messages = [
            Message(
                to_records(letter.question, letter.parcels),
                letter.node,
                MessageType.TRAIN,
                ttl=ttl,
                group_id=f"{_CLIENT}{letter.client}",
            )
            for letter in letters
        ]
        sizes = [size_of(message) for message in messages]
        ids = list(self._grid.push_messages(messages))
        return [Sent(id or "", size) for id, size in zip(ids, sizes, strict=True)]

    def receive(self, ids: Sequence[str]) -> list[Arrival]:
        """Pull the replies that have come."""
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
        response = b""  # which is no message of ours either, and is refused as such
    return Arrival(about, node, response, None, size)


def reply_to(message: Message, participant: Participant) -> Message:
    """What a ClientApp or a node returns: a participant's answer to a message.

    A message that is none of ours gets an answer that says so.
    """
    try:
        question, parcels = from_records(message.content)
    except ReplyError:
        question, parcels = b"", {}
    number = message.metadata.group_id.removeprefix(_CLIENT)
    client = int(number) if number.isdecimal() else 0
    return Message(to_records(participant.answer(question, parcels, client), {}), reply_to=message)


def to_records(data: bytes, parcels: Mapping[str, bytes]) -> RecordDict:
    """A message and its parcels as records.

    Examples:
        >>> from_records(to_records(b"?", {"state": bytes(3_000_000)}))[1]["state"] == bytes(3_000_000)
        True
    """
    records = RecordDict()
    for kind, whole in {_MESSAGE: data, **parcels}.items():
        for start in range(0, len(whole), _PIECE):
            part = f"{kind}.{start // _PIECE:06d}"
            records[part] = ConfigRecord({PART: part, _FIELD: whole[start : start + _PIECE]})
    return records


def from_records(records: RecordDict) -> tuple[bytes, dict[str, bytes]]:
    """The inverse of :func:`to_records`. Raises ReplyError if these records are something else."""
    pieces: dict[str, list[tuple[str, bytes]]] = {}
    for record in records.values():
        part, data = (record.get(name) if isinstance(record, ConfigRecord) else None for name in (PART, _FIELD))
        if not isinstance(part, str) or not isinstance(data, bytes):
            raise ReplyError(f"a record without text in {PART!r} and bytes in {_FIELD!r}: expected both")
        kind, _, number = part.partition(".")
        pieces.setdefault(kind, []).append((number, data))
    parcels = {kind: b"".join(data for _, data in sorted(parts)) for kind, parts in pieces.items()}
    if _MESSAGE not in parcels:
        raise ReplyError(f"records of {', '.join(parcels) or 'nothing'}: expected {_MESSAGE!r} among them")
    return parcels.pop(_MESSAGE), parcels


def size_of(message: Message) -> int:
    """Bytes of a message's objects, as Flower sends them: itself, its records, and all that is in these."""
    return sum(len(part.deflate()) for part in _nested(message))


def _nested(part: object) -> Iterable[Message]:
    """A message and what it is made of; every part can be deflated."""
    message = cast(Message, part)
    yield message
    for child in (message.children or {}).values():
        yield from _nested(child)
