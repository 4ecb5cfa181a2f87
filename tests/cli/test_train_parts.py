"""``baffle train`` on a part of a model: pruned, shrunk, or fine-tuned."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.numpy import load_file
from safetensors.torch import save_file

import baffle as bf
from baffle.models import build
from cli_helpers import INT8, TRAIN_TINY, examples, last_json, metrics
from helpers import invoke

pytestmark = pytest.mark.usefixtures("tiny_model", "exports")


@pytest.mark.parametrize("by", ["magnitude", "inputs"])
def test_pruned_weights_stay_zero_and_the_folder_says_which(tmp_path: Path, by: str) -> None:
    invoke(tmp_path, *TRAIN_TINY, "--prune", "0.8", "--prune-by", by)
    journal, final = bf.Journal.open(tmp_path / "run"), load_file(tmp_path / "run/model.safetensors")
    zeros = 0
    for spec in journal.config.table:
        if spec.mask is not None:
            assert (final[spec.name].reshape(-1)[~spec.mask] == 0).all()
            assert (final[spec.name].reshape(-1)[spec.mask] != 0).mean() > 0.9
            zeros += int((~spec.mask).sum())
    assert zeros == math.floor(0.8 * (64 * 12 + 12 * 10))


def test_shrinking_makes_a_smaller_model(tmp_path: Path) -> None:
    pytest.importorskip("torch_pruning")
    summary = last_json(invoke(tmp_path, *TRAIN_TINY, "--prune", "0.5", "--prune-by", "channels"))
    assert summary["parameters"] == 64 * 6 + 6 + 6 * 10 + 10
    shapes = {name: list(array.shape) for name, array in load_file(tmp_path / "run/model.safetensors").items()}
    assert shapes == {"1.weight": [6, 64], "1.bias": [6], "3.weight": [10, 6], "3.bias": [10]}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A perceptron after 60 plain steps: without its head, and with rows stretched at random."""
    folder = tmp_path_factory.mktemp("pretrained")
    train, test = bf.load("digits")
    (x, y), random = examples(train), torch.Generator().manual_seed(0)
    model = build("mlp", (1, 8, 8), 10)
    optimizer = torch.optim.Adam(model.parameters(), 0.005)
    for _ in range(60):
        batch = torch.randint(len(x), (64,), generator=random)
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()  # type: ignore[no-untyped-call]  # torch's own
        optimizer.step()
    x, y = examples(test)
    with torch.no_grad():
        assert float((model(x).argmax(1) == y).float().mean()) > 0.9
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    save_file({name: t for name, t in state.items() if not name.startswith("7.")}, folder / "backbone.safetensors")
    other = torch.Generator().manual_seed(1)
    stretched = {
        name: t * torch.exp(torch.randn((len(t), 1), generator=other)) if t.ndim == 2 else t
        for name, t in state.items()
    }
    save_file(stretched, folder / "stretched.safetensors")
    return folder


FINE_TUNING: dict[str, tuple[tuple[str, ...], float, float]] = {
    "head": (("--start", "backbone.safetensors", "--trainable", "head", "--seed", "3", *INT8), 0.25, 0.85),
    "scales": (("--start", "stretched.safetensors", "--trainable", "scales"), 0.7, 0.82),
    "int8 scales": (("--start", "stretched.safetensors", "--trainable", "scales", *INT8), 0.7, 0.82),
}


@pytest.mark.parametrize("name", FINE_TUNING)
def test_fine_tuning_a_part_brings_the_accuracy_back(pretrained: Path, tmp_path: Path, name: str) -> None:
    flags, before, after = FINE_TUNING[name]
    options = (
        *("--model", "mlp", "--clients", "4", "--batch-size", "16", "--threads", "1", "--num-directions", "40"),
        *("--rounds", "60", "--lr", "0.05", "--ema", "0.9", "--evaluate-every", "60"),
    )
    summary = last_json(invoke(pretrained, "train", *options, *flags, "--json", "--out", tmp_path / "run"))
    assert metrics(tmp_path / "run")[0]["accuracy"] < before
    assert summary["accuracy"] > after
    assert summary["parameters"] == (650 if name == "head" else 2 * (200 + 64 + 10))
