"""Messages are put together from their records, and named by their hash."""

from __future__ import annotations

import time
from collections.abc import Callable

from flwr.app import ConfigRecord, Message, Metadata, RecordDict
from flwr.app.message import make_message, remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree

from baffle.deploy.flower.objects import message_of
from baffle.engines.remote.flower import from_records, to_records


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
