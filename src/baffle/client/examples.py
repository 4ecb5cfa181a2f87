"""A client's own examples, from an .npz file."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np

from baffle.core.types import Array
from baffle.data import Dataset, Scaling
from baffle.errors import DataError
from baffle.runtimes import Runtime
from baffle.runtimes.onnx.bundle import Bundle


def load_examples(path: str | Path, bundle: Bundle) -> Dataset:
    """Load a client's examples from an .npz file, and check that they fit a bundle.

    Args:
        path: of a file with the arrays x and y.
        bundle: says how to scale pixel bytes.

    Raises:
        DataError: if the file cannot be read, or its examples do not fit.
    """
    data = load_arrays(path, bundle.scaling)
    bundle.check_data(data)
    return data


def load_arrays(path: str | Path, scaling: Scaling | None = None) -> Dataset:
    """Load the arrays x and y of an .npz file.

    Args:
        path: of the file.
        scaling: for pixel bytes.

    Raises:
        DataError: if the file cannot be read, lacks an array, or is empty.

    Examples:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "client.npz"
        >>> np.savez(path, x=np.zeros((5, 64), np.float32), y=np.arange(5))
        >>> len(load_arrays(path))
        5
    """
    try:
        names, x, y = _arrays(path)
    except (OSError, ValueError, EOFError, MemoryError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path}: expected an .npz file with the arrays x and y ({error})") from error
    if x is None or y is None:
        raise DataError(f"{path}: arrays {', '.join(names) or 'none'}: expected an .npz file with the arrays x and y")
    data = Dataset(x, y, Path(path).name, scaling if x.dtype == np.uint8 else None)
    if len(data) == 0:
        raise DataError(f"{path}: no examples: expected at least one")
    return data


def _arrays(path: str | Path) -> tuple[list[str], Array | None, Array | None]:
    """The names of a file's arrays, and x and y if both are there."""
    file = np.load(path, allow_pickle=False)
    if isinstance(file, np.ndarray):  # an .npy file
        return [], None, None
    with file:
        names = sorted(file.files)
        if not {"x", "y"} <= set(names):
            return names, None, None
        return names, np.asarray(file["x"]), np.asarray(file["y"])


def check_labels(runtime: Runtime, bundle: Bundle, data: Dataset) -> None:
    """Raise DataError now, not in the round that draws it, for a label that the model has no output for."""
    bundle.check_data(data)
    if data.y.ndim == 1 and data.y.dtype.kind == "i":
        for i in (data.y.argmin(), data.y.argmax()):
            runtime.evaluate(bundle.initial, data.take(np.array([i]), f"{data.name}: example {i}"))
