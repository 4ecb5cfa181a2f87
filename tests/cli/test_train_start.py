"""``baffle train --start``: from another run, or from a file of tensors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.numpy import load_file
from safetensors.torch import save_file
from torch import Tensor

import baffle as bf
from baffle.models import build
from cli_helpers import SHAPES, TRAIN_TINY, config, examples, metrics, refused_with, tensors
from helpers import invoke, tree

pytestmark = pytest.mark.usefixtures("tiny_model", "exports")


def initial(run: Path) -> dict[str, Any]:
    return load_file(run / "initial.safetensors")


def test_a_run_starts_from_the_average_of_another(tmp_path: Path, base: Path) -> None:
    assert invoke(tmp_path, *TRAIN_TINY, "--start", base).code == 0
    journal = bf.Journal.open(base)
    average = journal.state().ema_weights
    assert (average != journal.state().weights).any()
    for spec in journal.config.table:
        assert (initial(tmp_path / "run")[spec.name].reshape(-1) == average[spec.slice]).all()
    assert config(tmp_path / "run")["command"]["start"] == str(base)


def test_a_run_starts_from_one_that_trained_a_part(tmp_path: Path, base: Path) -> None:
    """The tensors that were frozen are not in its rows, but they are part of the model."""
    assert invoke(tmp_path, *TRAIN_TINY, "--start", base, "--trainable", "head", "--out", "head").code == 0
    assert invoke(tmp_path, *TRAIN_TINY, "--start", "head").code == 0
    found, before, head = (initial(tmp_path / "run"), load_file(base / "model.safetensors"), tmp_path / "head")
    for name in ("1.weight", "1.bias"):
        assert (found[name] == before[name]).all()
    for name, array in load_file(head / "model.safetensors").items():
        assert (found[name] == array).all()
        assert (found[name] != before[name]).any()


STARTS: dict[str, tuple[dict[str, Tensor], str | None, set[str]]] = {
    "all": (tensors(), None, set()),
    "more": (tensors(other=torch.zeros(3)), None, set()),
    "bfloat16": ({n: t.bfloat16() for n, t in tensors().items()}, None, set()),
    "another head": (tensors(_3_weight=torch.ones(7, 12), _3_bias=torch.ones(7)), None, {"3.weight", "3.bias"}),
    "no head": (tensors(_3_weight=None, _3_bias=None), None, {"3.weight", "3.bias"}),
    "missing": (
        tensors(_1_bias=None),
        "x.safetensors: 1.bias: no such tensor: expected [12], as the model has it",
        set(),
    ),
    "another shape": (
        tensors(_1_weight=torch.ones(12, 63)),
        "x.safetensors: 1.weight: shape [12, 63]: expected [12, 64], as the model has it",
        set(),
    ),
    "a head of other inputs": (
        tensors(_3_weight=torch.ones(10, 13)),
        "x.safetensors: 3.weight: shape [10, 13]: expected [10, 12], as the model has it",
        set(),
    ),
    "nothing of it": (
        {"a": torch.ones(3)},
        "x.safetensors: no tensor of the model: expected 1.weight, 1.bias, 3.weight, 3.bias, ...",
        set(),
    ),
    "NaN": (
        tensors(_1_bias=torch.full((12,), torch.nan)),
        "x.safetensors: 1.bias: found NaN or infinity: expected finite numbers",
        set(),
    ),
}


@pytest.mark.parametrize("name", STARTS)
def test_a_run_starts_from_a_file_of_tensors_that_fit(tmp_path: Path, name: str) -> None:
    given, line, kept = STARTS[name]
    save_file(given, tmp_path / "x.safetensors")
    before = tree(tmp_path)
    outcome = invoke(tmp_path, *TRAIN_TINY, "--rounds", "1", "--start", "x.safetensors")
    if line is not None:
        refused_with(outcome, line)
        assert tree(tmp_path) == before
        return
    assert outcome.code == 0, outcome.err
    found, plain = initial(tmp_path / "run"), build("tiny_model:build", (1, 8, 8), 10).state_dict()
    for tensor in SHAPES:
        expected = plain[tensor] if tensor in kept else given[tensor].float()
        assert (found[tensor] == expected.numpy()).all(), tensor


@pytest.mark.parametrize(
    ("start", "line"),
    [
        ("missing", "missing: expected a run folder or a .safetensors file (No such file or directory: ..."),
        ("text", "text: expected a run folder or a .safetensors file (Error while deserializing header: ..."),
        ("empty", "empty: no config.json: expected the folder of a run"),
        ("wide", "wide: 1.weight: shape [13, 64]: expected [12, 64], as the model has it"),
    ],
)
def test_a_start_that_is_none_is_one_line(tmp_path: Path, start: str, line: str) -> None:
    (tmp_path / "text").write_text("hello")
    (tmp_path / "empty").mkdir()
    assert invoke(tmp_path, *TRAIN_TINY, "--model", "tiny_model:wide", "--rounds", "1", "--out", "wide").code == 0
    before = tree(tmp_path)
    refused_with(invoke(tmp_path, *TRAIN_TINY, "--start", start), line)
    assert tree(tmp_path) == before


def test_buffers_come_with_the_file(tmp_path: Path) -> None:
    """A frozen backbone has statistics that are no parameters."""
    layers = "nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, classes)"
    text = f"from torch import nn\n\ndef build(shape, classes):\n    return nn.Sequential({layers}).eval()\n"
    (tmp_path / "normed_model.py").write_text(text)
    state = {
        "1.weight": torch.ones(64),
        "1.bias": torch.zeros(64),
        "1.running_mean": torch.full((64,), 0.25),
        "1.running_var": torch.full((64,), 4.0),
        "2.weight": torch.randn((10, 64), generator=torch.Generator().manual_seed(0)),
        "2.bias": torch.zeros(10),
    }
    save_file(state, tmp_path / "x.safetensors")
    options = ("--model", "normed_model:build", "--start", "x.safetensors", "--trainable", "head")
    assert invoke(tmp_path, *TRAIN_TINY, *options, "--rounds", "1").code == 0
    x, y = examples(bf.load("digits")[1])
    outputs = ((x.flatten(1) - 0.25) / math.sqrt(4 + 1e-5)) @ state["2.weight"].T
    assert metrics(tmp_path / "run")[0]["loss"] == pytest.approx(float(F.cross_entropy(outputs, y)), rel=1e-4)
