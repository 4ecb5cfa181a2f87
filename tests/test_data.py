"""Data sets and partitions: complete, disjoint, reproducible; bad arrays refused with the position named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baffle.data import Dataset, concatenate, load, partition, sample
from baffle.errors import BaffleError, DataError, OptionError
from baffle.philox import Purpose, generator

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


def test_unknown_dataset_and_missing_path() -> None:
    with pytest.raises(OptionError, match=r"dataset = 'digit': .*did you mean digits"):
        load("digit")
    with pytest.raises(BaffleError, match="needs a path"):
        load("arrays")
