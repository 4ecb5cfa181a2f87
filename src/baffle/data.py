"""Data sets as numpy arrays, and ways to split one among clients.

Dirichlet partition by label: Hsu, Qi, Brown, arXiv 1909.06335.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from baffle.checks import require_count, require_positive
from baffle.errors import DataError, MissingExtraError, require_choice
from baffle.philox import Purpose, generator

DATASETS = ("digits", "arrays")


@dataclass(frozen=True, eq=False)
class Dataset:
    """Examples ``x`` [examples, ...] and targets ``y`` [examples, ...].

    Floating inputs become float32, integer ones int64. Raises DataError on NaN, infinity or lengths that
    differ.

    Examples:
        >>> Dataset([[0.5], [1.5]], [0, 1]).y
        array([0, 1])
    """

    x: npt.NDArray[np.generic]
    y: npt.NDArray[np.generic]
    name: str = "data"

    def __post_init__(self) -> None:
        object.__setattr__(self, "x", _clean(f"{self.name}.x", self.x))
        object.__setattr__(self, "y", _clean(f"{self.name}.y", self.y))
        if len(self.x) != len(self.y):
            raise DataError(f"{self.name}: x has {len(self.x)} examples and y has {len(self.y)}: expected as many")

    def __len__(self) -> int:
        return len(self.x)

    def take(self, indices: npt.NDArray[np.integer], name: str | None = None) -> Dataset:
        """The examples at ``indices``."""
        return Dataset(self.x[indices], self.y[indices], name or self.name)

    def check_labels(self, classes: int) -> None:
        """Raise DataError unless every label is an integer in [0, classes)."""
        if not np.issubdtype(self.y.dtype, np.integer):
            raise DataError(f"{self.name}.y: dtype {self.y.dtype}: expected integer labels")
        labels = self.y.astype(np.int64)
        bad = np.nonzero((labels < 0) | (labels >= classes))[0]
        if bad.size:
            raise DataError(f"{self.name}.y[{bad[0]}] = {self.y[bad[0]]}: expected a label in 0..{classes - 1}")


def concatenate(parts: Sequence[Dataset]) -> Dataset:
    """All examples of several data sets, in order."""
    return Dataset(np.concatenate([p.x for p in parts]), np.concatenate([p.y for p in parts]))


def load(name: str = "digits", path: str | Path | None = None) -> tuple[Dataset, Dataset]:
    """Load a data set as (train, test).

    ``digits``: 1,797 grey images of 8 x 8 pixels that scikit-learn carries, standardised, float32[n, 1, 8, 8];
    every fifth example (from index 4) is the test split: 1,438 and 359.
    ``arrays``: the user's own, from an ``.npz`` file at ``path`` with x_train, y_train, x_test, y_test.

    Examples:
        >>> train, test = load("digits")
        >>> train.x.shape, len(test)
        ((1438, 1, 8, 8), 359)
    """
    require_choice("dataset", name, DATASETS)
    if name == "digits":
        return _digits()
    if path is None:
        raise DataError("dataset 'arrays' needs a path: an .npz file with x_train, y_train, x_test, y_test")
    return _arrays(Path(path))


def partition(train: Dataset, clients: int, *, alpha: float | None = None, seed: int = 0) -> tuple[Dataset, ...]:
    """Split examples among clients: evenly at random, or by label with Dirichlet(alpha) proportions.

    Small ``alpha`` makes clients' labels differ more. Every client gets at least one example: where the draw
    leaves one empty, it takes one from the largest.

    Examples:
        >>> train, _ = load("digits")
        >>> [len(part) for part in partition(train, clients=3)]
        [480, 479, 479]
    """
    require_count("clients", clients)
    if clients > len(train):
        raise DataError(f"clients = {clients}: expected at most one a training example, {len(train)}")
    rng = generator((seed, 0), Purpose.PARTITION)
    if alpha is None:
        parts = [np.sort(p) for p in np.array_split(rng.permutation(len(train)), clients)]
    else:
        require_positive("alpha", alpha)
        parts = _dirichlet(train.y, clients, alpha, rng)
    return tuple(train.take(p, f"client {i}") for i, p in enumerate(parts))


def _dirichlet(
    labels: npt.NDArray[np.generic], clients: int, alpha: float, rng: np.random.Generator
) -> list[npt.NDArray[np.int64]]:
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"y: dtype {labels.dtype}, {labels.ndim} dimensions: expected one integer label an example")
    owners = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        where = rng.permutation(np.nonzero(labels == label)[0])
        cuts = np.round(np.cumsum(rng.dirichlet(np.full(clients, alpha)))[:-1] * len(where)).astype(np.int64)
        owners[where] = np.searchsorted(cuts, np.arange(len(where)), side="right")
    for client in range(clients):
        if not (owners == client).any():
            largest = np.bincount(owners, minlength=clients).argmax()
            owners[np.nonzero(owners == largest)[0][0]] = client
    return [np.nonzero(owners == client)[0] for client in range(clients)]


def sample(data: Dataset, batch_size: int | None, rng: np.random.Generator) -> Dataset:
    """A mini-batch without replacement; all examples, in order, if there are no more than ``batch_size``."""
    if batch_size is None or batch_size >= len(data):
        return data
    return data.take(rng.choice(len(data), size=batch_size, replace=False))


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
            parts = [Dataset(file[f"x_{split}"], file[f"y_{split}"], split) for split in ("train", "test")]
    except DataError as error:
        raise DataError(f"{path}: {error}" if not str(error).startswith(str(path)) else str(error)) from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        reason = "no such file" if not path.exists() else "not an .npz file of numpy arrays"
        raise DataError(f"{path}: {reason}") from error
    train, test = parts
    if len(train) == 0 or len(test) == 0:
        raise DataError(f"{path}: {len(train)} training and {len(test)} test examples: expected at least one each")
    if train.x.shape[1:] != test.x.shape[1:]:
        raise DataError(f"{path}: x_train has examples of shape {train.x.shape[1:]}, x_test {test.x.shape[1:]}")
    return train, test


def _clean(field: str, values: object) -> npt.NDArray[np.generic]:
    array = np.asarray(values)
    if array.ndim == 0:
        raise DataError(f"{field}: a single number: expected an array with one entry an example")
    if np.issubdtype(array.dtype, np.floating):
        with np.errstate(over="ignore"):
            array = array.astype(np.float32, copy=False)
        bad = np.argwhere(~np.isfinite(array))
        if len(bad):
            where = tuple(int(i) for i in bad[0])
            raise DataError(f"{field}{list(where)} = {array[where]}: expected finite numbers")
        return array
    if np.issubdtype(array.dtype, np.integer) or array.dtype == np.bool_:
        if array.size and int(array.max()) >= 2**63:
            where = tuple(int(i) for i in np.unravel_index(array.argmax(), array.shape))
            raise DataError(f"{field}{list(where)} = {array.max()}: expected an integer below 2**63")
        return array.astype(np.int64, copy=False)
    raise DataError(f"{field}: dtype {array.dtype}: expected numbers")
