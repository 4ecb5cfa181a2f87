"""Augmentation: every shift and flip, and the same images for all passes over a mini-batch."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
import torch.nn.functional as F
from torch import nn

from baffle.core.directions import Directions
from baffle.data import Dataset, augment, load, partition, sample
from baffle.engines.local import LocalEngine
from baffle.errors import DataError
from baffle.runtimes.perturb import Perturbations
from baffle.runtimes.pytorch.runtime import TorchRuntime
from helpers import TASK
from small_datasets import Seen


def augmented(images: npt.NDArray[np.generic]) -> Dataset:
    return Dataset(images, np.arange(len(images)) % 10, augmented=True)


def pictures(count: int, channels: int = 3, height: int = 9, width: int = 7) -> npt.NDArray[np.int64]:
    """Images in which every pixel has a number of its own."""
    return np.arange(count * channels * height * width).reshape(count, channels, height, width)


def shifted(image: npt.NDArray[np.generic], row: int, column: int, flip: bool) -> npt.NDArray[np.generic]:
    """One augmented image, the obvious way."""
    padded = np.pad(image, ((0, 0), (4, 4), (4, 4)), mode="reflect")
    cut = padded[:, row : row + image.shape[1], column : column + image.shape[2]]
    return cut[:, :, ::-1] if flip else cut


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 9, 7), (3, 32, 32), (2, 5, 5), (1, 5, 12)])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.int64])
def test_augmentation_is_that_of_one_image_after_another(shape: tuple[int, int, int], dtype: type[np.generic]) -> None:
    images = np.random.default_rng(1).integers(0, 256, (25, *shape)).astype(dtype)
    kept = images.copy()
    got = augment(images, np.random.default_rng(7))
    draws = np.random.default_rng(7)
    rows, columns, flips = (draws.integers(0, n, 25).tolist() for n in (9, 9, 2))
    expected = [shifted(*each) for each in zip(images, rows, columns, flips, strict=True)]
    assert got.dtype == dtype
    assert np.array_equal(got, np.stack(expected))
    assert np.array_equal(images, kept)


def test_every_shift_and_both_flips_occur_equally_often() -> None:
    image = pictures(1, width=12)[0]  # no shift of a flipped one is a shift of it
    variants = {
        shifted(image, row, column, flip).tobytes(): (row, column, flip)
        for row in range(9)
        for column in range(9)
        for flip in (False, True)
    }
    assert len(variants) == 162
    count = 6000
    images = np.broadcast_to(image, (count, *image.shape))
    found = [variants[one.tobytes()] for one in augment(images, np.random.default_rng(0))]
    for position, sides in ((0, 9), (1, 9), (2, 2)):
        often = np.bincount([int(v[position]) for v in found], minlength=sides)
        assert len(often) == sides
        assert np.abs(often - count / sides).max() < 5 * np.sqrt(count / sides)
    assert len(set(found)) == 162  # independent of one another


@pytest.mark.parametrize("shape", [(1, 4, 8), (1, 8, 4), (64,), (8, 8), (1, 1, 8, 8)])
def test_what_cannot_be_augmented_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match=r"cannot be augmented: expected images \(channels, height >= 5, width >= 5\)"):
        augmented(np.zeros((3, *shape)))
    assert len(Dataset(np.zeros((3, *shape)), np.zeros(3))) == 3


def test_a_batch_is_augmented_after_it_is_drawn() -> None:
    data = augmented(pictures(30))
    batch = sample(data, 8, np.random.default_rng(3))
    draws = np.random.default_rng(3)
    chosen = data.take(draws.choice(30, 8, replace=False))
    assert np.array_equal(batch.y, chosen.y)
    assert np.array_equal(batch.x, augment(chosen.x, draws))
    assert np.array_equal(data.x, pictures(30))
    plain = sample(replace(data, augmented=False), 8, np.random.default_rng(3))
    assert np.array_equal(plain.x, chosen.x)


def test_every_pass_over_a_batch_sees_the_same_images() -> None:
    train, _ = load("digits", augmented=True)
    model = Seen()
    runtime = TorchRuntime(model, F.cross_entropy, threads=1)
    batch = sample(train, 20, np.random.default_rng(0))
    asked = Perturbations(Directions(runtime.table, "rank1", (0, 0)), 5, (0.1,), baseline=True)
    runtime.losses(runtime.initial_weights(), asked, batch)
    assert model.inputs[1:] == [batch.x.tobytes()] * 6  # the first call measures what an example takes


def test_batches_of_clients_are_augmented_by_key_round_client_and_step() -> None:
    images = np.broadcast_to(pictures(1, 1, 8, 8), (20, 1, 8, 8))  # all alike: batches differ by augmentation alone
    runtime = TorchRuntime(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), F.cross_entropy, threads=1)
    engines = [LocalEngine(runtime, [augmented(images)] * 2) for _ in range(2)]
    batches = {
        (key, round_, client, step): [
            engine.batch(msgspec.structs.replace(TASK, key=key, round=round_, batch_size=10), client, step).x.tobytes()
            for engine in engines
        ]
        for key in (0, 1)
        for round_ in (0, 1)
        for client in (0, 1)
        for step in (0, 1)
    }
    assert all(first == second for first, second in batches.values())
    assert len({first for first, _ in batches.values()}) == 16


def test_augmentation_belongs_to_training_examples_alone() -> None:
    for train, test in (load("digits"), load("digits", augmented=True)):
        assert not test.augmented
        assert np.array_equal(train.x, load("digits")[0].x)
    assert load("digits", augmented=True)[0].augmented
    assert all(part.augmented for part in partition(load("digits", augmented=True)[0], 3))
