"""Data sets are loaded by name; files that are damaged or incomplete are refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from baffle.data import load, partition
from baffle.errors import BaffleError, DataError, OptionError


def arrays(**changes: object) -> dict[str, npt.NDArray[np.generic]]:
    whole: dict[str, object] = {
        "x_train": np.arange(24, dtype=np.float32).reshape(12, 2),
        "y_train": np.arange(12) % 3,
        "x_test": np.ones((4, 2), np.float32),
        "y_test": np.arange(4) % 3,
    }
    return {name: np.asarray(value) for name, value in (whole | changes).items() if value is not None}


def test_digits_are_split_and_standardised() -> None:
    train, test = load("digits")
    assert (train.x.shape, train.y.shape) == ((1438, 1, 8, 8), (1438,))
    assert (test.x.shape, test.y.shape) == ((359, 1, 8, 8), (359,))
    assert train.x.dtype == test.x.dtype == np.float32
    assert train.y.dtype == test.y.dtype == np.int64
    pixels = np.concatenate([train.x, test.x]).astype(np.float64)
    assert abs(pixels.mean()) < 0.01
    assert abs(pixels.std() - 1) < 0.01
    assert pixels.min() == pytest.approx((0 - 0.305) / 0.376)
    assert pixels.max() == pytest.approx((1 - 0.305) / 0.376)
    assert np.bincount(train.y).min() > 120
    assert np.bincount(test.y).min() > 20


def test_digits_test_split_is_every_fifth_example() -> None:
    from sklearn.datasets import load_digits

    train, test = load("digits")
    target = load_digits().target
    assert test.y.tolist() == target[4::5].tolist()
    assert train.y.tolist() == np.delete(target, np.s_[4::5]).tolist()


def saved(path: Path, **changes: object) -> Path:
    np.savez(path, **arrays(**changes))  # type: ignore[arg-type]  # numpy's stub takes a keyword for allow_pickle
    return path


def test_arrays_come_back_as_saved(tmp_path: Path) -> None:
    train, test = load("arrays", saved(tmp_path / "mine.npz"))
    assert (train.name, len(train), test.name, len(test)) == ("train", 12, "test", 4)
    assert train.x.tolist() == arrays()["x_train"].tolist()
    assert test.y.tolist() == [0, 1, 2, 0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"y_test": None}, ["y_test"]),
        ({"x_train": np.full((12, 2), np.nan)}, ["train.x[0, 0]", "nan"]),
        ({"y_train": np.arange(11)}, ["train", "12", "11"]),
        ({"x_test": np.ones((4, 3))}, ["(2,)", "(3,)"]),
        ({"x_test": np.ones((0, 2)), "y_test": np.ones(0, np.int64)}, ["0 test"]),
        ({"x_train": np.array([{}] * 12)}, ["npz"]),
        ({"y_train": np.array(["a"] * 12)}, ["train.y", "U1"]),
    ],
)
def test_bad_arrays_are_refused_by_name(tmp_path: Path, changes: dict[str, object], words: list[str]) -> None:
    path = saved(tmp_path / "mine.npz", **changes)
    with pytest.raises(DataError) as error:
        load("arrays", path)
    for word in [str(path), *words]:
        assert word in str(error.value)


def damaged_files(folder: Path) -> dict[str, Path]:
    """Files that are no usable .npz, by what is wrong with them."""
    whole = saved(folder / "whole.npz").read_bytes()
    middle = bytearray(whole)
    middle[len(whole) // 8] ^= 0x55
    contents = {
        "empty": b"",
        "text": b"not numpy at all\n",
        "truncated": whole[: len(whole) // 2],
        "edited": bytes(middle),
        "end cut off": whole[:-1],
    }
    files = {name: folder / f"{name}.npz" for name in contents}
    for name, file in files.items():
        file.write_bytes(contents[name])
    np.save(folder / "single.npy", np.zeros(3))
    (folder / "folder.npz").mkdir()
    return files | {"npy": folder / "single.npy", "folder": folder / "folder.npz", "missing": folder / "none.npz"}


@pytest.mark.parametrize("kind", ["empty", "text", "truncated", "edited", "end cut off", "npy", "folder", "missing"])
def test_files_that_are_no_npz_are_refused_by_name(tmp_path: Path, kind: str) -> None:
    file = damaged_files(tmp_path)[kind]
    with pytest.raises(DataError) as error:
        load("arrays", file)
    assert str(file) in str(error.value)
    assert ("no such file" in str(error.value)) == (kind == "missing")


def test_arrays_bring_the_column_of_clients(tmp_path: Path) -> None:
    owners = np.array(["ann", "bob", "cem"])[np.arange(12) % 3]
    train, test = load("arrays", saved(tmp_path / "mine.npz", groups_train=owners))
    assert [len(part) for part in partition(train, column=True)] == [4, 4, 4]
    assert partition(train, column=True)[1].x.tolist() == arrays()["x_train"][1::3].tolist()
    assert test.groups is None
    with pytest.raises(DataError, match="groups has 11"):
        load("arrays", saved(tmp_path / "short.npz", groups_train=owners[:11]))


def test_arrays_are_augmented_where_they_are_images(tmp_path: Path) -> None:
    images = np.random.default_rng(0).random((12, 1, 6, 6))
    path = saved(tmp_path / "images.npz", x_train=images, x_test=images[:4])
    train, test = load("arrays", path, augmented=True)
    assert (train.augmented, test.augmented) == (True, False)
    with pytest.raises(DataError, match="cannot be augmented"):
        load("arrays", saved(tmp_path / "vectors.npz"), augmented=True)


def test_digits_take_no_path() -> None:
    with pytest.raises(OptionError, match=r"data = 'here'.*--dataset arrays"):
        load("digits", "here")


def test_unknown_dataset_and_missing_path() -> None:
    with pytest.raises(OptionError, match=r"dataset = 'digit': .*did you mean digits"):
        load("digit")
    with pytest.raises(BaffleError, match="needs a path"):
        load("arrays")
