"""Int8 codes and their lattice: by hand, against an obvious loop, and the estimate that is measured on it."""

from __future__ import annotations

import math
from dataclasses import replace

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import baffle as bf
from baffle.client.respond import finite_differences, perturbations
from baffle.core.directions import Directions
from baffle.core.method import Method, replay
from baffle.core.quantize import (
    CODES,
    LARGEST_CODE,
    MOST_CODES,
    encode,
    lattice_steps,
    on_lattice,
    row_scales,
    unscale,
)
from baffle.core.rebuild import estimate
from baffle.core.scalars import encode as encode_scalars
from baffle.core.types import (
    Credit,
    Family,
    ParamSpec,
    Row,
    Table,
    Task,
    Weights,
    bits_of,
    make_table,
    pack,
    table_size,
)
from baffle.runtimes import perturb
from baffle.runtimes.perturb import Perturbations
from helpers import TASK

Float64 = npt.NDArray[np.float64]

SIGN_FAMILIES: list[Family] = ["rank1", "rademacher"]
DIMENSION = st.integers(1, 7)
MATRIX = st.one_of(st.tuples(DIMENSION, DIMENSION), st.tuples(DIMENSION, st.integers(1, 3), DIMENSION))
SHAPE = st.one_of(MATRIX, st.tuples(st.sampled_from([1, 5, 300])), st.just(()), st.sampled_from([(0, 3), (3, 0)]))
SEED = st.integers(0, 2**32 - 1)


@st.composite
def weights_of_a_table(draw: st.DrawFn) -> tuple[Table, Weights]:
    """Tensors whose rows have very different sizes, some of zeros, some pruned."""
    shapes: dict[str, tuple[int, ...]] = {
        f"t{i}": shape for i, shape in enumerate(draw(st.lists(SHAPE, min_size=1, max_size=3)))
    }
    rng = np.random.default_rng(draw(SEED))
    masks = {name: rng.random(shape) < 0.7 for name, shape in shapes.items() if draw(st.booleans())}
    table = make_table(shapes, masks)
    weights = rng.standard_normal(table_size(table)).astype(np.float32)
    for spec in table:
        if spec.matrix is not None:
            sizes = 10.0 ** rng.integers(-9, 6, (spec.matrix[0], 1)) * (rng.random((spec.matrix[0], 1)) < 0.9)
            weights[spec.slice].reshape(spec.matrix)[:] *= sizes.astype(np.float32)
        if spec.mask is not None:
            weights[spec.slice][~spec.mask] = 0
    return table, weights


def slow_codes(spec: ParamSpec, weights: Weights) -> tuple[list[float], list[list[int]]]:
    """Scales and codes of a matrix, one number after another."""
    out, rest = spec.matrix or (0, 0)
    scales, codes = [], []
    for r in range(out):
        row = [weights[spec.offset + r * rest + c] for c in range(rest)]
        largest = max([np.float32(2**-6), *(abs(w) for w in row)])
        scale = largest / np.float32(119)
        assert type(scale) is np.float32
        scales.append(float(scale))
        codes.append([round(float(w / scale)) for w in row])  # ties to even, as Python rounds
    return scales, codes


def codes_of(spec: ParamSpec, weights: Weights, scales: npt.NDArray[np.float32]) -> npt.NDArray[np.int8]:
    out = np.full(spec.matrix or (0, 0), 99, np.int8)
    encode(weights[spec.slice].reshape(out.shape), scales, out)
    return out


# By hand

TABLE = make_table({"w": (3, 2), "b": (2,)})
HAND = np.array([119, 2.5, 0.25, -59.5, 0, 0, 7, -8], np.float32)  # scales 1, 1/2 and that of a row of zeros
SMALLEST = np.float32(2**-6) / np.float32(119)


def test_scales_by_hand() -> None:
    assert row_scales(TABLE[0], HAND).tolist() == [1.0, 0.5, float(SMALLEST)]
    assert row_scales(TABLE[0], HAND).dtype == np.float32
    tiny = np.full(8, 2**-7, np.float32)  # below the smallest maximum
    assert row_scales(TABLE[0], tiny).tolist() == [float(SMALLEST)] * 3


def test_codes_by_hand() -> None:
    assert codes_of(TABLE[0], HAND, row_scales(TABLE[0], HAND)).tolist() == [[119, 2], [0, -119], [0, 0]]
    halves = np.array([[0.5, 1.5, 2.5, -0.5, -1.5, 119]], np.float32)
    out = np.empty((1, 6), np.int8)
    encode(halves, np.ones(1, np.float32), out)
    assert out.tolist() == [[0, 2, 2, 0, -2, 119]]  # to the even one


def test_codes_end_where_eight_bits_do() -> None:
    out = np.empty((2, 3), np.int8)
    encode(np.array([[127.4, 127.5, 300], [-127, -128, -1e30]], np.float32), np.ones(2, np.float32), out)
    assert out.tolist() == [[127, 127, 127], [-127, -127, -127]]
    assert LARGEST_CODE == CODES + MOST_CODES == 127


def test_on_lattice_by_hand() -> None:
    before = HAND.copy()
    assert on_lattice(TABLE, HAND).tolist() == [119, 2, 0, -59.5, 0, 0, 7, -8]
    assert np.array_equal(HAND, before)


def test_steps_by_hand() -> None:
    """Two codes of 1 and 1/2 are 8 and 4 times a sigma of 1/4."""
    steps = lattice_steps(TABLE, HAND, 0.25, 2)
    assert list(steps) == [0]
    assert steps[0].tolist() == [8, 4, float(8 * SMALLEST)]
    assert steps[0].dtype == np.float32


def test_unscale_by_hand() -> None:
    estimated = np.array([16, -8, 16, 8, 0, 0, 3, 5], np.float32)
    before = estimated.copy()
    found = unscale(TABLE, estimated, HAND, 0.25, 2)
    assert found.tolist() == [2, -1, 4, 2, 0, 0, 3, 5]
    assert found.dtype == np.float32
    assert np.array_equal(estimated, before)


def test_exact_numbers_are_measured_along_no_direction_and_stay() -> None:
    estimated = np.array([16, -8, 16, 8, 0, 0, 3, 5], np.float32)
    exact = tuple(msgspec.structs.replace(spec, credit=Credit(0, "exact")) for spec in TABLE)
    rows = tuple(msgspec.structs.replace(spec, credit=Credit(0, "rows")) for spec in TABLE)
    assert unscale(exact, estimated, HAND, 0.25, 2).tolist() == estimated.tolist()
    assert unscale(rows, estimated, HAND, 0.25, 2).tolist() == [2, -1, 4, 2, 0, 0, 3, 5]


def test_perturbed_by_hand() -> None:
    """A direction of signs moves the first row by 2, the second by 1, biases by sigma."""
    directions = Directions(TABLE, "rank1", (7, 1))
    signs = np.concatenate([directions.entries(i, slice(0, 1))[0] for i in range(2)])
    scratch = np.empty_like(HAND)
    made = Perturbations(directions, 1, (0.25, -0.25), baseline=True, lattice=2).weights(HAND, scratch)
    base, plus, minus = (w.copy() for w in made)
    assert np.array_equal(base, on_lattice(TABLE, HAND))
    moves = np.array([2, 2, 1, 1, 2 * SMALLEST, 2 * SMALLEST, 0.25, 0.25], np.float32)
    assert np.array_equal(plus, base + moves * signs)
    assert np.array_equal(minus, base - moves * signs)


# Against the loop


@settings(deadline=None, max_examples=150)
@given(weights_of_a_table())
def test_codes_equal_the_loop(made: tuple[Table, Weights]) -> None:
    table, weights = made
    rounded = on_lattice(table, weights)
    for spec in table:
        if spec.matrix is None:
            assert np.array_equal(rounded[spec.slice], weights[spec.slice])
            continue
        scales, codes = slow_codes(spec, weights)
        assert row_scales(spec, weights).tolist() == scales
        found = codes_of(spec, weights, row_scales(spec, weights))
        assert found.tolist() == codes
        assert np.abs(found.astype(int)).max() <= CODES
        lattice = np.array([[np.float32(c) * np.float32(s) for c in row] for row, s in zip(codes, scales, strict=True)])
        assert np.array_equal(rounded[spec.slice], lattice.reshape(-1))
        # a row of zeros stays one
        assert not rounded[spec.slice][weights[spec.slice] == 0].any()


@settings(deadline=None, max_examples=100)
@given(weights_of_a_table(), st.sampled_from(SIGN_FAMILIES), st.integers(1, MOST_CODES), st.floats(1e-6, 10), SEED)
def test_a_step_on_the_lattice_is_exactly_so_many_codes(
    made: tuple[Table, Weights], family: Family, codes: int, sigma: float, key: int
) -> None:
    table, weights = made
    directions = Directions(table, family, (key, 1))
    asked = Perturbations(directions, 3, (sigma, -sigma), baseline=False, lattice=codes)
    weights.setflags(write=False)
    passes = [w.copy() for w in asked.weights(weights, np.full_like(weights, np.nan))]
    for i, spec in enumerate(table):
        entries = directions.entries(i, slice(0, 3)).astype(int)
        for n, perturbed in enumerate(passes):
            moved = entries[n // 2] * (1 if n % 2 == 0 else -1)
            if spec.matrix is None:
                step = np.float32(sigma) * moved.astype(np.float32)
                assert np.array_equal(perturbed[spec.slice], weights[spec.slice] + step)
                continue
            scales = row_scales(spec, weights)
            start = codes_of(spec, weights, scales).astype(int)
            assert np.array_equal(
                codes_of(spec, perturbed, scales).astype(int), start + codes * moved.reshape(spec.matrix)
            )
            if spec.mask is not None:
                assert not perturbed[spec.slice][~spec.mask].any()


def slow_passes(asked: Perturbations, weights: Weights) -> list[Weights]:
    """The lattice plus the stretched step times the entry, number by number, in float32."""
    table, one = asked.directions.table, np.float32
    base = on_lattice(table, weights)
    passes = [base.copy()] if asked.baseline else []
    for k in range(asked.first, asked.first + asked.num_directions):
        for step in asked.steps:
            out = base.copy()
            for i, spec in enumerate(table):
                entries = asked.directions.entries(i, slice(k, k + 1))[0]
                for j, entry in enumerate(entries):
                    s = one(step)
                    if spec.matrix is not None:
                        scale = row_scales(spec, weights)[j // spec.matrix[1]]
                        s = ((one(asked.lattice) * scale) / one(max(asked.steps))) * s
                    out[spec.offset + j] = out[spec.offset + j] + s * one(entry)
            passes.append(out)
    return passes


@settings(deadline=None, max_examples=60)
@given(
    weights_of_a_table(),
    st.sampled_from(SIGN_FAMILIES),
    st.integers(1, MOST_CODES),
    st.sampled_from([1, 2000, 2**24]),
    st.integers(1, 4),
    st.booleans(),
)
def test_passes_equal_the_loop_and_so_do_portions(
    made: tuple[Table, Weights], family: Family, codes: int, budget: int, parts: int, baseline: bool
) -> None:
    table, weights = made
    asked = Perturbations(Directions(table, family, (3, 1)), 3, (0.01, -0.01), baseline, 2, lattice=codes)
    expected = [w.tobytes() for w in slow_passes(asked, weights)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(perturb, "BUDGET", budget)  # as many directions at once as fit: one, some, all
        whole = [w.tobytes() for w in asked.weights(weights, np.empty_like(weights))]
    portions = [w.tobytes() for p in asked.split(parts) for w in p.weights(weights, np.empty_like(weights))]
    assert whole == expected == portions


def test_branches_hold_the_stretched_factors() -> None:
    directions = Directions(TABLE, "rank1", (7, 1))
    asked = Perturbations(directions, 2, (0.25, -0.25), baseline=False, lattice=3)
    branch = np.empty(3, np.float32), np.empty(2, np.float32)
    dense = [w.copy() for w in asked.weights(HAND, np.empty_like(HAND))]
    for expected, w in zip(dense, asked.weights(HAND, np.empty_like(HAND), {0: branch}), strict=True):
        assert np.array_equal(w[:6], on_lattice(TABLE, HAND)[:6])
        assert np.array_equal(w[:6] + np.outer(*branch).reshape(-1), expected[:6])
        assert np.array_equal(w[6:], expected[6:])


@settings(deadline=None, max_examples=60)
@given(weights_of_a_table(), st.integers(1, MOST_CODES), st.floats(1e-6, 10), SEED)
def test_unscale_equals_the_loop(made: tuple[Table, Weights], codes: int, sigma: float, seed: int) -> None:
    table, weights = made
    estimated = np.random.default_rng(seed).standard_normal(len(weights)).astype(np.float32)
    expected = estimated.copy()
    for spec in table:
        if spec.matrix is not None:
            for j in range(spec.size):
                scale = row_scales(spec, weights)[j // spec.matrix[1]]
                step = (np.float32(codes) * scale) / np.float32(sigma)
                expected[spec.offset + j] = estimated[spec.offset + j] / step
    assert unscale(table, estimated, weights, sigma, codes).tobytes() == expected.tobytes()


# The estimate on the lattice

QUADRATIC = make_table({"w": (2, 3), "c": (2, 1, 2), "v": (2,)})


def quadratic() -> tuple[Weights, Float64, Float64]:
    """A point whose rows differ a hundredfold, and the loss (w H w) / 2 + b w there."""
    rng = np.random.default_rng(5)
    n = table_size(QUADRATIC)
    square = rng.standard_normal((n, n)) / n**0.5
    point = rng.standard_normal(n) * np.repeat([1.0, 0.05, 2.0, 0.02, 1.0], [3, 3, 2, 2, 2])
    return point.astype(np.float32), square @ square.T, rng.standard_normal(n)


def lattice_task(family: Family, round_: int, num_directions: int, codes: int) -> Task:
    return msgspec.structs.replace(
        TASK,
        round=round_,
        key=12345,
        family=family,
        difference="central",
        num_directions=num_directions,
        sigma=0.02,
        lattice=codes,
        exponents=(-6,),
    )


def lattice_row(task: Task, integers: npt.NDArray[np.int64]) -> Row:
    return Row(
        round=task.round,
        key=task.key,
        applied=True,
        restores=None,
        rollbacks=0,
        family=task.family,
        sharing="shared",
        num_directions=task.num_directions,
        difference=task.difference,
        sigma=task.sigma,
        lattice=task.lattice,
        exponents=task.exponents,
        numbers=task.num_directions,
        bits=bits_of(integers),
        magnitudes=(0,),
        local_steps=1,
        participants=(0,),
        weight_sum=1,
        scalars=pack(integers, bits_of(integers)),
        clipped=0,
        nonfinite=0,
        clip_factor=1.0,
        optimizer="sgd",
        coefficients={"lr": 1.0, "weight_decay": 0.0},
        ema=0.0,
        weights_sha256=b"",
        state_sha256=b"",
    )


def estimates(family: Family, rounds: int, num_directions: int, codes: int) -> tuple[Float64, Float64]:
    """Of the quadratic: the chain of client and server, round after round; and the gradient on the lattice."""
    point, hessian, slope = quadratic()
    found = np.empty((rounds, len(point)))
    for r in range(rounds):
        task = lattice_task(family, r, num_directions, codes)
        passes = perturbations(task, QUADRATIC, 0).weights(point, np.empty_like(point))
        points = np.array([w.astype(np.float64) for w in passes])
        losses = np.einsum("pi,ij,pj->p", points, hessian, points) / 2 + points @ slope
        encoded = encode_scalars(task, finite_differences(task, losses[:, None].astype(np.float32)))
        assert encoded.clipped == encoded.nonfinite == 0
        row = lattice_row(task, encoded.integers[None, None])
        found[r] = unscale(QUADRATIC, estimate(QUADRATIC, row), point, row.sigma, row.lattice)
    return found, hessian @ on_lattice(QUADRATIC, point).astype(np.float64) + slope


def stretches(codes: int) -> Float64:
    """How many times sigma each weight of the quadratic moves: float64[n]."""
    found = np.ones(table_size(QUADRATIC))
    for i, steps in lattice_steps(QUADRATIC, quadratic()[0], 0.02, codes).items():
        found[QUADRATIC[i].slice] = np.repeat(steps, QUADRATIC[i].size // len(steps))
    return found


@pytest.mark.parametrize("codes", [1, 4, 8])
@pytest.mark.parametrize("family", SIGN_FAMILIES)
def test_unbiased_on_a_quadratic_loss(family: Family, codes: int) -> None:
    found, gradient = estimates(family, 60, 50, codes)
    errors = found.std(axis=0, ddof=1) / math.sqrt(len(found))
    assert np.abs((found.mean(axis=0) - gradient) / errors).max() < 5
    stretch = stretches(codes)
    assert stretch[:10].max() > 50 * stretch[:10].min()
    along = found * stretch @ (gradient * stretch) / ((gradient * stretch) ** 2).sum()
    error = along.std(ddof=1) / math.sqrt(len(found))
    assert abs(along.mean() - 1) < 5 * error < 0.15


@pytest.mark.parametrize("family", SIGN_FAMILIES)
def test_the_estimate_converges_to_the_gradient(family: Family) -> None:
    """In units of each row's step, where every entry counts alike: the error falls as 1 / sqrt(K)."""
    stretch = stretches(4)
    for num_directions in (64, 1024):
        found, gradient = estimates(family, 10, num_directions, 4)
        gaps = ((found - gradient) * stretch) ** 2
        relative = math.sqrt(gaps.sum(axis=1).mean() / ((gradient * stretch) ** 2).sum())
        assert relative == pytest.approx(math.sqrt((table_size(QUADRATIC) - 1) / num_directions), rel=0.3)


# Methods


def test_the_task_and_the_row_carry_the_lattice() -> None:
    method = Method(num_directions=2, lattice=3, difference="central", optimizer=bf.sgd(0.5), ema=0.0)
    state = replace(method.init(HAND), round=1)
    task, _ = method.plan(state, TABLE, (5,), 7, None)
    assert (task.lattice, perturbations(task, TABLE, 0).lattice) == (3, 3)
    row = lattice_row(task, np.array([[[900, -400]]]))
    after = replay(state, TABLE, msgspec.structs.replace(row, ema=0.0))
    expected = unscale(TABLE, estimate(TABLE, row), HAND, task.sigma, 3)
    assert np.array_equal(after.weights, HAND - expected)
