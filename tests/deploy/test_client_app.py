"""A client of Flower's own SuperNode, or of its simulation, finds its data by the node's configuration."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from flwr.app import Message, Metadata
from flwr.app.message import make_message

from baffle.deploy.client_app import answer
from baffle.deploy.flower.app_bundle import app_folder
from baffle.engines.remote.flower import from_records, to_records
from baffle.errors import OptionError
from baffle.protocol.messages import decode_response


def context(node: int, **config: str | int) -> SimpleNamespace:
    return SimpleNamespace(node_id=node, node_config=config, run_config={"config": ""})


def nonsense() -> Message:
    metadata = Metadata(5, "", 1, 7, "", "client-0", time.time(), 60.0, "train")
    return make_message(metadata, content=to_records(b"nonsense", {}))


def test_the_app_calls_it() -> None:
    assert "baffle.deploy.client_app import answer" in (app_folder() / "federation/client_app.py").read_text()


def test_a_node_without_data_is_an_error_that_says_how_to_name_them() -> None:
    with pytest.raises(OptionError, match="partition-id"):
        answer(nonsense(), context(1, name="empty"))  # type: ignore[arg-type]


def test_a_node_with_a_file_answers(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=np.zeros((2, 1, 8, 8), np.float32), y=np.zeros(2, np.int64))
    reply = answer(nonsense(), context(2, data=str(tmp_path / "data.npz")))  # type: ignore[arg-type]
    assert "malformed" in str(decode_response(from_records(reply.content)[0]))
