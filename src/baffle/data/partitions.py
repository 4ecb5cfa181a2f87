"""Splits examples among clients, and holds some out for validation.

Dirichlet by label: Hsu, Qi, Brown, arXiv 1909.06335. Shards of sorted labels: McMahan et al., arXiv 1602.05629.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from baffle.core.checks import require_count, require_positive
from baffle.core.philox import Purpose, generator
from baffle.data.dataset import Dataset
from baffle.errors import DataError, PlanError

Indices = npt.NDArray[np.int64]


def partition(
    train: Dataset,
    clients: int | None = None,
    *,
    alpha: float | None = None,
    shards: int | None = None,
    column: bool = False,
    seed: int = 0,
) -> tuple[Dataset, ...]:
    """Split examples among clients: evenly at random (IID), or in one of three non-IID ways.

    The examples are copied once, ordered by client. Each client's data set is a view of the copy, so that memory
    hardly depends on the number of clients.

    Args:
        train: The examples to split.
        clients: Number of clients; it may be omitted with ``column``.
        alpha: Split by label in Dirichlet(alpha) proportions; a smaller alpha makes clients more different. Every
            client gets at least one example: if the draw leaves one without, it takes one from the largest.
        shards: Sort by label, cut into equal shards, and deal each client that many of them at random.
        column: Split by the data set's own ``groups``, in ascending order.
        seed: Seed of the split.

    Returns:
        One data set per client.

    Raises:
        DataError: If there are fewer examples than clients (or shards), or no labels or groups to split by.
        PlanError: If more than one way to split is selected.
        OptionError: If an option is out of range.

    Examples:
        >>> from baffle.data.sources import load
        >>> train, _ = load("digits")
        >>> [len(part) for part in partition(train, clients=3)]
        [480, 479, 479]
        >>> [len(np.unique(part.y)) for part in partition(train, clients=5, shards=2)]
        [3, 4, 4, 4, 4]
    """
    chosen = [n for n, v in (("alpha", alpha), ("shards", shards), ("column", column or None)) if v is not None]
    if len(chosen) > 1:
        raise PlanError(f"{chosen[0]} and {chosen[1]}: expected one way to split the examples")
    if column:
        parts = _column(train, clients)
    else:
        require_count("clients", clients)
        assert clients is not None
        if clients > len(train):
            raise DataError(f"clients = {clients}: expected at most one a training example, {len(train)}")
        rng = generator((seed, 0), Purpose.PARTITION)
        if alpha is not None:
            require_positive("alpha", alpha)
            parts = _dirichlet(_labels(train), clients, alpha, rng)
        elif shards is not None:
            require_count("shards", shards)
            parts = _shards(_labels(train), clients, shards, rng)
        else:
            parts = [np.sort(p) for p in np.array_split(rng.permutation(len(train)), clients)]
    ordered = train.take(np.concatenate(parts))
    bounds = itertools.pairwise(itertools.accumulate(map(len, parts), initial=0))
    return tuple(ordered.view(start, stop, f"client {i}") for i, (start, stop) in enumerate(bounds))


def hold_out(train: Dataset, per_class: int, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Hold out random examples of each class, for validation.

    Args:
        train: The examples, with integer labels.
        per_class: How many examples of each class to hold out.
        seed: Seed of the choice.

    Returns:
        (the remaining examples, the held-out ones, which are never augmented).

    Raises:
        DataError: If a class has no more than ``per_class`` examples.

    Examples:
        >>> from baffle.data.sources import load
        >>> rest, held = hold_out(load("digits")[0], per_class=20)
        >>> len(rest), np.bincount(held.y).tolist()
        (1238, [20, 20, 20, 20, 20, 20, 20, 20, 20, 20])
    """
    require_count("holdout", per_class)
    labels = _labels(train)
    rng = generator((seed, 0), Purpose.PARTITION, client=1)
    held = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        where = np.nonzero(labels == label)[0]
        if len(where) <= per_class:
            raise DataError(f"holdout = {per_class}: class {label} has {len(where)} examples: expected more")
        held[rng.choice(where, per_class, replace=False)] = True
    return train.take(np.nonzero(~held)[0]), replace(train.take(np.nonzero(held)[0], "holdout"), augmented=False)


def _labels(train: Dataset) -> npt.NDArray[np.generic]:
    if train.y.ndim != 1 or not np.issubdtype(train.y.dtype, np.integer):
        raise DataError(f"y: dtype {train.y.dtype}, {train.y.ndim} dimensions: expected one integer label per example")
    return train.y


def _dirichlet(labels: npt.NDArray[np.generic], clients: int, alpha: float, rng: np.random.Generator) -> list[Indices]:
    owners = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        where = rng.permutation(np.nonzero(labels == label)[0])
        cuts = np.round(np.cumsum(rng.dirichlet(np.full(clients, alpha)))[:-1] * len(where)).astype(np.int64)
        owners[where] = np.searchsorted(cuts, np.arange(len(where)), side="right")
    sizes = np.bincount(owners, minlength=clients)
    order, first = np.argsort(owners, kind="stable"), np.cumsum(sizes) - sizes
    for client in np.nonzero(sizes == 0)[0]:
        largest = sizes.argmax()
        owners[order[first[largest]]] = client
        first[largest] += 1
        sizes[largest] -= 1
        sizes[client] = 1
    return _by_owner(owners, clients)


def _shards(labels: npt.NDArray[np.generic], clients: int, shards: int, rng: np.random.Generator) -> list[Indices]:
    if clients * shards > len(labels):
        raise DataError(f"{clients} clients x {shards} shards: expected at most one a training example, {len(labels)}")
    cut = np.array_split(np.argsort(labels, kind="stable"), clients * shards)
    order = rng.permutation(len(cut)).reshape(clients, shards)
    return [np.sort(np.concatenate([cut[s] for s in mine])) for mine in order]


def _column(train: Dataset, clients: int | None) -> list[Indices]:
    if train.groups is None:
        raise DataError(f"{train.name}: no groups: expected a column that says whose each example is (groups_train)")
    names, owners = np.unique(train.groups, return_inverse=True)
    if clients is not None and clients != len(names):
        raise DataError(f"clients = {clients}: the column names {len(names)}: expected that, or nothing")
    return _by_owner(owners, len(names))


def _by_owner(owners: Indices, clients: int) -> list[Indices]:
    """The indices of each client's examples, in ascending order."""
    ends = np.cumsum(np.bincount(owners, minlength=clients))
    return np.split(np.argsort(owners, kind="stable"), ends[:-1])
