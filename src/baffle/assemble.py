"""From options to what training needs: data, clients, model, engine."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from baffle.config import TrainConfig
from baffle.data import Dataset, hold_out, load
from baffle.engines.local import LocalEngine
from baffle.errors import DataError
from baffle.types import Weights

if TYPE_CHECKING:
    from torch import nn

_MOST_CLASSES = 2**20  # a larger label is a mistake, not a reason to build such a model


@dataclass(frozen=True)
class Setup:
    """What a training run is made of."""

    clients: tuple[Dataset, ...]
    validation: Dataset | None
    test: Dataset
    model: nn.Module
    engine: LocalEngine
    initial: Weights


def splits(options: TrainConfig) -> tuple[Dataset, Dataset | None, Dataset]:
    """(train, held out, test) with checked labels."""
    train, test = load(options.dataset, options.data, augmented=options.augment)
    for data in (train, test):
        if not np.issubdtype(data.y.dtype, np.integer) or data.y.ndim != 1:
            raise DataError(f"{data.name}.y: {data.y.dtype}{list(data.y.shape)}: expected one integer label an example")
        if data.x.size == 0:
            raise DataError(f"{data.name}.x: shape {list(data.x.shape)}: expected examples with numbers in them")
    train.check_labels(_MOST_CLASSES)
    test.check_labels(_classes(train))
    if options.holdout is None:
        return train, None, test
    rest, held = hold_out(train, options.holdout, options.seed)
    if options.partition == "column" and train.groups is not None and rest.groups is not None:
        lost = np.setdiff1d(train.groups, rest.groups)
        if len(lost):
            raise DataError(f"holdout = {options.holdout}: it takes all examples of group {lost[0]}: expected fewer")
    return rest, held, test


def assemble(options: TrainConfig) -> Setup:
    """Read the data, split it, build the model and the engine."""
    train, validation, test = splits(options)
    clients = options.split(train)
    if ":" in options.model and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # where a user's own model is likely to be
    # PyTorch is imported here, so that --help and replay do not wait for it
    from torch.nn.functional import cross_entropy

    from baffle.models import build
    from baffle.runtimes.pytorch import TorchRuntime

    model = build(
        options.model,
        train.x.shape[1:],
        _classes(train),
        options.seed,
        activation=options.activation,
        norm=options.norm,
        vocabulary=_vocabulary(train, validation, test),
    )
    runtime = TorchRuntime(model, cross_entropy, options.threads)
    return Setup(clients, validation, test, model, LocalEngine(runtime, clients), runtime.initial_weights())


def _vocabulary(*parts: Dataset | None) -> int | None:
    """The number of tokens, if examples are tokens."""
    known = [data for data in parts if data is not None]
    if not known[0].is_tokens:
        return None
    for data in known:
        if data.x.min() < 0:
            raise DataError(f"{data.name}.x: a token {data.x.min()}: expected integers >= 0")
    return 1 + max(int(data.x.max()) for data in known)


def _classes(train: Dataset) -> int:
    return int(train.y.max()) + 1
