"""Data sets: types, pixels and their scaling, pairs of PyTorch, mini-batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

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

from baffle.core.philox import Purpose, generator
from baffle.data import Dataset, Scaling, concatenate, from_torch, hold_out, partition, sample
from baffle.errors import DataError
from baffle.runtimes.pytorch.runtime import TorchRuntime
from small_datasets import Seen, numbered, numbers, seeds


def dataset(x: object, y: object, name: str = "data") -> Dataset:
    return Dataset(np.asarray(x), np.asarray(y), name)


RGB = Scaling((0.5, 0.25, 0.0), (0.5, 0.25, 2.0))


def pixels(count: int = 4) -> Dataset:
    x = np.zeros((count, 3, 5, 6), np.uint8)
    x[:, 1], x[:, 2] = 255, 51
    x[:, :, 2, 3] = [255, 0, 204]
    return Dataset(x, np.arange(count), scaling=RGB)


def test_groups_may_be_a_list_and_must_be_one_for_each_example() -> None:
    parts = partition(Dataset([[0.0], [1.0], [2.0]], [0, 1, 0], groups=["b", "a", "b"]), column=True)  # type: ignore[arg-type]  # as from Python
    assert [part.x.tolist() for part in parts] == [[[1.0]], [[0.0], [2.0]]]  # a, b
    with pytest.raises(DataError, match="x has 3 examples and groups has 2"):
        Dataset(np.zeros((3, 1)), np.zeros(3), groups=np.arange(2))
    with pytest.raises(DataError, match=r"mine\.groups: .*2 dimensions"):
        Dataset(np.zeros((3, 1)), np.zeros(3), "mine", groups=np.zeros((3, 2)))


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
