"""Data sets and partitions: complete, disjoint, reproducible; augmentation; bad arrays refused by position."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import Dataset as MapDataset
from torch.utils.data import IterableDataset, TensorDataset

from baffle.core.directions import Directions
from baffle.core.philox import Purpose, generator
from baffle.data import Dataset, Scaling, augment, concatenate, from_torch, hold_out, load, partition, sample
from baffle.engines.local import LocalEngine
from baffle.errors import BaffleError, DataError, OptionError, PlanError
from baffle.runtimes.perturb import Perturbations
from baffle.runtimes.pytorch.runtime import TorchRuntime
from helpers import TASK

seeds = st.integers(0, 2**64 - 1)


def numbered(labels: npt.NDArray[np.int64]) -> Dataset:
    """Examples that carry their own number, so that a partition can be followed."""
    return Dataset(np.arange(len(labels), dtype=np.int64)[:, None], labels)


def dataset(x: object, y: object, name: str = "data") -> Dataset:
    return Dataset(np.asarray(x), np.asarray(y), name)


def numbers(data: Dataset) -> list[int]:
    return [int(i) for i in data.x[:, 0]]


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


@given(examples=st.integers(1, 300), clients=st.integers(1, 40), seed=seeds)
@settings(deadline=None, max_examples=60)
def test_iid_parts_are_disjoint_complete_even_and_reproducible(examples: int, clients: int, seed: int) -> None:
    data = numbered(np.zeros(examples, np.int64))
    if clients > examples:
        with pytest.raises(DataError, match=f"clients = {clients}: .* {examples}"):
            partition(data, clients, seed=seed)
        return
    parts = partition(data, clients, seed=seed)
    assert len(parts) == clients
    assert sorted(i for part in parts for i in numbers(part)) == list(range(examples))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert [numbers(p) for p in parts] == [numbers(p) for p in partition(data, clients, seed=seed)]


def test_iid_parts_differ_by_seed_and_keep_labels_with_examples() -> None:
    data = numbered(np.arange(100) % 7)
    first, second = partition(data, 4, seed=0), partition(data, 4, seed=1)
    assert numbers(first[0]) != numbers(second[0])
    for part in first:
        assert part.y.tolist() == [i % 7 for i in numbers(part)]
    assert [part.name for part in first] == [f"client {i}" for i in range(4)]


def test_neighbouring_large_seeds_give_other_parts() -> None:
    data = numbered(np.zeros(100, np.int64))
    for seed in (2**53, 2**63 + 1, 2**64 - 2):
        assert numbers(partition(data, 2, seed=seed)[0]) != numbers(partition(data, 2, seed=seed + 1)[0])


@given(
    labels=st.lists(st.integers(0, 5), min_size=1, max_size=200),
    clients=st.integers(1, 30),
    alpha=st.sampled_from([1e-6, 0.01, 0.1, 0.5, 1.0, 100.0, 1e6]),
    seed=seeds,
)
@settings(deadline=None, max_examples=150)
def test_dirichlet_parts_are_disjoint_complete_and_never_empty(
    labels: list[int], clients: int, alpha: float, seed: int
) -> None:
    data = numbered(np.array(labels, np.int64))
    if clients > len(labels):
        with pytest.raises(DataError, match="clients"):
            partition(data, clients, alpha=alpha, seed=seed)
        return
    parts = partition(data, clients, alpha=alpha, seed=seed)
    assert len(parts) == clients
    assert min(len(part) for part in parts) >= 1
    assert sorted(i for part in parts for i in numbers(part)) == list(range(len(labels)))
    for part in parts:
        assert part.y.tolist() == [labels[i] for i in numbers(part)]
    assert [numbers(p) for p in parts] == [numbers(p) for p in partition(data, clients, alpha=alpha, seed=seed)]


def slow_dirichlet(labels: npt.NDArray[np.int64], clients: int, alpha: float, seed: int) -> list[list[int]]:
    """One client after another looks through all owners."""
    rng = generator((seed, 0), Purpose.PARTITION)
    owners = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        where = rng.permutation(np.nonzero(labels == label)[0])
        cuts = np.round(np.cumsum(rng.dirichlet(np.full(clients, alpha)))[:-1] * len(where)).astype(np.int64)
        owners[where] = np.searchsorted(cuts, np.arange(len(where)), side="right")
    for client in range(clients):
        if not (owners == client).any():
            largest = np.bincount(owners, minlength=clients).argmax()
            owners[np.nonzero(owners == largest)[0][0]] = client
    return [np.nonzero(owners == client)[0].tolist() for client in range(clients)]


@given(examples=st.integers(1, 120), share=st.floats(0, 1), alpha=st.sampled_from([1e-6, 0.01, 0.3, 5.0]), seed=seeds)
@settings(deadline=None)
def test_dirichlet_is_that_of_one_client_after_another(examples: int, share: float, alpha: float, seed: int) -> None:
    clients = max(1, round(share * examples))
    labels = np.random.default_rng(seed).integers(0, 4, examples)
    parts = partition(numbered(labels), clients, alpha=alpha, seed=seed)
    assert [numbers(part) for part in parts] == slow_dirichlet(labels, clients, alpha, seed)


def largest_share(alpha: float, seed: int) -> float:
    """Of each client's labels, the share of the most frequent one; averaged over the clients."""
    train, _ = load("digits")
    parts = partition(train, 10, alpha=alpha, seed=seed)
    return float(np.mean([np.bincount(part.y, minlength=10).max() / len(part) for part in parts]))


def test_small_alpha_skews_labels_and_large_alpha_does_not() -> None:
    skewed = np.mean([largest_share(0.05, seed) for seed in range(5)])
    medium = np.mean([largest_share(0.5, seed) for seed in range(5)])
    even = np.mean([largest_share(1000.0, seed) for seed in range(5)])
    assert skewed > 0.6
    assert even < 0.15  # ten labels: 0.1 if all alike
    assert skewed > medium + 0.1 > even + 0.2


def test_large_alpha_is_nearly_even_in_sizes_and_labels() -> None:
    train, _ = load("digits")
    overall = np.bincount(train.y, minlength=10) / len(train)
    for part in partition(train, 10, alpha=1e5, seed=3):
        assert abs(len(part) - len(train) / 10) < 10
        assert np.abs(np.bincount(part.y, minlength=10) / len(part) - overall).max() < 0.03


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_alpha_must_be_positive_and_finite(alpha: float) -> None:
    with pytest.raises(OptionError, match=f"alpha = {alpha}"):
        partition(numbered(np.zeros(4, np.int64)), 2, alpha=alpha)


def test_dirichlet_needs_one_label_an_example() -> None:
    with pytest.raises(DataError, match="float32"):
        partition(Dataset(np.zeros((4, 2)), np.zeros(4)), 2, alpha=1.0)
    with pytest.raises(DataError, match="2 dimensions"):
        partition(Dataset(np.zeros((4, 2)), np.zeros((4, 1), np.int64)), 2, alpha=1.0)


@pytest.mark.parametrize("clients", [0, -1])
def test_clients_must_be_positive(clients: int) -> None:
    with pytest.raises(OptionError, match=f"clients = {clients}"):
        partition(numbered(np.zeros(4, np.int64)), clients)


@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=120),
    clients=st.integers(1, 12),
    shards=st.integers(1, 4),
    seed=seeds,
)
@settings(deadline=None, max_examples=100)
def test_shards_cover_every_example_once_and_hold_few_labels(
    labels: list[int], clients: int, shards: int, seed: int
) -> None:
    data = numbered(np.array(labels, np.int64))
    if clients * shards > len(labels):
        with pytest.raises(DataError, match=f"clients.*: expected at most one a training example, {len(labels)}"):
            partition(data, clients, shards=shards, seed=seed)
        return
    parts = partition(data, clients, shards=shards, seed=seed)
    assert len(parts) == clients
    assert sorted(i for part in parts for i in numbers(part)) == list(range(len(labels)))
    small, large = len(labels) // (clients * shards), -(-len(labels) // (clients * shards))
    ranked = sorted(range(len(labels)), key=lambda i: (labels[i], i))
    place = {example: position for position, example in enumerate(ranked)}
    for part in parts:
        assert shards * small <= len(part) <= shards * large
        assert part.y.tolist() == [labels[i] for i in numbers(part)]
        places = sorted(place[i] for i in numbers(part))
        runs = 1 + sum(b != a + 1 for a, b in pairwise(places))
        assert runs <= shards  # of examples that are neighbours when sorted by label
    again = partition(data, clients, shards=shards, seed=seed)
    assert [numbers(p) for p in parts] == [numbers(p) for p in again]


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_shards_of_one_label_each_leave_a_client_as_many_labels(shards: int) -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 30))
    parts = partition(numbered(labels), 30 // shards, shards=shards)  # 30 shards of 10 examples
    assert {len(part) for part in parts} == {10 * shards}
    assert max(len(np.unique(part.y)) for part in parts) == min(shards, 10)
    together = [tuple(np.unique(part.y)) for part in parts]
    assert len(set(together)) > 4  # dealt at random


def test_shards_are_dealt_by_seed() -> None:
    data = numbered(np.arange(100) // 10)
    first, other = (partition(data, 5, shards=2, seed=seed) for seed in (0, 1))
    assert [numbers(p) for p in first] != [numbers(p) for p in other]
    assert numbers(partition(data, 1, shards=3)[0]) == list(range(100))


def test_unequal_shards_are_at_most_one_example_apart() -> None:
    parts = partition(numbered(np.arange(23) % 4), 5, shards=1)
    assert sorted(len(part) for part in parts) == [4, 4, 5, 5, 5]


@pytest.mark.parametrize("shards", [0, -2])
def test_shards_must_be_positive(shards: int) -> None:
    with pytest.raises(OptionError, match=f"shards = {shards}"):
        partition(numbered(np.zeros(4, np.int64)), 2, shards=shards)


def test_shards_need_one_label_an_example() -> None:
    with pytest.raises(DataError, match="expected one integer label per example"):
        partition(Dataset(np.zeros((4, 2)), np.zeros(4)), 2, shards=1)


@given(owners=st.lists(st.integers(-3, 6), min_size=1, max_size=80), strings=st.booleans())
@settings(deadline=None, max_examples=60)
def test_a_column_gives_each_client_its_own_examples(owners: list[int], strings: bool) -> None:
    groups = np.array([f"user {o}" if strings else o for o in owners])
    data = replace(numbered(np.arange(len(owners))), groups=groups)
    parts = partition(data, column=True)
    names = sorted(set(groups.tolist()))
    assert len(parts) == len(names)
    for part, name in zip(parts, names, strict=True):
        assert numbers(part) == [i for i, owner in enumerate(groups.tolist()) if owner == name]
        assert part.groups is not None
        assert set(part.groups.tolist()) == {name}
    assert [numbers(p) for p in partition(data, len(names), column=True)] == [numbers(p) for p in parts]
    with pytest.raises(DataError, match=f"clients = {len(names) + 1}: the column names {len(names)}"):
        partition(data, len(names) + 1, column=True)


def test_groups_may_be_a_list_and_must_be_one_for_each_example() -> None:
    parts = partition(Dataset([[0.0], [1.0], [2.0]], [0, 1, 0], groups=["b", "a", "b"]), column=True)  # type: ignore[arg-type]  # as from Python
    assert [part.x.tolist() for part in parts] == [[[1.0]], [[0.0], [2.0]]]  # a, b
    with pytest.raises(DataError, match="x has 3 examples and groups has 2"):
        Dataset(np.zeros((3, 1)), np.zeros(3), groups=np.arange(2))
    with pytest.raises(DataError, match=r"mine\.groups: .*2 dimensions"):
        Dataset(np.zeros((3, 1)), np.zeros(3), "mine", groups=np.zeros((3, 2)))


def test_a_column_that_is_not_there_is_asked_for() -> None:
    with pytest.raises(DataError, match=r"no groups: expected a column .*groups_train"):
        partition(numbered(np.arange(4)), column=True)


WAYS: dict[str, float | bool] = {"alpha": 0.5, "shards": 2, "column": True}


@pytest.mark.parametrize(("first", "second"), list(combinations(WAYS, 2)))
def test_two_ways_to_split_are_refused(first: str, second: str) -> None:
    data = replace(numbered(np.arange(40) % 4), groups=np.arange(40) % 5)
    for way in (first, second):
        assert len(partition(data, 5, **{way: WAYS[way]})) == 5  # type: ignore[arg-type]  # by name
    with pytest.raises(PlanError, match=f"{first} and {second}: expected one way"):
        partition(data, 5, **{first: WAYS[first], second: WAYS[second]})  # type: ignore[arg-type]  # by name


@pytest.mark.parametrize("way", [{}, {"alpha": 0.5}, {"shards": 2}])
def test_clients_may_be_left_out_for_a_column_only(way: dict[str, float]) -> None:
    with pytest.raises(OptionError, match="clients = None"):
        partition(numbered(np.arange(40) % 4), **way)  # type: ignore[arg-type]  # by name


@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=6), per_class=st.integers(1, 12), seed=st.integers(0, 2**63)
)
@settings(deadline=None, max_examples=80)
def test_hold_out_sets_as_many_of_each_class_aside(sizes: list[int], per_class: int, seed: int) -> None:
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))
    data = numbered(labels)
    if min(sizes) <= per_class:
        short = next(label for label, count in enumerate(sizes) if count <= per_class)
        with pytest.raises(DataError, match=f"holdout = {per_class}: class {short} has {sizes[short]} examples"):
            hold_out(data, per_class, seed)
        return
    rest, held = hold_out(data, per_class, seed)
    assert np.bincount(held.y).tolist() == [per_class] * len(sizes)
    assert np.bincount(rest.y).tolist() == [count - per_class for count in sizes]
    assert sorted(numbers(rest) + numbers(held)) == list(range(len(labels)))
    for part in (rest, held):
        assert part.y.tolist() == labels[numbers(part)].tolist()
        assert numbers(part) == sorted(numbers(part))
    assert numbers(hold_out(data, per_class, seed)[1]) == numbers(held)


def test_hold_out_depends_on_its_seed_and_reaches_every_example() -> None:
    data = numbered(np.arange(40) % 4)
    held = [tuple(numbers(hold_out(data, 2, seed)[1])) for seed in range(60)]
    assert len(set(held)) > 50
    assert {i for part in held for i in part} == set(range(40))
    assert numbers(hold_out(data, 2)[1]) != numbers(hold_out(data, 2, 1)[1])


def test_what_is_held_out_is_never_augmented() -> None:
    train, _ = load("digits", augmented=True)
    rest, held = hold_out(train, 20)
    assert (train.augmented, rest.augmented, held.augmented) == (True, True, False)
    assert (rest.name, held.name) == ("train", "holdout")
    assert np.array_equal(sample(held, None, np.random.default_rng(0)).x, held.x)
    assert not np.array_equal(sample(rest, None, np.random.default_rng(0)).x, rest.x)


@pytest.mark.parametrize("per_class", [0, -1])
def test_hold_out_must_be_positive(per_class: int) -> None:
    with pytest.raises(OptionError, match=f"holdout = {per_class}"):
        hold_out(numbered(np.zeros(4, np.int64)), per_class)


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


def augmented(images: npt.NDArray[np.generic]) -> Dataset:
    return Dataset(images, np.arange(len(images)) % 10, augmented=True)


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


class Seen(nn.Module):
    """A linear model that notes its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.inputs = nn.Linear(64, 10), list[bytes]()

    def __deepcopy__(self, memo: object) -> Seen:
        return self

    def forward(self, x: Tensor) -> Tensor:
        self.inputs.append(x.numpy().tobytes())
        return torch.as_tensor(self.linear(x.flatten(1)))


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


RGB = Scaling((0.5, 0.25, 0.0), (0.5, 0.25, 2.0))


def pixels(count: int = 4) -> Dataset:
    x = np.zeros((count, 3, 5, 6), np.uint8)
    x[:, 1], x[:, 2] = 255, 51
    x[:, :, 2, 3] = [255, 0, 204]
    return Dataset(x, np.arange(count), scaling=RGB)


def test_pixels_are_scaled_channel_by_channel() -> None:
    numbers = pixels().inputs()
    assert numbers.dtype == np.float32
    expected = np.empty((4, 3, 5, 6))
    expected[:, 0], expected[:, 1], expected[:, 2] = (0 - 0.5) / 0.5, (1 - 0.25) / 0.25, 0.2 / 2
    expected[:, :, 2, 3] = [(1 - 0.5) / 0.5, (0 - 0.25) / 0.25, 0.8 / 2]
    assert np.allclose(numbers, expected, rtol=1e-6)


def test_pixels_stay_bytes_until_a_model_is_given_them() -> None:
    data = pixels()
    assert not data.is_tokens
    kept = [
        data.take(np.array([2, 0])),
        *partition(data, 2),
        concatenate(partition(data, 2)),
        sample(data, 2, np.random.default_rng(0)),
        sample(replace(data, augmented=True), 2, np.random.default_rng(0)),
        hold_out(replace(data, y=np.zeros(4, np.int64)), 1)[1],
    ]
    for part in kept:
        assert part.x.dtype == np.uint8
        assert part.scaling == RGB
        assert np.array_equal(part.inputs(), RGB(part.x))
    assert np.array_equal(data.take(np.array([2, 0])).inputs(), data.inputs()[[2, 0]])


def test_a_model_is_given_scaled_pixels() -> None:
    model = Seen()
    model.linear = nn.Linear(90, 10)
    runtime = TorchRuntime(model, F.cross_entropy, threads=1)
    runtime.evaluate(runtime.initial_weights(), pixels())
    given = np.frombuffer(model.inputs[-1], np.float32)  # after an example that is measured
    assert np.array_equal(given.reshape(4, 3, 5, 6), pixels().inputs())


@pytest.mark.parametrize(
    ("x", "found"),
    [
        (np.zeros((2, 3, 5, 5), np.float32), r"float32\[2, 3, 5, 5\]"),
        (np.zeros((2, 3, 5, 5), np.int64), r"int64\[2, 3, 5, 5\]"),
        (np.zeros((2, 1, 5, 5), np.uint8), r"uint8\[2, 1, 5, 5\]"),
        (np.zeros((2, 3, 25), np.uint8), r"uint8\[2, 3, 25\]"),
        ([[0], [1]], r"int64\[2, 1\]"),
    ],
)
def test_what_is_no_pixels_is_not_scaled(x: npt.NDArray[np.generic], found: str) -> None:
    with pytest.raises(DataError, match=rf"mine\.x: {found}: expected uint8 \[examples, 3, height, width\] to scale"):
        Dataset(x, np.zeros(2), "mine", RGB)


@pytest.mark.parametrize(
    ("mean", "std"),
    [((0.5,), (0.5, 0.5)), ((0.5,), (0.0,)), ((0.5,), (-1.0,)), ((np.nan,), (1.0,)), ((0.0,), (np.inf,))],
)
def test_a_scaling_that_would_give_no_numbers_is_refused(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    with pytest.raises(DataError, match="expected as many finite means as standard deviations > 0"):
        Scaling(mean, std)


def test_integers_are_tokens_and_pixels_and_floats_are_not() -> None:
    assert numbered(np.arange(3)).is_tokens
    assert not dataset([0.5, 1.5], [0, 1]).is_tokens
    assert not pixels().is_tokens
    assert np.array_equal(numbered(np.arange(3)).inputs(), [[0], [1], [2]])
    assert numbered(np.arange(3)).inputs().dtype == np.int64


class Squares(MapDataset[tuple[object, object]]):
    """Example i is i squared; it never says where it ends, as many a map-style data set."""

    def __init__(self, kind: str = "tensor") -> None:
        self.kind = kind

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> tuple[object, object]:
        value = [float(index), float(index**2)]
        x: object = {"tensor": torch.tensor(value), "array": np.array(value), "list": value}[self.kind]
        return x, index % 3


class Stream(IterableDataset[tuple[Tensor, int]]):
    """An endless data set's beginning."""

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        return iter([(torch.tensor([float(i), float(i**2)]), i % 3) for i in range(5)])


class SizedStream(Stream):
    """One that says how long it is, as a DataLoader likes it to."""

    def __len__(self) -> int:
        return 5


@pytest.mark.parametrize(
    "examples",
    [
        Squares(),
        Squares("array"),
        Squares("list"),
        Stream(),
        SizedStream(),
        [(torch.tensor([float(i), i**2]), i % 3) for i in range(5)],
        ([[i, float(i**2)], torch.tensor(i % 3)] for i in range(5)),
        {i: ((float(i), i**2), np.int32(i % 3)) for i in range(5)}.values(),
        TensorDataset(torch.tensor([[i, i**2] for i in range(5)]).double(), torch.tensor([0, 1, 2, 0, 1])),
    ],
    ids=["map", "arrays", "lists", "stream", "sized stream", "list", "generator", "values", "tensors"],
)
def test_pairs_of_any_kind_become_one_data_set(examples: Sequence[tuple[object, object]]) -> None:
    data = from_torch(examples, "mine")
    assert data.name == "mine"
    assert (data.x.dtype.name, data.y.dtype.name) == ("float32", "int64")
    assert data.x.tolist() == [[0, 0], [1, 1], [2, 4], [3, 9], [4, 16]]
    assert data.y.tolist() == [0, 1, 2, 0, 1]


def test_transforms_are_applied_once_as_it_is_read() -> None:
    calls: list[int] = []

    class Doubled(Squares):
        def __getitem__(self, index: int) -> tuple[object, object]:
            calls.append(index)
            x, y = super().__getitem__(index)
            return 2 * torch.as_tensor(x), y

    data = from_torch(Doubled())
    assert data.x.tolist() == [[0, 0], [2, 2], [4, 8], [6, 18], [8, 32]]
    sample(data, 2, np.random.default_rng(0))
    assert calls == [0, 1, 2, 3, 4]


def test_images_and_masks_of_torch_keep_their_shapes() -> None:
    images, masks = torch.rand(4, 3, 6, 5), torch.rand(4, 6, 5)
    data = from_torch(TensorDataset(images, masks))
    assert np.array_equal(data.x, images.numpy())
    assert np.array_equal(data.y, masks.numpy())


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([], "mine: no examples"),
        (iter(()), "mine: no examples"),
        ([(np.zeros(2), 0), (np.zeros(3), 0)], r"mine\[1\]: shape \(3,\), the first has \(2,\)"),
        ([(np.zeros(2), 0), (np.zeros(2), [0])], r"mine\[1\]: shape \(1,\), the first has \(\)"),
        ([(0, 0), (1, 1, 1)], r"mine\[1\]: tuple: expected a pair"),
        ([{"x": 0, "y": 1}], r"mine\[0\]: dict: expected a pair"),
        ([np.zeros(2)], r"mine\[0\]: ndarray: expected a pair"),
        (["xy"], r"mine\[0\]: str: expected a pair"),
        ([([1, [2, 3]], 0)], r"mine\[0\]: list: expected numbers"),
        ([(0.5, 0), (torch.ones((), requires_grad=True), 0)], r"mine\[1\]: Tensor: expected numbers .*detach"),
        ([("a", 0)], r"mine\.x: dtype <U1"),
        ([(np.nan, 0)], r"mine\.x\[0\] = nan"),
    ],
)
def test_what_is_no_pairs_of_one_shape_is_refused(examples: Sequence[tuple[object, object]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        from_torch(examples, "mine")


@given(examples=st.integers(1, 60), batch_size=st.integers(1, 60), seed=seeds)
@settings(deadline=None, max_examples=60)
def test_sample_is_without_replacement_and_follows_its_generator(examples: int, batch_size: int, seed: int) -> None:
    data = numbered(np.arange(examples))
    batch = sample(data, batch_size, generator((seed, 0), Purpose.BATCH))
    again = sample(data, batch_size, generator((seed, 0), Purpose.BATCH))
    assert numbers(batch) == numbers(again) == batch.y.tolist()
    assert len(set(numbers(batch))) == len(batch) == min(batch_size, examples)
    if batch_size >= examples:
        assert numbers(batch) == list(range(examples))


def test_sample_reaches_every_example_and_other_keys_give_other_batches() -> None:
    data = numbered(np.arange(20))
    batches = [numbers(sample(data, 5, generator((0, r), Purpose.BATCH))) for r in range(40)]
    assert {i for batch in batches for i in batch} == set(range(20))
    assert len({tuple(batch) for batch in batches}) > 30
    assert numbers(sample(data, None, generator((0, 0), Purpose.BATCH))) == list(range(20))


def test_concatenate_keeps_the_order() -> None:
    data = numbered(np.arange(9))
    joined = concatenate(partition(data, 2))
    assert sorted(numbers(joined)) == list(range(9))
    assert joined.y.tolist() == numbers(joined)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_numbers_are_refused_by_position(value: float) -> None:
    x = np.zeros((3, 2, 2), np.float32)
    x[1, 0, 1] = value
    with pytest.raises(DataError, match=rf"train\.x\[1, 0, 1\] = {value}"):
        dataset(x, [0, 1, 2], "train")
    with pytest.raises(DataError, match=rf"data\.y\[2\] = {value}"):
        dataset([0, 1, 2], [0.5, 1.5, value])


def test_numbers_too_large_for_float32_are_refused() -> None:
    with pytest.raises(DataError, match=r"data\.x\[1\] = inf"):
        dataset([0.0, 1e300], [0, 1])


def test_unequal_lengths_are_refused() -> None:
    with pytest.raises(DataError, match="test: x has 3 examples and y has 2"):
        dataset(np.zeros((3, 4)), [0, 1], "test")


@pytest.mark.parametrize(
    "values", [["a", "b"], np.array([None, None]), np.array([1j, 2j]), np.array(["2020-01-01"], "datetime64[D]")]
)
def test_what_is_no_number_is_refused(values: object) -> None:
    array = np.asarray(values)
    with pytest.raises(DataError, match=r"data\.x: dtype"):
        Dataset(array, np.zeros(len(array), np.int64))
    with pytest.raises(DataError, match=r"data\.y: dtype"):
        Dataset(np.zeros(len(array)), array)


def test_a_single_number_is_refused() -> None:
    with pytest.raises(DataError, match=r"data\.x: a single number"):
        dataset(3.0, [0])


@pytest.mark.parametrize(
    ("given_type", "kept"),
    [("f8", "f4"), ("f2", "f4"), ("f4", "f4"), ("u1", "i8"), ("i4", "i8"), ("?", "i8"), (">f4", "f4"), (">i2", "i8")],
)
def test_types_are_unified_and_values_kept(given_type: str, kept: str) -> None:
    data = Dataset(np.array([[0], [1]], given_type), np.array([1, 0], given_type))
    assert data.x.dtype == data.y.dtype == np.dtype(kept)
    assert (data.x.tolist(), data.y.tolist()) == ([[0], [1]], [1, 0])


def test_check_labels_names_the_first_bad_one() -> None:
    data = numbered(np.array([0, 2, 1, 5, -1]))
    numbered(np.array([0, 2, 1])).check_labels(3)
    with pytest.raises(DataError, match=r"data\.y\[3\] = 5: expected a label in 0\.\.2"):
        data.check_labels(3)
    with pytest.raises(DataError, match=r"data\.y\[4\] = -1: expected a label in 0\.\.5"):
        data.check_labels(6)
    with pytest.raises(DataError, match="float32: expected integer labels"):
        dataset([0, 1], [0.0, 1.0]).check_labels(2)


def test_a_label_of_64_unsigned_bits_is_named_as_it_is() -> None:
    with pytest.raises(DataError, match=f"= {2**63}"):
        dataset([0, 1], np.array([0, 2**63], np.uint64)).check_labels(2)


def arrays(**changes: object) -> dict[str, npt.NDArray[np.generic]]:
    whole: dict[str, object] = {
        "x_train": np.arange(24, dtype=np.float32).reshape(12, 2),
        "y_train": np.arange(12) % 3,
        "x_test": np.ones((4, 2), np.float32),
        "y_test": np.arange(4) % 3,
    }
    return {name: np.asarray(value) for name, value in (whole | changes).items() if value is not None}


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
