"""What the tests of commands share: small runs, their options, and checks of what a command printed."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import baffle as bf
from helpers import Outcome, places

SMALL = (
    *("--model", "mlp", "--num-directions", "4", "--batch-size", "8", "--clients", "3", "--rounds", "4"),
    *("--threads", "1"),  # two threads crawl where the cores are shared
)
SMALL_RUN = ("train", *SMALL, "--evaluate-every", "2", "--snapshot-every", "3", "--json")
SUMMARY = {
    "accuracy",
    "loss",
    "rounds",
    "clients",
    "num_directions",
    "lattice",
    "sigma",
    "forward_passes",
    "samples_forwarded",
    "bytes_up",
    "bytes_down",
    "seconds",
    "peak_rss_mb",
    "parameters",
    "weights_sha256",
    "run",
}
SHORT = (
    *("--model", "mlp", "--clients", "2", "--batch-size", "4", "--num-directions", "2", "--rounds", "4"),
    *("--threads", "1", "--evaluate-every", "1", "--snapshot-every", "2"),
)
TRAIN_SHORT = ("train", *SHORT, "--json", "--out", "run")


def refused(outcome: Outcome, *words: str) -> None:
    """Exit code 2, one line on stderr that names what is wrong, nothing on stdout."""
    assert (outcome.code, outcome.out) == (2, ""), outcome
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("\n") == 1, outcome.err
    for word in words:
        assert word in outcome.err, (word, outcome.err)


def config(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "config.json").read_text())
    return found


def assert_is_png(file: Path) -> None:
    data = file.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    assert data.endswith(b"IEND\xaeB`\x82")
    assert min(struct.unpack_from(">II", data, 16)) >= 100


GROUPS = np.array([f"user {i % 4}" for i in range(60)])


def save_users(file: Path, **changes: object) -> Path:
    """An .npz of 60 + 15 vectors of three classes that belong to four users, or with changes."""
    labels = np.arange(75) % 3
    x = (np.random.default_rng(0).normal(size=(75, 5)) + np.eye(3, 5)[labels]).astype(np.float32)
    mine = {"x_train": x[:60], "y_train": labels[:60], "x_test": x[60:], "y_test": labels[60:], "groups_train": GROUPS}
    kept = {name: np.asarray(value) for name, value in (mine | changes).items() if value is not None}
    np.savez(file, **kept)  # type: ignore[arg-type]  # numpy's stub takes a keyword for allow_pickle
    return file


def tokens(largest: int = 19) -> dict[str, object]:
    """Sentences of six tokens, padded with zeros; one example has the largest."""
    x = np.random.default_rng(1).integers(1, 19, (75, 6))
    x[::5, 4:] = 0
    x[7, 2] = largest
    return {"x_train": x[:60], "x_test": x[60:]}


OF_USERS = ("--dataset", "arrays", "--data", "mine.npz")


TINY = '''
"""A perceptron of 910 parameters."""

from torch import nn


def build(shape: tuple[int, ...], classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.Hardswish(), nn.Linear(12, classes))


def wide(shape: tuple[int, ...], classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 13), nn.Hardswish(), nn.Linear(13, classes))
'''
MODEL = ("--model", "tiny_model:build")
TINY_OPTIONS = (
    *(*MODEL, "--clients", "2", "--batch-size", "8", "--num-directions", "4", "--rounds", "4", "--threads", "1"),
    *("--evaluate-every", "2", "--snapshot-every", "2", "--lr", "0.05", "--ema", "0.5"),
)
TRAIN_TINY = ("train", *TINY_OPTIONS, "--json", "--out", "run")
SHAPES = {"1.weight": [12, 64], "1.bias": [12], "3.weight": [10, 12], "3.bias": [10]}


def last_json(outcome: Outcome) -> dict[str, Any]:
    assert outcome.code == 0, outcome.err
    result: dict[str, Any] = json.loads(outcome.out.splitlines()[-1])
    return result


def refused_with(outcome: Outcome, line: str) -> None:
    """Exit code 2, nothing on stdout, and this one line on stderr; "..." stands for anything."""
    assert (outcome.code, outcome.out) == (2, ""), outcome
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("\n") == 1, outcome.err
    told = outcome.err.removeprefix("error: ").rstrip("\n")
    assert re.fullmatch(".*".join(map(re.escape, line.split("..."))), told), told


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def cut(run: Path, row: int) -> None:
    """Leave rows before ``row``, and half of it."""
    at = places(run)[row]
    with (run / "rows.bin").open("r+b") as file:
        file.truncate((at.start + at.end) // 2)


ORT = ("--runtime", "ort")
INT8 = (*ORT, "--precision", "int8")


def examples(data: bf.Dataset) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(np.array(data.inputs())), torch.from_numpy(np.array(data.y))


def tensors(**changes: Tensor | None) -> dict[str, Tensor]:
    """Weights of the model by name, with changes; ``_`` is a dot there."""
    random = torch.Generator().manual_seed(0)
    mine: dict[str, Tensor | None] = {
        name: torch.randn(shape, generator=random) * 0.1 for name, shape in SHAPES.items()
    }
    mine |= {name.strip("_").replace("_", "."): tensor for name, tensor in changes.items()}
    return {name: tensor for name, tensor in mine.items() if tensor is not None}
