"""Messages as Flower stores them: trees of objects, which are fetched and stored one by one.

This folder is the only place that uses Flower's internals. It is written against flwr 1.41; the tests in
``tests/deploy/flower/`` show what it relies on.
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
    """Call the SuperLink, retrying on 5xx errors such as a briefly locked database."""
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
    """Fetch an object, waiting until its sender has stored it.

    Args:
        call: Pulls an object.
        request: Names it.
        patience: Seconds to wait.

    Raises:
        FederationError: The object is unknown, or does not arrive in time.
    """
    give_up, pause = time.monotonic() + patience, _AGAIN
    while True:
        response = call(request)
        if response.object_available:
            return response.object_content
        if not response.object_found or time.monotonic() > give_up:
            raise FederationError(f"part {request.object_id[:12]} of a message is not there")
        time.sleep(pause)
        pause = min(1.0, 1.5 * pause)  # many nodes may be waiting for the same object


def records_last(ids: Iterable[str], objects: Mapping[str, InflatableObject]) -> list[str]:
    """Order objects for sending, records last: once a receiver has these it confirms, and the rest is deleted."""
    return sorted(ids, key=lambda id: isinstance(objects[id], ConfigRecord))


def store(call: Callable[[PushObjectRequest], PushObjectResponse], request: PushObjectRequest) -> bool:
    """Store an object for the other side, retrying; return whether that worked."""
    for attempt in range(_ATTEMPTS):
        if call(request).stored:
            return True
        time.sleep(_AGAIN * 2**attempt)
    return False


def message_of(head: Message, tree: ObjectTree, pull: Callable[[str], bytes]) -> Message:
    """Put a message together from its head and its records; other objects are left out.

    Args:
        head: The message without content.
        tree: The ids of its objects.
        pull: Fetches an object by its id.

    Raises:
        FederationError: A part is missing or malformed.
    """
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
