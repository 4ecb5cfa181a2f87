"""The only module that uses Flower's internals: the connection of a node, the hash of an app, shorter waits.

Flower's own SuperNode starts a process for every message and sleeps three seconds between looks. The same protocol
(protobuf over HTTP, requests signed by the node's key) is spoken here by one process that stays. Written against
flwr 1.41; ``tests/deploy/flower/test_flower.py`` says what it relies on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import httpx
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.app.message import make_message
from flwr.proto.message_pb2 import (
    ObjectTree,
    PullObjectRequest,
    PullObjectResponse,
    PushObjectRequest,
    PushObjectResponse,
)
from flwr.supercore.inflatable.inflatable_object import (
    InflatableObject,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from baffle.engines.remote.flower import PART
from baffle.errors import FederationError

_AGAIN = 0.01
_ATTEMPTS = 8
_log = logging.getLogger("baffle")
Result = TypeVar("Result")


def patiently(call: Callable[[], Result]) -> Result:
    """What is asked of the SuperLink, again if it fails inside, as when its database is locked for a moment."""
    for attempt in range(_ATTEMPTS):
        try:
            return call()
        except httpx.HTTPStatusError as error:
            if error.response.status_code < 500:
                raise
            time.sleep(_AGAIN * 2**attempt)
    return call()


def fetch(
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


def records_last(ids: Iterable[str], objects: Mapping[str, InflatableObject]) -> list[str]:
    """The order in which to send objects: who has the records confirms the message, and all of it is forgotten."""
    return sorted(ids, key=lambda id: isinstance(objects[id], ConfigRecord))


def store(call: Callable[[PushObjectRequest], PushObjectResponse], request: PushObjectRequest) -> bool:
    """Put an object where the other side fetches it."""
    for attempt in range(_ATTEMPTS):
        if call(request).stored:
            return True
        time.sleep(_AGAIN * 2**attempt)
    return False


def message_of(head: Message, tree: ObjectTree, pull: Callable[[str], bytes]) -> Message:
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
