"""The Grid of a ServerApp with fewer requests and shorter waits."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial

import httpx
from flwr.app import Error, Message
from flwr.app.message import make_message, remove_content_from_message
from flwr.common.constant import ErrorCode
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ObjectTree,
    PullObjectRequest,
    PullObjectResponse,
    PushObjectRequest,
    PushObjectResponse,
)
from flwr.proto.node_pb2 import NodeInfo
from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PushAppMessagesRequest
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import (
    InflatableObject,
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.superlink.grid.http_grid import HttpGrid

from baffle.deploy.flower.objects import Result, fetch, message_of, patiently, records_last, store
from baffle.engines.remote.flower import Post
from baffle.errors import FederationError

_LINGER = 3.0


class QuickGrid:
    """The Grid of a ServerApp with fewer requests and shorter waits: of a reply only the records are fetched.

    Raises FederationError for transient failures. Objects that the SuperLink fails to store (its database may be
    locked for a moment) are sent again; a message that it still does not store gets an empty id. A reply whose parts
    do not arrive within seconds is replaced by an error message. A reply is confirmed, so that the SuperLink may delete
    it, only some seconds after it was read: by then its sender has sent the rest of it.
    """

    def __init__(self, grid: HttpGrid) -> None:
        self._grid, self._client = grid, grid._runtime_client
        self._read: deque[tuple[float, str]] = deque()  # when each reply was read, and its id

    def get_nodes(self) -> Iterable[NodeInfo]:
        """The nodes that are connected."""
        return _transient(lambda: self._grid.get_nodes())

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send messages; return their ids, empty for those that were not stored."""
        return _transient(lambda: self._push(messages))

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies that have arrived."""
        return _transient(lambda: self._pull(message_ids))

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
            response = patiently(lambda: self._client.PushMessages(request))
            push = partial(
                PushObjectRequest, node=self._grid.node, run_id=self._grid.run.run_id, session_id=response.session_id
            )
            missing = {
                id
                for id in records_last(response.objects_to_push, objects)
                if not store(self._push_object, push(object_id=id, object_content=objects[id].deflate()))
            }
        parts = ({part.object_id for part in iterate_object_tree(tree)} for tree in trees)
        return ["" if missing & ids else id for id, ids in zip(response.message_ids, parts, strict=True)]

    def _pull(self, message_ids: Iterable[str]) -> list[Message]:
        request = PullAppMessagesRequest(message_ids=message_ids)
        response = patiently(lambda: self._client.PullMessages(request))
        pairs = zip(response.messages_list, response.message_object_trees, strict=True)
        replies = [self._read_whole(message_from_proto(head), tree) for head, tree in pairs]
        while self._read and self._read[0][0] < time.monotonic() - _LINGER:
            _, id = self._read.popleft()
            node, run = self._grid.node, self._grid.run.run_id
            confirm = ConfirmMessageReceivedRequest(node=node, run_id=run, message_object_id=id)
            with contextlib.suppress(httpx.HTTPStatusError):  # it is deleted with the run at the latest
                self._client.ConfirmMessageReceived(confirm)
        return replies

    def _push_object(self, request: PushObjectRequest) -> PushObjectResponse:
        return patiently(lambda: self._client.PushObject(request))

    def _pull_object(self, request: PullObjectRequest) -> PullObjectResponse:
        return patiently(lambda: self._client.PullObject(request))

    def _read_whole(self, head: Message, tree: ObjectTree) -> Message:
        node, run = self._grid.node, self._grid.run.run_id
        request = partial(PullObjectRequest, node=node, run_id=run)
        try:
            message = message_of(head, tree, lambda id: fetch(self._pull_object, request(object_id=id), 10))
        except FederationError as error:
            message = make_message(head.metadata, error=Error(ErrorCode.MESSAGE_UNAVAILABLE, str(error)))
        self._read.append((time.monotonic(), head.metadata.message_id))
        return message


def _transient(call: Callable[[], Result]) -> Result:
    """Turn temporary SuperLink errors into FederationError, which the round survives.

    Flower itself waits until connection errors are over.
    """
    try:
        return call()
    except httpx.HTTPStatusError as error:
        raise FederationError(f"the SuperLink answers {error.response.status_code}") from error


def quick(grid: Grid) -> Post:
    """Make a grid that speaks HTTP quicker; any other (in the simulation) is returned as it is."""
    return QuickGrid(grid) if isinstance(grid, HttpGrid) else grid
