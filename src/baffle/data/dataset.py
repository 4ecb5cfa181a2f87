"""A data set: inputs and targets as numpy arrays. Pixels stay bytes until a batch is evaluated, to save memory."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from baffle.core.types import Array
from baffle.data.augment import augment
from baffle.errors import DataError


@dataclass(frozen=True)
class Scaling:
    """How pixel bytes are scaled, channel by channel: (x / 255 - mean) / std.

    Raises:
        DataError: Unless there are as many finite means as standard deviations above 0.

    Examples:
        >>> Scaling(mean=(0.5,), std=(0.25,))(np.array([[[[0, 255]]]], np.uint8)).tolist()
        [[[[-2.0, 2.0]]]]
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        finite = np.isfinite((*self.mean, *self.std)).all()
        if len(self.mean) != len(self.std) or not finite or min(self.std, default=1) <= 0:
            raise DataError(f"{self}: expected as many finite means as standard deviations > 0")

    def __call__(self, pixels: Array) -> npt.NDArray[np.float32]:
        """Scale uint8 pixels [n, channels, height, width] to float32."""
        mean, std = (np.asarray(v, np.float32)[:, None, None] for v in (self.mean, self.std))
        return (pixels.astype(np.float32) / np.float32(255) - mean) / std


@dataclass(frozen=True, eq=False, slots=True)
class Dataset:
    """Examples: inputs and their targets.

    Attributes:
        x: Inputs [examples, ...]. Floating-point ones become float32, integers int64. With a ``scaling`` they are
            uint8 pixels [examples, channels, height, width], which stay bytes until ``inputs`` scales them.
        y: Targets [examples, ...]: labels, or numbers for a regression.
        name: What error messages call the data set.
        scaling: How pixels are scaled; None if inputs are used as they are.
        groups: Which client each example belongs to, for a partition by column: integers or texts [examples].
        augmented: Whether mini-batches are augmented when they are drawn.

    Raises:
        DataError: For NaN, infinity, or lengths that differ.

    Examples:
        >>> Dataset([[0.5], [1.5]], [0, 1]).y
        array([0, 1])
    """

    x: Array
    y: Array
    name: str = "data"
    scaling: Scaling | None = None
    groups: Array | None = None
    augmented: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "x", np.asarray(self.x))
        if self.scaling is None:
            object.__setattr__(self, "x", _clean(f"{self.name}.x", self.x))
        elif self.x.dtype != np.uint8 or self.x.ndim != 4 or self.x.shape[1] != len(self.scaling.mean):
            raise DataError(
                f"{self.name}.x: {self.x.dtype}{list(self.x.shape)}: expected uint8 [examples, "
                f"{len(self.scaling.mean)}, height, width] to scale"
            )
        object.__setattr__(self, "y", _clean(f"{self.name}.y", self.y))
        if self.groups is not None:
            object.__setattr__(self, "groups", np.asarray(self.groups))
            if self.groups.ndim != 1 or self.groups.dtype.kind not in "iubUS":
                raise DataError(
                    f"{self.name}.groups: {self.groups.dtype}, {self.groups.ndim} dimensions: expected one integer or "
                    "text per example"
                )
        for field, values in (("y", self.y), ("groups", self.groups)):
            if values is not None and len(values) != len(self.x):
                raise DataError(
                    f"{self.name}: x has {len(self.x)} examples and {field} has {len(values)}: expected as many"
                )
        if self.augmented and (self.x.ndim != 4 or min(self.x.shape[2:]) < 5):
            raise DataError(
                f"{self.name}.x: examples of shape {self.x.shape[1:]} cannot be augmented: expected images "
                "(channels, height >= 5, width >= 5)"
            )

    def __len__(self) -> int:
        return len(self.x)

    @property
    def is_tokens(self) -> bool:
        """Whether inputs are integer tokens, as of a language model."""
        return self.scaling is None and bool(np.issubdtype(self.x.dtype, np.integer))

    def inputs(self) -> Array:
        """Inputs as the model receives them: float32, or int64 tokens."""
        return self.x if self.scaling is None else self.scaling(self.x)

    def take(self, indices: npt.NDArray[np.integer], name: str | None = None) -> Dataset:
        """Copy the examples at ``indices``."""
        return self._part(indices, name or self.name)

    def view(self, start: int, stop: int, name: str | None = None) -> Dataset:
        """The examples from ``start`` up to, but not including, ``stop``, in the same memory.

        Examples:
            >>> data = Dataset([[0.5], [1.5], [2.5]], [0, 1, 0])
            >>> data.view(1, 3).y, np.shares_memory(data.view(1, 3).x, data.x)
            (array([1, 0]), True)
        """
        return self._part(slice(start, stop), name or self.name)

    def _part(self, which: slice | npt.NDArray[np.integer], name: str) -> Dataset:
        """Some of the examples, without checking them again."""
        part = copy.copy(self)
        groups = None if self.groups is None else self.groups[which]
        for field, value in (("x", self.x[which]), ("y", self.y[which]), ("groups", groups), ("name", name)):
            object.__setattr__(part, field, value)
        return part

    def require_examples(self) -> None:
        """Raise DataError if there are none."""
        if len(self) == 0:
            raise DataError(f"{self.name}: no examples: expected at least one")

    def check_labels(self, classes: int) -> None:
        """Raise DataError, naming the first bad label, unless every label is an integer in [0, classes)."""
        if not np.issubdtype(self.y.dtype, np.integer):
            raise DataError(f"{self.name}.y: dtype {self.y.dtype}: expected integer labels")
        labels = self.y.astype(np.int64)
        bad = np.nonzero((labels < 0) | (labels >= classes))[0]
        if bad.size:
            raise DataError(f"{self.name}.y[{bad[0]}] = {self.y[bad[0]]}: expected a label in 0..{classes - 1}")


def concatenate(parts: Sequence[Dataset]) -> Dataset:
    """Join data sets whose examples have the same shape and type, in order; ``groups`` are dropped."""
    return replace(
        parts[0], x=np.concatenate([p.x for p in parts]), y=np.concatenate([p.y for p in parts]), groups=None
    )


def sample(data: Dataset, batch_size: int | None, rng: np.random.Generator) -> Dataset:
    """Draw a mini-batch without replacement.

    If the data set is augmented, so is the mini-batch: once, so that every pass over it sees the same images.

    Args:
        data: The examples to draw from.
        batch_size: Number of examples. With None, or if there are no more, all examples are taken, in order.
        rng: Draws the examples and their augmentation.
    """
    batch = data
    if batch_size is not None and batch_size < len(data):
        batch = data.take(rng.choice(len(data), size=batch_size, replace=False))
    return replace(batch, x=augment(batch.x, rng)) if batch.augmented else batch


class Indexed(Protocol):
    """A map-style data set. It need not raise IndexError at its end."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> object: ...


def from_torch(examples: Iterable[object] | Indexed, name: str = "data") -> Dataset:
    """Read a ``torch.utils.data.Dataset``, or any other iterable of pairs (input, target), into memory.

    Transforms of the data set are applied once, while it is read.

    Args:
        examples: The pairs; all inputs have one shape, and so have all targets.
        name: What error messages call the data set.

    Raises:
        DataError: For a DataLoader, for examples that are not pairs of numbers, and for shapes that differ.

    Examples:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> from_torch(TensorDataset(torch.zeros(6, 1, 8, 8), torch.arange(6))).x.shape
        (6, 1, 8, 8)
    """
    if hasattr(examples, "collate_fn"):
        raise DataError(f"{name}: a DataLoader gives batches: expected its data set (loader.dataset)")
    if not isinstance(examples, Iterable) and not hasattr(examples, "__getitem__"):
        raise DataError(f"{name}: {type(examples).__name__}: expected a data set, or pairs (input, target)")
    pairs = examples if isinstance(examples, Iterable) else (examples[i] for i in range(len(examples)))
    inputs: list[Array] = []
    targets: list[Array] = []
    for i, pair in enumerate(pairs):
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise DataError(f"{name}[{i}]: {type(pair).__name__}: expected a pair (input, target)")
        for values, value in ((inputs, pair[0]), (targets, pair[1])):
            try:
                values.append(np.asarray(value))
            except (RuntimeError, TypeError, ValueError) as error:  # ragged, on a GPU, part of a graph, ...
                raise DataError(f"{name}[{i}]: {type(value).__name__}: expected numbers ({error})") from error
            if values[-1].shape != values[0].shape:
                raise DataError(f"{name}[{i}]: shape {values[-1].shape}, the first has {values[0].shape}: expected one")
    if not inputs:
        raise DataError(f"{name}: no examples: expected at least one")
    return Dataset(np.stack(inputs), np.stack(targets), name)


def _clean(field: str, values: object) -> Array:
    array = np.asarray(values)
    if array.ndim == 0:
        raise DataError(f"{field}: a single number: expected an array with one entry per example")
    if np.issubdtype(array.dtype, np.floating):
        with np.errstate(over="ignore"):
            array = array.astype(np.float32, copy=False)
        finite = np.isfinite(array)
        if not finite.all():
            where = tuple(int(i) for i in np.argwhere(~finite)[0])
            raise DataError(f"{field}{list(where)} = {array[where]}: expected finite numbers")
        return array
    if np.issubdtype(array.dtype, np.integer) or array.dtype == np.bool_:
        if array.size and int(array.max()) >= 2**63:
            where = tuple(int(i) for i in np.unravel_index(array.argmax(), array.shape))
            raise DataError(f"{field}{list(where)} = {array.max()}: expected an integer below 2**63")
        return array.astype(np.int64, copy=False)
    raise DataError(f"{field}: dtype {array.dtype}: expected numbers")
