"""Loads data sets by name: scikit-learn's digits, official image files, or arrays of your own."""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np

from baffle.data.dataset import Dataset
from baffle.data.official import OFFICIAL, read
from baffle.errors import DataError, MissingExtraError, OptionError, require_choice

DATASETS = ("digits", "arrays", *OFFICIAL)


def load(name: str = "digits", path: str | Path | None = None, *, augmented: bool = False) -> tuple[Dataset, Dataset]:
    """Load a data set by name. Nothing is downloaded.

    Args:
        name: The data set:

            * ``digits``: the 1,797 grey images of 8 x 8 pixels in scikit-learn, standardised, float32[n, 1, 8, 8];
              every fifth example (from index 4) is in the test split: 1,438 and 359 examples.
            * ``mnist``, ``fashion-mnist``, ``cifar10``, ``cifar100``: the official files; uint8 pixels with their
              scaling.
            * ``arrays``: your own, from an ``.npz`` file with x_train, y_train, x_test, y_test and, for a partition
              by column, groups_train.
        path: The folder of the official files (by default that of the environment variable BAFFLE_DATA), or the
            ``.npz`` file.
        augmented: Whether training mini-batches are augmented (reflect-pad by 4, crop, flip).

    Returns:
        (train, test).

    Raises:
        DataError: If files are missing, damaged, or not as expected.
        OptionError: For an unknown name.
        MissingExtraError: For ``digits`` without scikit-learn.

    Examples:
        >>> train, test = load("digits")
        >>> train.x.shape, len(test)
        ((1438, 1, 8, 8), 359)
    """
    require_choice("dataset", name, DATASETS)
    if name == "digits":
        if path is not None:
            raise OptionError("data", str(path), "none with dataset digits; for your own: --dataset arrays")
        train, test = _digits()
    elif name == "arrays":
        if path is None:
            raise DataError("dataset 'arrays' needs a path: an .npz file with x_train, y_train, x_test, y_test")
        train, test = _arrays(Path(path))
    else:
        train, test = read(name, path)
    return replace(train, augmented=augmented), test


def _digits() -> tuple[Dataset, Dataset]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtraError("dataset 'digits' needs scikit-learn: pip install 'baffle[cli]'") from error
    raw = load_digits()
    x = ((raw.images / 16.0 - 0.305) / 0.376).astype(np.float32)[:, None]
    test = np.arange(len(x)) % 5 == 4
    return Dataset(x[~test], raw.target[~test], "train"), Dataset(x[test], raw.target[test], "test")


def _arrays(path: Path) -> tuple[Dataset, Dataset]:
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                raise zipfile.BadZipFile
        with np.load(path, allow_pickle=False) as file:
            missing = [k for k in ("x_train", "y_train", "x_test", "y_test") if k not in file]
            if missing:
                raise DataError(f"{path}: no array {missing[0]!r}: expected x_train, y_train, x_test, y_test")
            groups = file.get("groups_train")
            train = Dataset(file["x_train"], file["y_train"], "train", groups=groups)
            test = Dataset(file["x_test"], file["y_test"], "test")
    except DataError as error:
        raise DataError(f"{path}: {error}" if not str(error).startswith(str(path)) else str(error)) from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        problem = (error.strerror or "").lower() if isinstance(error, OSError) else "not one"
        reason = f"{problem.replace('file or directory', 'file')}: expected an .npz file of numpy arrays"
        raise DataError(f"{path}: {reason}") from error
    if len(train) == 0 or len(test) == 0:
        raise DataError(f"{path}: {len(train)} training and {len(test)} test examples: expected at least one each")
    if train.x.shape[1:] != test.x.shape[1:]:
        raise DataError(f"{path}: x_train has examples of shape {train.x.shape[1:]}, x_test {test.x.shape[1:]}")
    return train, test
