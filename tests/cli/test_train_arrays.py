"""``baffle train`` on arrays of the user's own, and one line for everything that can be wrong with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from cli_helpers import SMALL, cut, last_json, refused
from helpers import flip, invoke, tree


def arrays() -> dict[str, npt.NDArray[np.generic]]:
    """Three classes that a linear cut tells apart, 60 + 15 examples."""
    labels = np.arange(75) % 3
    x = (np.random.default_rng(0).normal(size=(75, 5)) * 0.3 + np.eye(3, 5)[labels]).astype(np.float32)
    return {"x_train": x[:60], "y_train": labels[:60], "x_test": x[60:], "y_test": labels[60:]}


def save_arrays(path: Path, **changes: object) -> Path:
    """An .npz file of ``arrays`` with changes; None leaves an array out."""
    kept = {name: np.asarray(value) for name, value in (arrays() | changes).items() if value is not None}
    with path.open("wb") as file:
        np.savez(file, **kept)  # type: ignore[arg-type]  # numpy's stub takes a keyword for allow_pickle
    return path


def changed(name: str, where: int | tuple[int, ...], value: float) -> npt.NDArray[np.generic]:
    """One of ``arrays`` with one entry set."""
    array = arrays()[name].copy()
    array[where] = value
    return array


TRAIN_ARRAYS = ("train", "--dataset", "arrays", "--data", "mine.npz", *SMALL)


@pytest.mark.parametrize("partition", [("--partition", "iid"), ("--partition", "dirichlet", "--alpha", "0.1")])
def test_arrays_train_resume_and_evaluate(tmp_path: Path, partition: tuple[str, ...]) -> None:
    save_arrays(tmp_path / "mine.npz")
    summary = last_json(invoke(tmp_path, *TRAIN_ARRAYS, *partition, "--out", "run", "--json"))
    assert summary["parameters"] == 5 * 200 + 200 + 200 * 64 + 64 + 64 * 3 + 3
    sizes = json.loads((tmp_path / "run/config.json").read_text())["clients"]
    assert sum(sizes) == 60
    assert min(sizes) >= 1
    assert (sizes == [20, 20, 20]) == (partition[1] == "iid")
    assert last_json(invoke(tmp_path, "evaluate", "run", "--json"))["accuracy"] == summary["accuracy"]
    cut(tmp_path / "run", 3)
    assert last_json(invoke(tmp_path, "resume", "run", "--json"))["weights_sha256"] == summary["weights_sha256"]


def test_arrays_are_learned(tmp_path: Path) -> None:
    save_arrays(tmp_path / "mine.npz")
    options = ("--rounds", "60", "--num-directions", "20", "--lr", "0.03", "--ema", "0.9")
    summary = last_json(invoke(tmp_path, *TRAIN_ARRAYS, *options, "--out", "run", "--json"))
    assert isinstance(summary["accuracy"], float)
    assert summary["accuracy"] >= 0.8


def test_a_run_whose_data_is_gone_is_one_line(tmp_path: Path) -> None:
    save_arrays(tmp_path / "mine.npz")
    assert invoke(tmp_path, *TRAIN_ARRAYS, "--out", "run").code == 0
    (tmp_path / "mine.npz").unlink()
    for command in ("resume", "evaluate"):
        refused(invoke(tmp_path, command, "run"), "mine.npz", "no such file")
    assert invoke(tmp_path, "replay", "run").code == 0


BAD_ARRAYS: dict[str, tuple[dict[str, object], tuple[str, ...]]] = {
    "NaN": ({"x_train": changed("x_train", (7, 2), np.nan)}, ("train.x[7, 2] = nan", "finite")),
    "infinity in test": ({"x_test": changed("x_test", (0, 4), np.inf)}, ("test.x[0, 4] = inf",)),
    "label out of range": ({"y_test": changed("y_test", 3, 7)}, ("test.y[3] = 7", "0..2")),
    "negative label": ({"y_train": changed("y_train", 5, -1)}, ("train.y[5] = -1",)),
    "enormous label": ({"y_train": changed("y_train", 5, 10**11)}, ("train.y[5] = 100000000000",)),
    "labels that are no integers": ({"y_train": np.linspace(0, 1, 60)}, ("train.y", "float")),
    "two labels an example": ({"y_train": np.zeros((60, 2), int)}, ("train.y",)),
    "two test labels an example": ({"y_test": np.zeros((15, 2), int)}, ("test.y",)),
    "unequal lengths": ({"y_train": np.zeros(59, int)}, ("train", "60", "59")),
    "missing key": ({"x_test": None}, ("x_test",)),
    "no examples": ({"x_train": np.zeros((0, 5)), "y_train": np.zeros(0, int)}, ("0 training",)),
    "other shape in test": ({"x_test": np.zeros((15, 4))}, ("(5,)", "(4,)")),
    "text": ({"x_train": np.array(["a"] * 60)}, ("train.x", "U1")),
    "numbers without shape": ({"x_train": np.zeros(60, np.float32), "x_test": np.zeros(15, np.float32)}, ()),
}


@pytest.mark.parametrize("name", BAD_ARRAYS)
def test_bad_arrays_are_one_line(tmp_path: Path, name: str) -> None:
    changes, words = BAD_ARRAYS[name]
    save_arrays(tmp_path / "mine.npz", **changes)
    before = tree(tmp_path)
    refused(invoke(tmp_path, *TRAIN_ARRAYS, "--out", "run"), *words)
    assert tree(tmp_path) == before


def test_integer_images_are_trained_on_or_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = {f"x_{s}": rng.integers(0, 255, (n, 5), dtype=np.uint8) for s, n in (("train", 60), ("test", 15))}
    save_arrays(tmp_path / "mine.npz", **images)
    before = tree(tmp_path)
    outcome = invoke(tmp_path, *TRAIN_ARRAYS, "--out", "run", "--json")
    if outcome.code != 0:
        refused(outcome, "mlp", "integer")
        assert tree(tmp_path) == before


def test_a_model_that_does_not_fit_the_data_is_one_line(tmp_path: Path) -> None:
    save_arrays(tmp_path / "mine.npz")
    before = tree(tmp_path)
    refused(invoke(tmp_path, *TRAIN_ARRAYS, "--model", "lenet-small", "--out", "run"), "lenet-small", "(5,)")
    assert tree(tmp_path) == before


def npy(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.zeros(3))


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"hello\n"),
        lambda path: path.write_bytes(save_arrays(path).read_bytes()[:400]),
        lambda path: flip(save_arrays(path), 300),
        npy,
        lambda path: path.mkdir(),
    ],
    ids=["empty", "text", "truncated", "edited", "npy", "folder"],
)
def test_what_is_no_npz_is_one_line(tmp_path: Path, write: Callable[[Path], object]) -> None:
    write(tmp_path / "mine.npz")
    before = tree(tmp_path)
    refused(invoke(tmp_path, *TRAIN_ARRAYS, "--out", "run"), "mine.npz")
    assert tree(tmp_path) == before
