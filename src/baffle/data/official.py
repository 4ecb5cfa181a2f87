"""Readers of MNIST, Fashion-MNIST, CIFAR-10 and CIFAR-100, from the files that their authors publish.

MNIST: LeCun, Cortes, Burges. Fashion-MNIST: Xiao, Rasul, Vollgraf, arXiv 1708.07747. CIFAR: Krizhevsky 2009.
Nothing is downloaded. Files are accepted only with the published checksum; IDX files may be gzipped.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from baffle.data.dataset import Dataset, Scaling
from baffle.errors import DataError, require_choice

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Official:
    """An official data set: its files, where to look for them, and where to get them."""

    train: Mapping[str, str]
    """Files of the training split: name -> SHA-256 of the unpacked contents (SHA-1 where only that is published)."""
    test: Mapping[str, str]
    """Files of the test split."""
    folders: tuple[str, ...]
    """Subfolders that may hold the files."""
    url: str
    """Where the authors publish the files."""
    scaling: Scaling
    labels: int = 0
    """Number of label bytes before each image of a CIFAR file; 0 for IDX files."""


_IDX = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
ENVIRONMENT = "BAFFLE_DATA"
"""The environment variable that names the default folder of the official files."""


def _idx(*sha256: str) -> tuple[dict[str, str], dict[str, str]]:
    names = dict(zip(_IDX, sha256, strict=True))
    return {n: names[n] for n in _IDX[:2]}, {n: names[n] for n in _IDX[2:]}


OFFICIAL: dict[str, Official] = {
    "mnist": Official(
        *_idx(
            "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        ),
        folders=("MNIST/raw", "mnist", "MNIST"),
        url="https://ossci-datasets.s3.amazonaws.com/mnist/",
        scaling=Scaling((0.1307,), (0.3081,)),
    ),
    "fashion-mnist": Official(
        *_idx(
            "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        ),
        folders=("FashionMNIST/raw", "fashion-mnist", "FashionMNIST"),
        url="https://github.com/zalandoresearch/fashion-mnist/tree/master/data/fashion",
        scaling=Scaling((0.2860,), (0.3530,)),
    ),
    "cifar10": Official(
        train={
            "data_batch_1.bin": "aadd24acce27caa71bf4b10992e9e7b2d74c2540",
            "data_batch_2.bin": "c0ba65cce70568cd57b4e03e9ac8d2a5367c1795",
            "data_batch_3.bin": "1dd00a74ab1d17a6e7d73e185b69dbf31242f295",
            "data_batch_4.bin": "aab85764eb3584312d3c7f65fd2fd016e36a258e",
            "data_batch_5.bin": "26e2849e66a845b7f1e4614ae70f4889ae604628",
        },
        test={"test_batch.bin": "67eb016db431130d61cd03c7ad570b013799c88c"},
        folders=("cifar-10-batches-bin", "cifar10", "CIFAR10"),
        url="https://www.cs.toronto.edu/~kriz/cifar.html (CIFAR-10 binary version)",
        scaling=Scaling((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
        labels=1,
    ),
    "cifar100": Official(
        train={"train.bin": "e207cd2e05b73b1393c74c7f5e7bea451d63e08e"},
        test={"test.bin": "8fb6623e830365ff53cf14adec797474f5478006"},
        folders=("cifar-100-binary", "cifar100", "CIFAR100"),
        url="https://www.cs.toronto.edu/~kriz/cifar.html (CIFAR-100 binary version)",
        scaling=Scaling((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
        labels=2,
    ),
}


@dataclass(frozen=True)
class Found:
    """The state of one file of a data set."""

    name: str
    path: Path | None
    """Where it is; None if it is missing."""
    problem: str | None
    """What is wrong with it; None if it is as published."""


def read(name: str, path: str | Path | None = None) -> tuple[Dataset, Dataset]:
    """Read an official data set from its files.

    Args:
        name: A name in ``OFFICIAL``.
        path: A folder that holds the files, or a subfolder with them; by default that of BAFFLE_DATA.

    Returns:
        (train, test).

    Raises:
        DataError: If files are missing, with the address to get them from, or one is not as published.
    """
    folder = locate(name, path)
    official = OFFICIAL[name]
    return tuple(  # type: ignore[return-value]  # a pair, as there are two splits
        _split(official, folder, files, split) for split, files in (("train", official.train), ("test", official.test))
    )


def locate(name: str, path: str | Path | None = None) -> Path:
    """The folder that holds the files of a data set; arguments and errors as for ``read``."""
    require_choice("dataset", name, OFFICIAL)
    official = OFFICIAL[name]
    first = next(iter(official.train))
    root = path or os.environ.get(ENVIRONMENT) or None
    if root is not None:
        # the data set's own folders first: files of MNIST and Fashion-MNIST have the same names
        for folder in (*(Path(root, below) for below in official.folders), Path(root)):
            if _file(folder, first) is not None:
                return folder
    where = "no folder was named" if root is None else f"there is none in {root} nor in its {official.folders[0]}"
    raise DataError(
        f"dataset {name!r} needs {first}: {where}; get the files from {official.url} and name their folder with "
        f"--data or {ENVIRONMENT}"
    )


def check(name: str, path: str | Path | None = None) -> list[Found]:
    """Check every file of a data set against its published checksum; raises DataError as ``read`` without files."""
    folder = locate(name, path)
    official = OFFICIAL[name]
    files = []
    for file, digest in (official.train | official.test).items():  # type: ignore[operator]  # both are dicts
        try:
            _contents(folder, file, digest)
            problem = None
        except DataError as error:
            problem = str(error)
        files.append(Found(file, _file(folder, file), problem))
    return files


def _split(official: Official, folder: Path, files: Mapping[str, str], split: str) -> Dataset:
    contents = [_contents(folder, name, digest) for name, digest in files.items()]
    if not official.labels:
        images, labels = (_parse_idx(data) for data in contents)
        return Dataset(images[:, None], labels.astype(np.int64), split, official.scaling)
    records = np.concatenate([np.frombuffer(d, np.uint8).reshape(-1, official.labels + 3072) for d in contents])
    images, labels = records[:, official.labels :].reshape(-1, 3, 32, 32), records[:, official.labels - 1]
    return Dataset(images, labels.astype(np.int64), split, official.scaling)


def _parse_idx(data: bytes) -> Pixels:
    """Parse an IDX file: two zero bytes, the type (8: bytes), the number of dimensions, their sizes, the values."""
    shape = np.frombuffer(data, ">i4", data[3], 4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)


def _file(folder: Path, name: str) -> Path | None:
    try:
        return next((f for f in (folder / name, folder / f"{name}.gz") if f.is_file()), None)
    except OSError:  # for example a name that is too long, or a folder without permission to read
        return None


def _contents(folder: Path, name: str, digest: str) -> bytes:
    """The unpacked contents of a file; DataError unless they have the published checksum."""
    file = _file(folder, name)
    if file is None:
        raise DataError(f"{folder / name}: no such file, gzipped or not")
    try:
        data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file}: cannot be read: {error}") from error
    algorithm = "sha1" if len(digest) == 40 else "sha256"
    actual = hashlib.new(algorithm, data, usedforsecurity=False).hexdigest()
    if actual != digest:
        raise DataError(f"{file}: {algorithm} of its contents is {actual}: expected {digest}")
    return data
