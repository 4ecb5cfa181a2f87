"""Directions: frozen numbers, any part alone, and the statistics that the estimate rests on."""

import hashlib
import json
import math
import runpy
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats  # type: ignore[import-untyped]

from baffle.core.directions import Directions, Entries
from baffle.core.types import Family, make_table
from helpers import TASK

Float64 = npt.NDArray[np.float64]

FAMILIES: list[Family] = ["rank1", "rademacher", "gaussian"]
MAKE = Path(__file__).with_name("golden") / "make.py"
GOLDEN: dict[str, Any] = json.loads(MAKE.with_name("directions.json").read_text())

DIMENSION = st.integers(1, 9)
SHAPE = st.one_of(
    st.just(()),
    st.tuples(st.sampled_from([1, 2, 7, 8, 9, 255, 256, 257, 600])),
    st.tuples(DIMENSION, DIMENSION),
    st.tuples(DIMENSION, st.just(130)),
    st.tuples(DIMENSION, st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
    st.sampled_from([(0,), (0, 3), (3, 0), (2, 0, 2)]),
)
TABLES = st.lists(SHAPE, min_size=1, max_size=4).map(
    lambda shapes: make_table({f"t{i}": s for i, s in enumerate(shapes)})
)
WORD = st.integers(0, 2**64 - 1)
DIRECTIONS = st.builds(
    Directions,
    TABLES,
    st.sampled_from(FAMILIES),
    st.tuples(WORD, st.integers(0, 2**32)),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**24 - 1),
)


def signs(text: str) -> list[int]:
    return [1 if c == "+" else -1 for c in text]


# Frozen numbers


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: f"{case['family']}-{case['client']}")
def test_golden_vectors(case: dict[str, Any]) -> None:
    table = make_table({name: tuple(shape) for name, shape in GOLDEN["shapes"].items()})
    key = (int(case["key"][0]), int(case["key"][1]))
    directions = Directions(table, case["family"], key, case["client"], case["step"])
    ks = slice(*case["directions"])
    for i, spec in enumerate(table):
        frozen = case["tensors"][spec.name]
        if directions.is_rank1(i):
            a, b = directions.factors(ks)[i]
            assert a.tolist() == [signs(f["left"]) for f in frozen]
            assert b.tolist() == [signs(f["right"]) for f in frozen]
        else:
            expected = frozen if case["family"] == "gaussian" else [signs(text) for text in frozen]
            assert directions.entries(i, ks).tolist() == expected


@pytest.mark.parametrize("case", GOLDEN["long_cases"], ids=lambda case: str(case["family"]))
def test_golden_hash_of_a_long_vector(case: dict[str, str]) -> None:
    long_case = GOLDEN["long"]
    family: Family = "gaussian" if case["family"] == "gaussian" else "rademacher"
    key = (int(long_case["key"][0]), int(long_case["key"][1]))
    directions = Directions(
        make_table({"v": (long_case["size"],)}), family, key, long_case["client"], long_case["step"]
    )
    k = long_case["direction"]
    entries = directions.entries(0, slice(k, k + 1))[0]
    assert hashlib.sha256(entries.astype("<i2").tobytes()).hexdigest() == case["sha256"]


def test_golden_file_is_what_the_second_implementation_writes() -> None:
    assert runpy.run_path(str(MAKE))["golden"]() == GOLDEN


# Layout


@pytest.mark.parametrize(
    ("shape", "matrix"),
    [((3, 4), (3, 4)), ((4, 3, 2, 2), (4, 12)), ((1, 1), (1, 1)), ((5,), None), ((), None), ((0, 4), None)],
)
def test_rank1_is_for_two_or_more_dimensions(shape: tuple[int, ...], matrix: tuple[int, int] | None) -> None:
    directions = Directions(make_table({"t": shape}), "rank1", (1, 2))
    assert directions.is_rank1(0) == (matrix is not None)
    factors = directions.factors(slice(0, 3))
    if matrix is None:
        assert factors == {}
        dense = Directions(make_table({"t": shape}), "rademacher", (1, 2))
        assert np.array_equal(directions.entries(0, slice(0, 3)), dense.entries(0, slice(0, 3)))
    else:
        a, b = factors[0]
        assert (a.shape, b.shape) == ((3, matrix[0]), (3, matrix[1]))
        assert np.linalg.matrix_rank(directions.entries(0, slice(0, 1)).reshape(matrix)) == 1


@settings(deadline=None, max_examples=60)
@given(DIRECTIONS, st.integers(0, 100), st.integers(1, 5))
def test_factors_equal_entries_written_out(directions: Directions, first: int, count: int) -> None:
    ks = slice(first, first + count)
    factors = directions.factors(ks)
    assert set(factors) == {i for i in range(len(directions.table)) if directions.is_rank1(i)}
    for i, (a, b) in factors.items():
        assert set(np.unique(a)) | set(np.unique(b)) <= {-1, 1}
        outer = np.stack([np.outer(left, right).reshape(-1) for left, right in zip(a, b, strict=True)])
        assert np.array_equal(outer, directions.entries(i, ks))


@settings(deadline=None, max_examples=60)
@given(DIRECTIONS, st.integers(1, 3))
def test_sign_bits_equal_entries(directions: Directions, count: int) -> None:
    for i, spec in enumerate(directions.table):
        if directions.family == "gaussian" or directions.is_rank1(i):
            continue
        packed = directions.sign_bits(i, slice(0, count), 0, -(-spec.size // 256))
        assert packed.shape == (count, 32 * -(-spec.size // 256))
        for k in range(count):
            bits = [packed[k, j // 8] >> (j % 8) & 1 for j in range(spec.size)]
            assert [2 * int(bit) - 1 for bit in bits] == directions.entries(i, slice(k, k + 1))[0].tolist()


@settings(deadline=None, max_examples=100)
@given(DIRECTIONS, st.data())
def test_any_part_alone_is_the_part_of_the_whole(directions: Directions, data: st.DataObject) -> None:
    tensor = data.draw(st.integers(0, len(directions.table) - 1))
    size = directions.table[tensor].size
    start, stop = sorted((data.draw(st.integers(0, size)), data.draw(st.integers(0, size))))
    first, last = data.draw(st.sampled_from([(0, 1), (0, 6), (1, 2), (2, 5), (5, 6)]))
    whole = directions.entries(tensor, slice(0, 6))
    assert whole.shape == (6, size)
    assert whole.dtype == np.int16
    part = directions.entries(tensor, slice(first, last), start, stop)
    assert np.array_equal(part, whole[first:last, start:stop])
    if directions.is_rank1(tensor):
        for factor, full in zip(
            directions.factors(slice(first, last), [tensor])[tensor],
            directions.factors(slice(0, 6))[tensor],
            strict=True,
        ):
            assert np.array_equal(factor, full[first:last])


@cache
def long_vector(family: Family) -> tuple[Directions, Entries]:
    """A vector long enough for the compiled generator, 256 blocks and more, drawn by the other one."""
    size = 70_000 if family == "rademacher" else 2_500
    directions = Directions(make_table({"v": (size,)}), family, (5, 6), 7, 8)
    pieces = [directions.entries(0, slice(0, 2), start, min(start + 999, size)) for start in range(0, size, 999)]
    return directions, np.concatenate(pieces, axis=1)


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(FAMILIES[1:]), st.floats(0, 1), st.floats(0, 1))
def test_any_part_of_a_long_vector(family: Family, x: float, y: float) -> None:
    directions, whole = long_vector(family)
    start, stop = sorted((int(x * whole.shape[1]), int(y * whole.shape[1])))
    assert np.array_equal(directions.entries(0, slice(0, 2), start, stop), whole[:, start:stop])


@pytest.mark.parametrize("family", FAMILIES[1:])
@pytest.mark.parametrize("offset", [-1, 0, 1])
def test_both_generators_agree_where_one_takes_over(family: Family, offset: int) -> None:
    directions, whole = long_vector(family)
    stop = 256 * (256 if family == "rademacher" else 8) + offset
    assert np.array_equal(directions.entries(0, slice(0, 2), 0, stop), whole[:, :stop])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tensor_draws_the_same_whatever_its_neighbours_are(family: Family) -> None:
    """Only its place in the table and its own shape count."""
    small = Directions(make_table({"a": (1,), "w": (4, 5)}), family, (1, 2))
    large = Directions(make_table({"x": (90, 9), "w": (4, 5), "y": (3,)}), family, (1, 2))
    assert np.array_equal(small.entries(1, slice(0, 9)), large.entries(1, slice(0, 9)))


@pytest.mark.parametrize("family", FAMILIES)
def test_units(family: Family) -> None:
    directions = Directions(make_table({"v": (4096,)}), family, (1, 2))
    assert directions.unit == (2**-10 if family == "gaussian" else 1)
    assert directions.largest == (6490 if family == "gaussian" else 1)
    assert np.abs(directions.entries(0, slice(0, 8))).max() <= directions.largest


# Statistics: fixed keys, 5 standard errors


def sample(family: Family, count: int) -> Float64:
    """Whole directions of a small table with every kind of tensor: float64[count, 32]."""
    table = make_table({"m": (4, 5), "c": (2, 1, 2, 1), "v": (7,), "s": ()})
    directions = Directions(table, family, (2024, 3))
    parts = [directions.entries(i, slice(0, count)) for i in range(len(table))]
    return np.concatenate(parts, axis=1).astype(np.float64) * directions.unit


@pytest.mark.parametrize("family", FAMILIES)
def test_mean_is_zero_and_covariance_is_the_identity(family: Family) -> None:
    count = 40_000
    x = sample(family, count)
    assert x.shape == (count, 32)
    assert np.abs(x.mean(axis=0)).max() < 5 / math.sqrt(count)
    gap = x.T @ x / count - np.eye(32)
    diagonal = np.diagonal(gap)
    if family == "gaussian":
        assert np.abs(diagonal).max() < 5 * math.sqrt(2 / count)
    else:
        assert np.array_equal(diagonal, np.zeros(32))
    assert np.abs(gap - np.diag(diagonal)).max() < 5 / math.sqrt(count)


def test_rank1_is_not_dense() -> None:
    """Products of four entries at the corners of a rectangle are 1 for rank-1, 0 on average for dense signs."""
    count = 10_000
    for family, expected in (("rank1", 1.0), ("rademacher", 0.0)):
        m = sample("rank1" if family == "rank1" else "rademacher", count)[:, :20].reshape(count, 4, 5)
        corners = (m[:, 0, 0] * m[:, 0, 3] * m[:, 2, 0] * m[:, 2, 3]).mean()
        assert abs(corners - expected) < 5 / math.sqrt(count) * (1 - expected) + 1e-12


def test_gaussian_entries_have_the_moments_of_a_normal() -> None:
    count = 2**20
    x = Directions(make_table({"v": (count,)}), "gaussian", (5, 5)).entries(0, slice(0, 1))[0] / 2**10
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((x**power).mean() - expected) < 5 * math.sqrt(variance / count)
    assert stats.kstest(x, "norm").pvalue > 1e-6


BASE = Directions(make_table({"x": (256, 256), "y": (256, 256)}), "rank1", (40, 50), client=3, step=4)


def draw(directions: Directions, tensor: int = 0, k: int = 5) -> Float64:
    """Numbers of mean 0 and variance 1 of one direction of one tensor; for rank-1 its independent factors."""
    if directions.family == "rank1":
        wide = replace(directions, table=make_table({"x": (2**14, 2**14), "y": (2**14, 2**14)}))
        factors = np.concatenate(wide.factors(slice(k, k + 1), [tensor])[tensor], axis=1)
        return factors.reshape(-1).astype(np.float64)
    entries = directions.entries(tensor, slice(k, k + 1))
    return entries.reshape(-1).astype(np.float64) * directions.unit


def rolled(x: Float64, places: int) -> Float64:
    return np.concatenate([x[places:], x[:places]])


NEIGHBOURS: dict[str, Callable[[Directions], Float64]] = {
    "round": lambda d: draw(replace(d, key=(d.key[0], d.key[1] + 1))),
    "direction": lambda d: draw(d, k=6),
    "tensor": lambda d: draw(d, tensor=1),
    "client": lambda d: draw(replace(d, client=d.client + 1)),
    "shared": lambda d: draw(replace(d, client=0)),
    "step": lambda d: draw(replace(d, step=d.step + 1)),
    "client against step": lambda d: draw(replace(d, client=d.step, step=d.client)),
    "key against round": lambda d: draw(replace(d, key=(d.key[1], d.key[0]))),
    "next entry": lambda d: rolled(draw(d), 1),
    "next word": lambda d: rolled(draw(d), 64),
    "next block": lambda d: rolled(draw(d), 256),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("neighbour", NEIGHBOURS)
def test_neighbours_are_uncorrelated(family: Family, neighbour: str) -> None:
    base = replace(BASE, family=family)
    x, y = draw(base), NEIGHBOURS[neighbour](base)
    assert len(x) == len(y) >= 2**15
    assert abs((x * y).sum()) < 5 * math.sqrt(len(x))


def test_left_and_right_factors_and_plain_signs_are_uncorrelated() -> None:
    side = 2**16
    directions = Directions(make_table({"x": (side, side)}), "rank1", (40, 50))
    a, b = (f[0].astype(np.float64) for f in directions.factors(slice(0, 1))[0])
    plain = replace(directions, table=make_table({"x": (side,)})).entries(0, slice(0, 1))[0]
    for x, y in ((a, b), (a, plain), (b, plain)):
        assert abs((x * y).sum()) < 5 * math.sqrt(side)


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_that_differ_by_one_bit_are_uncorrelated(family: Family) -> None:
    size = 2**12
    table = make_table({"v": (size,)})
    base = Directions(table, family, (0xDEADBEEF, 17))
    x = base.entries(0, slice(0, 1))[0] * base.unit
    for bit in range(128):
        key = (base.key[0] ^ (1 << bit & 2**64 - 1), base.key[1] ^ (1 << bit >> 64))
        assert key != base.key
        y = replace(base, key=key).entries(0, slice(0, 1))[0] * base.unit
        assert abs((x * y).sum()) < 5 * math.sqrt(size)


@pytest.mark.parametrize("family", ["rank1", "rademacher", "gaussian"])
def test_no_directions_and_ranges_outside(family: Family) -> None:
    directions = Directions(make_table({"w": (3, 4), "b": (5,)}), family, (1, 2))
    assert directions.entries(0, slice(0, 0)).shape == (0, 12)
    assert directions.factors(slice(0, 2), []) == {}
    with pytest.raises(ValueError, match="expected a range within 0:5"):
        directions.entries(1, slice(0, 1), 2, 6)


def test_only_a_clients_own_directions_depend_on_the_client() -> None:
    table = make_table({"w": (2, 3)})
    assert Directions.of(TASK, table, client=4, step=2) == Directions(table, "rank1", (TASK.key, TASK.round), 0, 2)
    own = msgspec.structs.replace(TASK, sharing="per-client")
    assert Directions.of(own, table, client=4) == Directions(table, "rank1", (TASK.key, TASK.round), 5, 0)
