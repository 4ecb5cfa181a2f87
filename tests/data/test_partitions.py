"""Partitions and held-out examples follow their definitions and their seeds."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, pairwise

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baffle.core.philox import Purpose, generator
from baffle.data import Dataset, hold_out, load, partition, sample
from baffle.errors import DataError, OptionError, PlanError
from small_datasets import numbered, numbers, seeds


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
