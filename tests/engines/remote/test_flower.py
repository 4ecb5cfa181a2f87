"""Requests as Flower messages: records are cut and joined, and those of others are refused."""

from __future__ import annotations

import time
from collections.abc import Iterable

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, Metadata, RecordDict
from flwr.app.message import make_message
from flwr.supercore.task_identity import TaskIdentity

from baffle.client.participant import Participant
from baffle.deploy.client_model import builder
from baffle.engines.remote.flower import GridTransport, Node, from_records, reply_to, size_of, to_records
from baffle.engines.remote.transport import Request
from baffle.errors import ReplyError
from baffle.protocol.messages import (
    SETUP,
    FailedResponse,
    decode_response,
)
from remote_helpers import TRAIN

DATA = TRAIN.take(np.arange(40))


class Grid:
    """Takes the messages for the nodes that it knows."""

    def __init__(self, *nodes: int) -> None:
        self.known, self.sent = nodes, list[Message]()

    def get_nodes(self) -> Iterable[Node]:
        return []

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        self.sent = list(messages)
        return [f"m{m.metadata.dst_node_id}" if m.metadata.dst_node_id in self.known else "" for m in self.sent]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return []


def test_what_a_grid_does_not_take_has_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_run_id", "_task_id", "_node_id"):  # as in the process of a ServerApp
        monkeypatch.setattr(TaskIdentity, name, 1)
    grid = Grid(7)
    sent = GridTransport(grid).send([Request(7, b"?"), Request(8, b"?", {SETUP: bytes(3_000_000)}, 5)], 60.0)
    assert [s.id for s in sent] == ["m7", ""]
    assert [s.size for s in sent] == [size_of(m) for m in grid.sent]
    assert sent[1].size > 3_000_000
    assert [m.metadata.group_id for m in grid.sent] == ["client-0", "client-5"]


@pytest.mark.parametrize("size", [1, 2**20 - 1, 2**20, 2**20 + 1, 3 * 2**20])
def test_attachments_are_cut_and_put_together(size: int) -> None:
    whole = np.random.default_rng(size).bytes(size)
    records = to_records(b"?", {SETUP: whole, "state": b"s"})
    shuffled = RecordDict(dict(reversed(list(records.items()))))
    assert from_records(shuffled) == (b"?", {SETUP: whole, "state": b"s"})
    assert len(records) == 2 + -(-size // 2**20)


@pytest.mark.parametrize(
    "records",
    [
        RecordDict(),
        RecordDict({"a": ConfigRecord({"part": "state.000000", "data": b"x"})}),
        RecordDict({"a": ConfigRecord({"part": 3, "data": b"x"})}),
        RecordDict({"a": ConfigRecord({"part": "message.000000", "data": "x"})}),
        RecordDict({"a": ConfigRecord({"data": b"x"})}),
    ],
    ids=["none", "no message", "part", "data", "no part"],
)
def test_records_of_others_are_refused(records: RecordDict) -> None:
    with pytest.raises(ReplyError, match="expected"):
        from_records(records)
    reply = reply_to(_received(records), Participant("x", builder(DATA)))
    assert isinstance(decode_response(from_records(reply.content)[0]), FailedResponse)


def _received(records: RecordDict) -> Message:
    return make_message(Metadata(5, "m", 1, 7, "", "client-3", time.time(), 60.0, "train"), content=records)
