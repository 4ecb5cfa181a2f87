"""A client's own examples: files that do not fit are refused with one line; stored pixels are scaled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.nn.functional as F

import baffle as bf
from baffle.client.examples import load_examples
from baffle.engines.pipe import PipeEngine, write_clients
from edge_helpers import METHOD, Fleet, main, make_fleet, one_line, small, without_torch


@pytest.fixture(scope="module", autouse=True)
def no_torch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """In every process that the tests start, importing PyTorch fails."""
    with without_torch(tmp_path_factory.mktemp("blocked")):
        yield


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Fleet:
    return make_fleet(tmp_path_factory.mktemp("fleet"), "fp32")


def arrays(fleet: Fleet) -> dict[str, Any]:
    return {"x": np.asarray(fleet.clients[0].x)[:20].copy(), "y": np.asarray(fleet.clients[0].y)[:20].copy()}


def replaced(array: Any, where: Any, value: float) -> Any:
    array[where] = value
    return array


def compressed(path: Path, contents: dict[str, Any]) -> None:
    np.savez_compressed(path, **contents)
    data = bytearray(path.read_bytes())
    data[len(data) // 3 : len(data) // 3 + 40] = bytes(40)
    path.write_bytes(data)


def one_array(path: Path, contents: dict[str, Any]) -> None:
    with path.open("wb") as file:
        np.save(file, contents["x"])


BAD_DATA: dict[str, tuple[Callable[[Path, dict[str, Any]], object], str]] = {
    "no file": (lambda path, a: None, "No such file"),
    "a folder": (lambda path, a: path.mkdir(), "directory"),
    "empty": (lambda path, a: path.write_bytes(b""), "expected an .npz file"),
    "text": (lambda path, a: path.write_text("x, y\n"), "expected an .npz file"),
    "one array": (one_array, "expected an .npz file"),
    "other names": (lambda path, a: np.savez(path, images=a["x"], labels=a["y"]), "images, labels: expected"),
    "no labels": (lambda path, a: np.savez(path, x=a["x"]), "arrays x: expected"),
    "objects": (lambda path, a: np.savez(path, x=np.array([{}, {}]), y=a["y"]), "Object arrays"),
    "damaged": (compressed, "expected an .npz file"),
    "no examples": (lambda path, a: np.savez(path, x=a["x"][:0], y=a["y"][:0]), "no examples"),
    "unequal": (lambda path, a: np.savez(path, x=a["x"], y=a["y"][1:]), "20 examples and y has 19"),
    "NaN": (lambda path, a: np.savez(path, x=replaced(a["x"], (3, 0, 1, 1), np.nan), y=a["y"]), "x[3, 0, 1, 1]"),
    "infinity": (lambda path, a: np.savez(path, x=replaced(a["x"], 0, np.inf), y=a["y"]), "= inf"),
    "flat": (
        lambda path, a: np.savez(path, x=a["x"].reshape(20, 64), y=a["y"]),
        "expected float32 [examples, 1, 8, 8]",
    ),
    "bytes": (lambda path, a: np.savez(path, x=a["x"].astype(np.uint8), y=a["y"]), "expected float32 [examples"),
    "text in it": (lambda path, a: np.savez(path, x=np.array(["a"] * 20), y=a["y"]), "<U1"),
    "soft labels": (lambda path, a: np.savez(path, x=a["x"], y=np.ones((20, 10))), "expected int64 [examples]"),
    "a label too large": (lambda path, a: np.savez(path, x=a["x"], y=replaced(a["y"], 7, 10)), "example 7.y[0] = 10"),
    "a negative label": (lambda path, a: np.savez(path, x=a["x"], y=replaced(a["y"], 9, -1)), "example 9.y[0] = -1"),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_data_that_do_not_fit_are_one_line(
    fleet: Fleet, tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    write, reason = BAD_DATA[name]
    write(tmp_path / "mine.npz", arrays(fleet))
    assert main(fleet.folder / "client.zip", tmp_path / "mine.npz") == 2
    one_line(capfd.readouterr(), "mine.npz", reason)


def test_stored_pixels_are_scaled_as_the_bundle_says(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 1, 8, 8), dtype=np.uint8)
    data = bf.Dataset(pixels, np.arange(30) % 10, "pixels", bf.data.Scaling((0.4,), (0.2,)))
    bundle = bf.export(small(), F.cross_entropy, data)
    commands = write_clients(bundle, bf.partition(data, 2), tmp_path)
    with np.load(tmp_path / "client-0.npz") as file:
        assert file["x"].dtype == np.uint8
    with PipeEngine(bundle, commands, bf.OrtRuntime(bundle, 1)) as engine:
        over_pipes = bf.train(METHOD, engine, bundle.initial, rounds=1)
    simulation = bf.LocalEngine(bf.OrtRuntime(bundle, 1), bf.partition(data, 2), together=False)
    assert over_pipes.weights_sha256 == bf.train(METHOD, simulation, bundle.initial, rounds=1).weights_sha256
    floats = bf.Dataset(data.inputs(), data.y)
    np.savez(tmp_path / "scaled.npz", x=floats.x, y=floats.y)
    assert (load_examples(tmp_path / "scaled.npz", bundle).inputs() == data.inputs()).all()
