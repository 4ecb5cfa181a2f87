"""The rebuild: exact whatever the order, by hand on a small example, unbiased, and of the error that theory says."""

import math
import tracemalloc
from collections.abc import Callable, Sequence
from fractions import Fraction
from random import Random

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baffle.client.respond import finite_differences, perturbations
from baffle.core.directions import Directions
from baffle.core.rebuild import Execution, check_exact, combine, combine_slowly, estimate
from baffle.core.scalars import encode
from baffle.core.types import (
    MAX_WEIGHT_SUM,
    Difference,
    Family,
    Integers,
    Row,
    Sharing,
    Table,
    Task,
    Weights,
    bits_of,
    limit_of,
    make_table,
    pack,
    table_size,
)
from baffle.errors import PlanError
from helpers import TASK

Float64 = npt.NDArray[np.float64]

FAMILIES: list[Family] = ["rank1", "rademacher", "gaussian"]

DIMENSION = st.integers(1, 12)
SHAPE = st.one_of(
    st.just(()),
    st.tuples(st.sampled_from([1, 2, 7, 8, 9, 255, 256, 257, 700])),
    st.tuples(DIMENSION, DIMENSION),
    st.sampled_from([(1, 300), (300, 1), (20, 30), (0,), (0, 3), (3, 0)]),
    st.tuples(DIMENSION, st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
)
TABLES = st.lists(SHAPE, min_size=1, max_size=4).map(
    lambda shapes: make_table({f"t{i}": s for i, s in enumerate(shapes)})
)
DIRECTIONS = st.builds(
    Directions,
    TABLES,
    st.sampled_from(FAMILIES),
    st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**32)),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**24 - 1),
)
LIMIT = limit_of(15)
SCALAR = st.one_of(st.integers(-(2**31), 2**31), st.integers(-2, 2), st.sampled_from([-(2**31), 2**31]))
SCALARS = st.lists(SCALAR, min_size=1, max_size=40).map(lambda values: np.array(values, np.int64))
EXECUTIONS = st.builds(
    Execution,
    threads=st.sampled_from([None, 1, 2, 3]),
    block=st.one_of(st.integers(1, 2**16), st.sampled_from([1, 8, 255, 256, 257, 512])),
)


def make_row(
    family: Family,
    vectors: Sequence[Sequence[Sequence[int]]],
    *,
    sharing: Sharing = "shared",
    exponent: int = 0,
    weight_sum: int = 1,
    participants: tuple[int, ...] = (0,),
    key: int = 7,
    round_: int = 1,
) -> Row:
    """A row of integers [vectors][local steps][K]."""
    values = np.array(vectors, np.int64)
    return Row(
        round=round_,
        key=key,
        applied=True,
        restores=None,
        rollbacks=0,
        family=family,
        sharing=sharing,
        num_directions=values.shape[2],
        difference="forward",
        sigma=0.001,
        lattice=0,
        exponents=(exponent,),
        local_steps=values.shape[1],
        numbers=values.shape[2],
        bits=bits_of(values),
        magnitudes=(0,),
        participants=participants,
        weight_sum=weight_sum,
        scalars=pack(values, bits_of(values)),
        clipped=0,
        nonfinite=0,
        clip_factor=1.0,
        optimizer="sgd",
        coefficients={"lr": 1.0, "weight_decay": 0.0},
        ema=0.0,
        weights_sha256=b"",
        state_sha256=b"",
    )


# Exact sums


@settings(deadline=None, max_examples=150)
@given(DIRECTIONS, SCALARS, EXECUTIONS)
def test_fast_equals_slow_bit_for_bit(directions: Directions, scalars: Integers, execution: Execution) -> None:
    before = scalars.tobytes()
    fast = combine(directions, scalars, execution)
    assert fast.dtype == np.float64
    assert fast.tobytes() == combine_slowly(directions, scalars).tobytes()
    assert scalars.tobytes() == before


@settings(deadline=None, max_examples=60)
@given(DIRECTIONS, SCALARS, st.randoms(use_true_random=False))
def test_any_order_of_the_directions_gives_the_same_bits(
    directions: Directions, scalars: Integers, random: Random
) -> None:
    order = list(range(len(scalars)))
    random.shuffle(order)
    total = np.zeros(table_size(directions.table), np.float64)
    for k in order:
        for i, spec in enumerate(directions.table):
            total[spec.slice] += float(scalars[k]) * directions.entries(i, slice(k, k + 1))[0]
    assert np.array_equal(total, combine(directions, scalars))


@settings(deadline=None, max_examples=60)
@given(DIRECTIONS, SCALARS, st.integers(-100, 100))
def test_linear_in_the_scalars(directions: Directions, scalars: Integers, factor: int) -> None:
    others = scalars[::-1].copy()
    assert np.array_equal(
        combine(directions, factor * scalars + others),
        factor * combine(directions, scalars) + combine(directions, others),
    )


def test_one_scalar_gives_its_direction() -> None:
    for family in FAMILIES:
        directions = Directions(make_table({"w": (3, 5), "b": (5,), "s": ()}), family, (3, 1))
        entries = np.concatenate([directions.entries(i, slice(2, 3))[0] for i in range(3)])
        assert np.array_equal(combine(directions, np.array([0, 0, -4])), -4.0 * entries)


@pytest.mark.parametrize("count", [8, 9, 63, 64, 65, 130])
@pytest.mark.parametrize("family", FAMILIES)
def test_groups_of_directions_leave_no_seam(family: Family, count: int) -> None:
    directions = Directions(make_table({"w": (20, 15), "b": (300,)}), family, (3, 1))
    scalars = np.random.default_rng(count).integers(-(2**31), 2**31, count)
    assert combine(directions, scalars).tobytes() == combine_slowly(directions, scalars).tobytes()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("execution", [Execution(), Execution(threads=2, block=2**12), Execution(block=2**18)])
def test_large_tensors(family: Family, execution: Execution) -> None:
    """Longer than one block of work, and long enough for the compiled generator."""
    directions = Directions(make_table({"v": (70_001,), "w": (301, 299)}), family, (3, 1))
    scalars = np.random.default_rng(0).integers(-LIMIT, LIMIT, 9)
    assert combine(directions, scalars, execution).tobytes() == combine_slowly(directions, scalars).tobytes()


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([(3, 700), (700, 3), (67, 70), (1, 513), (513, 1), (2, 9, 30), (1100,)]),
    st.sampled_from(FAMILIES),
    st.integers(1, 300),
    st.one_of(st.integers(1, 2000), st.sampled_from([64, 1024])),
    st.booleans(),
    st.integers(0, 2**32),
)
def test_seams_of_tiles_change_nothing(
    shape: tuple[int, ...], family: Family, count: int, block: int, pruned: bool, seed: int
) -> None:
    """Tiles that start within a block of bits, of few rows or columns, and more directions than a product takes."""
    rng = np.random.default_rng(seed)
    masks = {"w": rng.random(shape) < 0.5} if pruned else None
    directions = Directions(make_table({"w": shape, "b": (5,)}, masks), family, (seed, 1))
    scalars = rng.integers(-(2**31), 2**31, count)
    fast = combine(directions, scalars, Execution(2, block))
    assert fast.tobytes() == combine_slowly(directions, scalars).tobytes()


MEMORY: list[tuple[Family, tuple[int, ...], int]] = [
    ("rank1", (2000, 1500), 64),
    ("rank1", (4, 750_000), 256),
    ("rank1", (3_000_000,), 64),
    ("rademacher", (2000, 1500), 64),
    ("gaussian", (2000, 1500), 8),
]


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize(("family", "shape", "count"), MEMORY)
def test_memory_beyond_the_result_is_bounded(family: Family, shape: tuple[int, ...], count: int, pruned: bool) -> None:
    """50 bytes for each entry of a block and 6 MB of bits and products a thread, whatever n, K and steps.

    float64[n] alone would be 24 MB, the drawn signs at least as much, and the Gaussian entries 48 MB.
    """
    masks = {"w": np.arange(3_000_000).reshape(shape) % 3 > 0} if pruned else None
    table = make_table({"w": shape}, masks)
    row = make_row(family, np.random.default_rng(0).integers(-LIMIT, LIMIT, (1, 2, count)).tolist())
    for threads, block in ((1, 2**14), (2, 2**16)):
        tracemalloc.start()
        try:
            estimate(table, row, Execution(threads, block))
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak - 4 * table_size(table) < threads * (50 * block + 6 * 2**20)


def test_exact_up_to_the_last_integer_of_float64_and_not_beyond() -> None:
    directions = Directions(make_table({"w": (4, 4), "v": (9,)}), "rank1", (3, 1))
    for sign in (1, -1):
        inside = np.array([2**53 - 2, sign], np.int64)
        assert np.array_equal(combine(directions, inside).astype(np.int64), slow_integers(directions, inside))
        beyond = np.array([2**53, sign], np.int64)
        assert not np.array_equal(combine(directions, beyond).astype(np.int64), slow_integers(directions, beyond))


@pytest.mark.parametrize("scalars", [[2**24 - 1, 1], [2**24, 1], [2**24 + 1, 2], [2**24, 0], [2**23 + 1, -(2**23)]])
def test_sums_around_the_last_integer_of_float32(scalars: list[int]) -> None:
    directions = Directions(make_table({"w": (9, 20), "v": (9,)}), "rank1", (3, 1))
    values = np.array(scalars, np.int64)
    assert combine(directions, values).tobytes() == combine_slowly(directions, values).tobytes()


def slow_integers(directions: Directions, scalars: Integers) -> Integers:
    total = np.zeros(table_size(directions.table), np.int64)
    for k, scalar in enumerate(scalars):
        total += scalar * np.concatenate([directions.entries(i, slice(k, k + 1))[0] for i in range(2)])
    return total


# The check that makes the sums exact


@pytest.mark.parametrize("family", FAMILIES)
def test_check_exact_at_the_bound(family: Family) -> None:
    directions = Directions(make_table({"w": (2, 2)}), family, (7, 1))
    largest = 6490 if family == "gaussian" else 1
    most = (2**53 - 1) // (LIMIT * largest)  # the largest product of directions, steps and weights
    assert most * LIMIT * largest < 2**53 <= (most + 1) * LIMIT * largest
    check_exact(directions, most, 1, 1)
    check_exact(directions, 1, most, 1)
    check_exact(directions, 1, 1, most)
    for arguments in (
        (most + 1, 1, 1),
        (1, most + 1, 1),
        (1, 1, most + 1),
        (most // 2 + 1, 2, 1),
        (1, most // 2 + 1, 2),
    ):
        with pytest.raises(PlanError, match=r"expected < 2\*\*53.*use fewer directions"):
            check_exact(directions, *arguments)


def test_check_exact_names_the_values() -> None:
    directions = Directions(make_table({"w": (2, 2)}), "gaussian", (7, 1))
    with pytest.raises(PlanError, match=r"directions = 1048576 x local_steps = 30 x sum of weights = 131071"):
        check_exact(directions, 2**20, 30, MAX_WEIGHT_SUM)


# By hand

TABLE = make_table({"w": (2, 2)})


def entries(family: Family, client: int = 0, step: int = 0) -> list[list[int]]:
    return [[int(x) for x in d] for d in Directions(TABLE, family, (7, 1), client, step).entries(0, slice(0, 2))]


def test_by_hand_shared() -> None:
    """12 (-1, -1, 1, 1) - 4 (1, -1, 1, -1) = (-16, -8, 8, 16), times 1/4 / (2 x 4)."""
    assert entries("rank1") == [[-1, -1, 1, 1], [1, -1, 1, -1]]
    row = make_row("rank1", [[[12, -4]]], exponent=-2, weight_sum=4, participants=(0, 2))
    result = estimate(TABLE, row)
    assert result.dtype == np.float32
    assert result.tolist() == [-0.5, -0.25, 0.25, 0.5]


def test_by_hand_per_client() -> None:
    """Clients 0 and 2 draw as 1 and 3: (4, -4, 4, -4) + (16, -8, -16, 8) = (20, -12, -12, 4), times 1/32."""
    assert entries("rank1", client=1) == [[-1, 1, -1, 1], [1, -1, 1, -1]]
    assert entries("rank1", client=3) == [[1, -1, -1, 1], [-1, -1, 1, 1]]
    vectors = [[[4, 8]], [[12, -4]]]
    row = make_row("rank1", vectors, sharing="per-client", exponent=-2, weight_sum=4, participants=(0, 2))
    assert estimate(TABLE, row).tolist() == [0.625, -0.375, -0.375, 0.125]


def test_by_hand_local_steps() -> None:
    """(-16, -8, 8, 16) + 8 (-1, 1, 1, -1) + 4 (-1, -1, 1, 1) = (-28, -4, 20, 12), times 1/4 / (2 x 2 x 4)."""
    assert entries("rank1", step=1) == [[-1, 1, 1, -1], [-1, -1, 1, 1]]
    row = make_row("rank1", [[[12, -4], [8, 4]]], exponent=-2, weight_sum=4, participants=(0, 2))
    assert estimate(TABLE, row).tolist() == [-0.4375, -0.0625, 0.3125, 0.1875]


def test_by_hand_gaussian() -> None:
    """3 (1604, -1120, -376, -461) + (-656, 942, -802, -22), in units of 2**-10, times 1/32."""
    assert entries("gaussian") == [[1604, -1120, -376, -461], [-656, 942, -802, -22]]
    row = make_row("gaussian", [[[3, 1]]], exponent=-2, weight_sum=4, participants=(0, 2))
    assert (estimate(TABLE, row) * 2**15).tolist() == [4156, -2418, -1930, -1405]


def test_without_weight_the_estimate_is_zero() -> None:
    assert estimate(TABLE, make_row("rank1", [[[0, 0]]], weight_sum=0)).tolist() == [0, 0, 0, 0]


def test_round_key_and_step_choose_the_directions() -> None:
    base = estimate(TABLE, make_row("gaussian", [[[1, 2]]])).tolist()
    assert estimate(TABLE, make_row("gaussian", [[[1, 2]]], round_=2)).tolist() != base
    assert estimate(TABLE, make_row("gaussian", [[[1, 2]]], key=8)).tolist() != base
    assert estimate(TABLE, make_row("gaussian", [[[0, 0], [1, 2]]])).tolist() != [x / 2 for x in base]
    assert estimate(TABLE, make_row("gaussian", [[[1, 2], [0, 0]]])).tolist() == [x / 2 for x in base]


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(FAMILIES),
    st.lists(st.integers(-LIMIT * 100, LIMIT * 100), min_size=1, max_size=9),
    st.integers(-60, 60),
    st.integers(1, MAX_WEIGHT_SUM),
)
def test_one_float64_factor_then_one_rounding_to_float32(
    family: Family, scalars: list[int], exponent: int, weight_sum: int
) -> None:
    table = make_table({"w": (3, 3), "b": (4,)})
    directions = Directions(table, family, (7, 1))
    total = [int(x) for x in combine_slowly(directions, np.array(scalars, np.int64))]
    scale = Fraction(2) ** exponent / (1024 if family == "gaussian" else 1)
    factor = float(scale / (len(scalars) * weight_sum))  # correctly rounded
    expected = np.array([x * factor for x in total], np.float64).astype(np.float32)
    result = estimate(table, make_row(family, [[scalars]], exponent=exponent, weight_sum=weight_sum))
    assert result.tobytes() == expected.tobytes()
    for got, x in zip(result.tolist(), total, strict=True):
        exact = Fraction(x) * scale / (len(scalars) * weight_sum)
        assert abs(Fraction(got) - exact) <= abs(exact) * Fraction(1, 2**24) * Fraction(1000001, 1000000)


@settings(deadline=None, max_examples=40)
@given(TABLES, st.sampled_from(FAMILIES), st.sampled_from(["shared", "per-client"]), EXECUTIONS, st.data())
def test_no_execution_changes_a_bit(
    table: Table, family: Family, sharing: Sharing, execution: Execution, data: st.DataObject
) -> None:
    count, clients = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 3))
    steps = data.draw(st.integers(1, 3)) if sharing == "shared" else 1
    seed = data.draw(st.integers(0, 2**32))
    shape = (1 if sharing == "shared" else clients, steps, count)
    vectors = np.random.default_rng(seed).integers(-(2**31) + 1, 2**31, shape).tolist()
    row = make_row(family, vectors, sharing=sharing, weight_sum=17, participants=tuple(range(clients)), exponent=-9)
    assert estimate(table, row, execution).tobytes() == estimate(table, row, Execution(slow=True)).tobytes()


# Unbiased: a weighted mean of quadratic losses, through the client's own chain

QUADRATIC = make_table({"w": (2, 3), "v": (2,), "s": ()})
WEIGHTS = (1, 3)


def quadratics() -> tuple[Weights, Callable[[int, Float64], Float64], Float64]:
    """A point, the losses of two examples of a client at some points, and the gradient of the weighted mean."""
    rng = np.random.default_rng(11)
    n = table_size(QUADRATIC)
    square = rng.standard_normal((2, 2, n, n)) / n**0.5
    hessian = square @ square.transpose(0, 1, 3, 2)  # [client, example, n, n]
    slope = rng.standard_normal((2, 2, n))
    point = rng.standard_normal(n).astype(np.float32)

    def losses(client: int, points: Float64) -> Float64:
        """float64[points, n] -> float64[points, examples]."""
        curved = np.einsum("pi,eij,pj->pe", points, hessian[client], points) / 2
        return np.asarray(curved + points @ slope[client].T)

    gradients = (hessian @ point.astype(np.float64) + slope).mean(axis=1)  # [client, n]
    return point, losses, np.average(gradients, axis=0, weights=WEIGHTS)


def make_task(family: Family, sharing: Sharing, difference: Difference, round_: int, num_directions: int) -> Task:
    return msgspec.structs.replace(
        TASK,
        round=round_,
        key=12345,
        family=family,
        sharing=sharing,
        difference=difference,
        num_directions=num_directions,
        sigma=0.25,
        exponents=(-8,),
    )


@pytest.mark.parametrize(
    ("family", "sharing", "difference"),
    [
        ("rank1", "shared", "central"),
        ("rademacher", "shared", "central"),
        ("gaussian", "shared", "central"),
        ("rank1", "per-client", "central"),
        ("gaussian", "shared", "forward"),
    ],
)
def test_unbiased_on_a_quadratic_loss(family: Family, sharing: Sharing, difference: Difference) -> None:
    point, losses, gradient = quadratics()
    rounds, scratch = 100, np.empty_like(point)
    estimates = np.empty((rounds, len(point)))
    for r in range(rounds):
        task = make_task(family, sharing, difference, r, num_directions=50)
        vectors = []
        for client, weight in enumerate(WEIGHTS):
            passes = perturbations(task, QUADRATIC, client).weights(point, scratch)
            points = np.array([w.astype(np.float64) for w in passes])
            encoded = encode(task, finite_differences(task, losses(client, points).astype(np.float32)))
            assert encoded.clipped == encoded.nonfinite == 0
            vectors.append([encoded.integers * weight])
        kept = np.array(vectors) if sharing == "per-client" else np.array(vectors).sum(axis=0, keepdims=True)
        row = make_row(
            family,
            kept.tolist(),
            sharing=sharing,
            exponent=task.exponents[0],
            weight_sum=sum(WEIGHTS),
            participants=(0, 1),
            key=task.key,
            round_=r,
        )
        estimates[r] = estimate(QUADRATIC, row)
    errors = estimates.std(axis=0, ddof=1) / math.sqrt(rounds)
    assert np.abs((estimates.mean(axis=0) - gradient) / errors).max() < 5
    along = estimates @ gradient / (gradient @ gradient)
    error = along.std(ddof=1) / math.sqrt(rounds)
    assert abs(along.mean() - 1) < 5 * error < 0.15


# Error of one estimate


@pytest.mark.parametrize(("family", "surplus"), [("rank1", -1), ("rademacher", -1), ("gaussian", 1)])
def test_relative_error_is_that_of_theory(family: Family, surplus: int) -> None:
    """E |g_hat - g|**2 / |g|**2 = (n - 1) / K for entries +-1, (n + 1) / K for Gaussian ones."""
    table, count, rounds, exponent = make_table({"w": (2, 3), "v": (2,)}), 32, 2_000, -18
    n = table_size(table)
    gradient = np.array([1.5, -0.25, 0.75, 2.0, -1.0, 0.5, 1.25, -0.75])
    errors, along = np.empty(rounds), np.empty(rounds)
    for r in range(rounds):
        directions = Directions(table, family, (99, r))
        drawn = np.concatenate([directions.entries(i, slice(0, count)) for i in range(len(table))], axis=1)
        slopes = drawn.astype(np.float64) @ gradient * directions.unit
        integers = np.rint(np.ldexp(slopes, -exponent)).astype(np.int64)
        row = make_row(family, [[integers.tolist()]], exponent=exponent, key=99, round_=r)
        difference = estimate(table, row) - gradient
        errors[r] = difference @ difference / (gradient @ gradient)
        along[r] = 1 + difference @ gradient / (gradient @ gradient)
    standard_error = errors.std(ddof=1) / math.sqrt(rounds)
    expected = (n + surplus) / count
    assert 5 * standard_error < 0.08 * expected  # so that n - 1, n and n + 1 differ
    assert abs(errors.mean() - expected) < 5 * standard_error
    assert abs(along.mean() - 1) < 5 * along.std(ddof=1) / math.sqrt(rounds)
