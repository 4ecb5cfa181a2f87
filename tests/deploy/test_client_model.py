"""What a server says that clients evaluate, and what these make of it: the same bits, or a refusal."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

import baffle as bf
from baffle.client.examples import load_arrays
from baffle.client.participant import Participant
from baffle.core.directions import Directions
from baffle.data import Scaling
from baffle.deploy.client_model import Own, builder
from baffle.deploy.server_app import setup_of
from baffle.errors import BaffleError, BundleError, DataError, ModelError, OptionError
from baffle.protocol.messages import (
    SETUP,
    EnrolRequest,
    EnrolResponse,
    FailedResponse,
    Setup,
    decode_response,
    decode_setup,
    encode,
)
from baffle.runtimes import Runtime
from baffle.runtimes.onnx.bundle import Bundle
from baffle.runtimes.perturb import Perturbations
from baffle.training.build import Server, assemble_server
from baffle.training.options import TrainConfig
from remote_helpers import TRAIN

DATA = TRAIN.take(np.arange(40))
MLP = TrainConfig(model="mlp")


def served(options: TrainConfig) -> tuple[Server, Setup]:
    """A server, and its setup as clients get it."""
    server = assemble_server(msgspec.structs.replace(options, threads=1))
    return server, decode_setup(encode(setup_of(options, server)))


def losses(runtime: Runtime, server: Server, data: bf.Dataset) -> bytes:
    """Along two directions, from the server's weights."""
    directions = Directions(runtime.table, "rank1", (1, 2))
    return runtime.losses(server.initial, Perturbations(directions, 2, (1e-3,), baseline=True), data).tobytes()


@pytest.mark.parametrize(
    "options",
    [
        MLP,
        TrainConfig(activation="relu", seed=2**64 - 1),
        msgspec.structs.replace(MLP, trainable="head"),
        msgspec.structs.replace(MLP, prune=0.7),
        TrainConfig(prune=0.5, prune_by="inputs", precision="bf16"),
        msgspec.structs.replace(MLP, runtime="ort"),
        msgspec.structs.replace(MLP, runtime="ort", prune=0.5, trainable="head"),
        msgspec.structs.replace(MLP, runtime="ort", prune=0.5, prune_by="channels"),
        msgspec.structs.replace(MLP, runtime="openvino"),
    ],
    ids=lambda o: f"{o.model}-{o.runtime}-{o.precision}-{o.trainable}-{o.prune}-{o.prune_by}",
)
def test_a_client_evaluates_what_the_server_does(options: TrainConfig) -> None:
    server, setup = served(options)
    runtime, data = builder(DATA)(setup)
    assert runtime.table == server.runtime.table
    assert runtime.plan.get("frozen", "") == setup.frozen
    assert (setup.frozen != "") == (options.trainable == "head")
    assert losses(runtime, server, data) == losses(server.runtime, server, data)
    if options.prune and options.prune_by != "channels":
        assert any(spec.mask is not None for spec in runtime.table)
    assert isinstance(_enrol(setup), EnrolResponse)


def _enrol(setup: Setup, data: bf.Dataset = DATA) -> EnrolResponse | FailedResponse:
    encoded = encode(setup)
    client = Participant("x", builder(data))
    question = encode(EnrolRequest(hashlib.sha256(encoded).hexdigest()))
    said = decode_response(client.answer(question, {SETUP: encoded}))
    assert isinstance(said, EnrolResponse | FailedResponse)
    return said


def test_fewer_channels_need_a_bundle() -> None:
    options = msgspec.structs.replace(MLP, prune=0.5, prune_by="channels")
    with pytest.raises(OptionError, match="ort or openvino"):
        setup_of(options, assemble_server(options))


# What is not trusted


@pytest.fixture
def own_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module that says when it is imported."""
    (tmp_path / "hostile_model.py").write_text(
        "from baffle.models import build\n"
        "def make(shape, classes):\n    return build('mlp', shape, classes, 0)\n"
        "other = make\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "hostile_model:make"
    sys.modules.pop("hostile_model", None)


def test_code_of_its_own_runs_only_where_its_name_is_trusted(own_model: str) -> None:
    _, setup = served(msgspec.structs.replace(MLP, model=own_model))
    sys.modules.pop("hostile_model")
    for told in (None, "mlp", "hostile_model", "hostile_model:other", "hostile_model:make "):
        with pytest.raises(ModelError, match=f"the server's model is {own_model}: code of its own"):
            builder(DATA, Own(model=told))(setup)
    assert "hostile_model" not in sys.modules
    runtime, _ = builder(DATA, Own(model=own_model))(setup)
    assert runtime.table == setup.table


@pytest.mark.parametrize(
    "options",
    [{"model": "os"}, {"model": "../mlp"}, {"model": 3}, {"seed": -1}, {"seed": None}, {"other": 1}, {"runtime": "x"}],
)
def test_options_that_are_none_are_refused(options: dict[str, str | int | None]) -> None:
    _, setup = served(MLP)
    bad = msgspec.structs.replace(setup, options=setup.options | options)
    with pytest.raises(BaffleError):
        builder(DATA)(bad)


def test_only_the_bundle_that_is_trusted_is_run() -> None:
    infers = msgspec.structs.replace(MLP, runtime="ort")
    server, setup = served(infers)
    other, _ = served(msgspec.structs.replace(infers, seed=1))
    assert server.bundle is not None
    assert other.bundle is not None
    builder(DATA, Own(bundle=server.bundle))(setup)
    with pytest.raises(BundleError, match=f"is {server.bundle.sha256[:12]}: expected {other.bundle.sha256[:12]}"):
        builder(DATA, Own(bundle=other.bundle))(setup)
    with pytest.raises(BundleError, match="no bundle"):
        builder(DATA, Own(bundle=server.bundle))(served(MLP)[1])
    for damaged in (b"", b"PK", server.bundle.encode()[:-30]):
        with pytest.raises(BundleError):
            builder(DATA)(msgspec.structs.replace(setup, bundle=damaged))


def test_another_start_than_the_names_is_told_where_it_is_not_trained() -> None:
    _, setup = served(msgspec.structs.replace(MLP, trainable="head"))
    other = msgspec.structs.replace(setup, options=setup.options | {"seed": 5})
    said = _enrol(other)
    assert isinstance(said, FailedResponse)
    assert "expected the same model" in said.reason


# Examples that do not fit


@pytest.mark.parametrize("kind", ["torch", "ort"])
def test_examples_of_another_kind_are_told_at_once(kind: str) -> None:
    _, setup = served(msgspec.structs.replace(MLP, runtime=kind))
    x, y = np.zeros((4, 1, 8, 8), np.float32), np.arange(4)
    for bad, reason in (
        (bf.Dataset(x[:, :, :7], y), r"7, 8\]: expected"),
        (bf.Dataset(x.reshape(4, 64), y), r"64\]: expected"),
        (bf.Dataset(x, y + 8), r"expected a label in 0\.\.9"),
        (bf.Dataset(x, y - 1), r"= -1: expected a label"),
        (bf.Dataset(x, y.astype(np.float32)), r"float32"),
        (bf.Dataset(x.astype(np.int64), y), r"int64"),
    ):
        with pytest.raises(BaffleError, match=reason):
            builder(bad)(setup)


def test_tokens_are_those_that_the_server_knows() -> None:
    _, setup = served(MLP)
    tokens = msgspec.structs.replace(
        setup, table=(), shape=(6,), vocabulary=9, options=setup.options | {"model": "transformer"}
    )
    x, y = np.arange(24).reshape(4, 6) % 9, np.arange(4)
    assert builder(bf.Dataset(x, y))(tokens)[1].x.tobytes() == x.tobytes()
    for bad, reason in ((x + 1, "tokens 1 to 9: expected 0 to 8"), (x - 1, "tokens -1 to 7"), (x * 0.5, "float32")):
        with pytest.raises(DataError, match=reason):
            builder(bf.Dataset(bad, y))(tokens)


def pixels(kind: str) -> tuple[Server, Setup]:
    """Digits as a server has them whose pixels are bytes that it scales."""
    server, setup = served(msgspec.structs.replace(MLP, runtime=kind))
    if server.bundle is None:
        return server, msgspec.structs.replace(setup, mean=(0.3,), std=(0.2,))
    scaled = bf.Dataset(np.zeros((20, 1, 8, 8), np.uint8), np.arange(20) % 10, "pixels", Scaling((0.3,), (0.2,)))
    import torch.nn.functional as F

    from baffle.models import build

    bundle = bf.export(build("mlp", (1, 8, 8), 10), F.cross_entropy, scaled)
    return server, msgspec.structs.replace(setup, mean=(0.3,), std=(0.2,), bundle=bundle.encode())


@pytest.mark.parametrize("kind", ["torch", "ort"])
def test_bytes_of_pixels_are_scaled_as_the_servers(kind: str, tmp_path: Path) -> None:
    server, setup = pixels(kind)
    x, y = np.random.default_rng(0).integers(0, 256, (12, 1, 8, 8), np.uint8), np.arange(12) % 10
    np.savez(tmp_path / "own.npz", x=x, y=y)
    expected = Scaling((0.3,), (0.2,))(x)
    for own in (load_arrays(tmp_path / "own.npz"), bf.Dataset(x, y, "own", Scaling((0.9,), (0.1,)))):
        runtime, data = builder(own)(setup)
        assert data.x.dtype == np.uint8
        assert data.inputs().dtype == np.float32
        assert data.inputs().tobytes() == expected.tobytes()
        assert losses(runtime, server, data)
    scaled = bf.Dataset(expected, y)  # a client that scaled them itself
    if kind == "torch":
        assert builder(scaled)(setup)[1].inputs().tobytes() == expected.tobytes()


@pytest.mark.parametrize("value", [-1, 256])
def test_integers_that_are_no_pixels_are_told(value: int) -> None:
    _, setup = pixels("torch")
    x = np.zeros((4, 1, 8, 8), np.int64)
    x[2, 0, 3, 3] = value
    with pytest.raises(DataError, match="expected pixels, 0 to 255"):
        builder(bf.Dataset(x, np.arange(4)))(setup)


def test_pixels_of_other_channels_are_told() -> None:
    _, setup = pixels("torch")
    with pytest.raises(DataError, match="expected uint8"):
        builder(bf.Dataset(np.zeros((4, 3, 8, 8), np.int64), np.arange(4)))(setup)


def test_a_bundle_is_decoded_as_it_was_sent() -> None:
    server, setup = served(msgspec.structs.replace(MLP, runtime="ort"))
    assert server.bundle is not None
    assert setup.bundle is not None
    assert Bundle.decode(setup.bundle).sha256 == server.bundle.sha256
