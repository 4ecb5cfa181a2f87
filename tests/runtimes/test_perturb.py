"""Perturbed weights: every pass writes what the obvious form gives, in any layout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baffle.core.directions import Directions
from baffle.core.quantize import lattice_steps, on_lattice, row_scales
from baffle.core.types import Family, Table, Weights, make_table, table_size
from baffle.errors import PlanError
from baffle.runtimes import perturb
from baffle.runtimes.perturb import AnyArray, Block, Float32, Kind, Layout, Pass, Perturbations, Point, unperturbed
from layouts import rounded, settled, widened

HAND = make_table({"w": (2, 2), "b": (2,)})


DIRECTIONS = Directions(HAND, "rank1", (7, 1))  # of w (-1, -1, 1, 1)


def held(layouts: list[Layout], weights: list[float], step: float, tensor: int, dtype: type[np.generic]) -> list[float]:
    point = Point(Perturbations(DIRECTIONS, 1, (step,), 0), np.array(weights, np.float32), layouts)
    memory = np.zeros(HAND[tensor].shape, dtype)
    for evaluated in point.passes(Perturbations(DIRECTIONS, 1, (step,), 0)):
        evaluated.write(tensor, memory)
    return [float(v) for v in (widened(memory) if dtype is np.uint16 else memory).reshape(-1)]


FAMILIES: list[Family] = ["rank1", "rademacher", "gaussian"]


DTYPES: dict[str, type[np.generic]] = {"fp32": np.float32, "bf16": np.uint16, "fp16": np.uint16, "int8": np.int8}


SPECIAL = [np.nan, np.inf, -np.inf, 1e6, -65520, 65519, 3.3895e38, -3.4e38, 1e-45, 6e-8, 0.0]


DIMENSION = st.integers(1, 6)


SHAPE = st.one_of(
    st.tuples(DIMENSION, DIMENSION),
    st.tuples(DIMENSION, st.just(130)),
    st.tuples(DIMENSION, DIMENSION, st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.sampled_from([1, 8, 257])),
    st.sampled_from([(), (0,), (0, 3), (3, 0), (2, 0, 1, 2)]),
)


SEED = st.integers(0, 2**32 - 1)


BUDGETS = st.sampled_from([1, 300, 2000, None])


LIMITS = st.tuples(st.sampled_from([0, 2**16]), st.sampled_from([1, 20, 2**18]))  # of what is kept, and made in one go


@dataclass(frozen=True)
class Problem:
    """What is asked, of which weights, into which layouts."""

    asked: Perturbations
    weights: Weights
    layouts: tuple[Layout, ...]

    @property
    def table(self) -> Table:
        return self.asked.directions.table


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Tensors of any shape, pruned or not, of any kind and order; where the kind allows it, with values at its ends."""
    shapes = {f"t{i}": shape for i, shape in enumerate(draw(st.lists(SHAPE, min_size=1, max_size=4)))}
    rng = np.random.default_rng(draw(SEED))
    masks = {name: rng.random(shape) < 0.6 for name, shape in shapes.items() if draw(st.booleans())}
    table = make_table(shapes, {name: np.asarray(mask) for name, mask in masks.items()})
    family = draw(st.sampled_from(FAMILIES))
    lattice = 0 if family == "gaussian" else draw(st.sampled_from([0, 0, 1, 8]))
    weights = (rng.standard_normal(table_size(table)) * 10.0 ** rng.integers(-6, 3)).astype(np.float32)
    layouts = []
    for spec in table:
        kinds: list[Kind] = ["fp32", "bf16", "fp16"]
        kinds += ["int8"] if spec.matrix else []
        kinds += [] if spec.kept else ["branch"]
        kind = draw(st.sampled_from(kinds))
        coded = kind == "int8" or (kind == "branch" and spec.matrix is not None and draw(st.booleans()))
        own = weights[spec.slice]
        if not lattice and not coded and draw(st.booleans()):
            own[rng.random(spec.size) < 0.2] = rng.choice(SPECIAL)
        if spec.mask is not None:
            own[~spec.mask] = 0
        axes = None
        if len(spec.shape) >= 2 and draw(st.booleans()):
            axes = (0, *draw(st.permutations(range(1, len(spec.shape)))))
        layouts.append(Layout(kind, axes, row_scales(spec, weights) if coded else None))
    sigma, central = draw(st.floats(1e-6, 10)), draw(st.booleans())
    asked = Perturbations(
        Directions(table, family, (draw(SEED), 1), draw(st.integers(0, 3))),
        draw(st.integers(1, 6)),
        (sigma, -sigma) if central else (sigma,),
        draw(st.integers(0, 3)),
        draw(st.sampled_from([0, 5])),
        lattice,
    )
    weights.setflags(write=False)
    return Problem(asked, weights, tuple(layouts))


def move_of(problem: Problem, tensor: int, k: int, step: float) -> Float32:
    """Step times the entries of direction k, on the lattice stretched row by row: float32[size]."""
    asked, spec = problem.asked, problem.table[tensor]
    entries = asked.directions.entries(tensor, slice(k, k + 1))[0] * np.float32(asked.directions.unit)
    steps = np.full(spec.size, step, np.float32)
    if asked.lattice and spec.matrix is not None:
        rows = lattice_steps(problem.table, problem.weights, max(asked.steps), asked.lattice)[tensor]
        steps *= np.repeat(rows, spec.matrix[1])
    return np.asarray(steps * entries, np.float32)


def in_order(problem: Problem, tensor: int, values: AnyArray) -> AnyArray:
    """Flat values as the layout wants them, in the tensor's own number of dimensions."""
    shaped = values.reshape(problem.table[tensor].shape)
    axes = problem.layouts[tensor].axes
    return shaped if axes is None else shaped.transpose(axes)


def expected(problem: Problem, tensor: int, k: int | None, step: float) -> tuple[bytes, bytes]:
    """What a pass is to write into a layout, and the product of its branch."""
    asked, spec, layout = problem.asked, problem.table[tensor], problem.layouts[tensor]
    weights = on_lattice(problem.table, problem.weights) if asked.lattice else problem.weights
    base, move = weights[spec.slice], np.zeros(spec.size, np.float32)
    if k is not None:
        move = move_of(problem, tensor, k, step)
    branch = move if layout.kind == "branch" and asked.directions.is_rank1(tensor) else np.zeros_like(move)
    made = base if layout.kind == "branch" or k is None else base + move
    return (
        settled(layout, rounded(layout, in_order(problem, tensor, made))),
        settled(Layout(), in_order(problem, tensor, branch)),
    )


def wrote(problem: Problem, evaluated: Pass, tensor: int) -> list[tuple[bytes, bytes]]:
    """What a pass writes into memory that held something else, and the product of its branch; one a direction."""
    spec, layout = problem.table[tensor], problem.layouts[tensor]
    lead = (evaluated.k.stop - evaluated.k.start,) if isinstance(evaluated.k, slice) else ()
    dtype = np.int8 if layout.scales is not None else DTYPES.get(layout.kind, np.float32)
    memory = np.full((*lead, *in_order(problem, tensor, np.zeros(spec.size)).shape), 77, dtype)
    out, rest = spec.matrix or (1, 1)
    left, right = np.full((*lead, out), 7, np.float32), np.full((*lead, rest), 7, np.float32)
    evaluated.write(tensor, memory)
    products = np.zeros((*lead, spec.size), np.float32)
    if layout.kind == "branch":
        evaluated.branch(tensor, left, right)
        made = left[..., :, None] * right[..., None, :]
        if spec.matrix is None:
            assert not made.any()
        else:
            products = made + np.float32(0)
    rows = zip(memory, products, strict=True) if lead else [(memory, products)]
    return [(settled(layout, m), settled(Layout(), p)) for m, p in rows]


@contextmanager
def limited(kept: int, whole: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(perturb, "_KEPT", kept)
        patch.setattr(perturb, "_WHOLE", whole)
        yield


def numbered(part: Perturbations) -> list[tuple[int | None, float]]:
    """The passes of a portion, in order: the direction's number (None without one) and the step."""
    ks = range(part.first, part.first + part.num_directions)
    return [(None, 0.0)] * part.baseline + [(k, step) for k in ks for step in part.steps]


@settings(deadline=None, max_examples=150)
@given(problems(), BUDGETS, LIMITS, st.integers(1, 9))
def test_passes_write_what_the_obvious_form_gives(
    problem: Problem, budget: int | None, limits: tuple[int, int], parts: int
) -> None:
    before = problem.weights.tobytes()
    with limited(*limits):
        point = Point(problem.asked, problem.weights, problem.layouts)
        passes = [p for part in problem.asked.split(parts) for p in point.passes(part, budget)]
        for evaluated, (k, step) in zip(passes, numbered(problem.asked), strict=True):
            for i in range(len(problem.table)):
                assert wrote(problem, evaluated, i) == [expected(problem, i, k, step)]
    assert problem.weights.tobytes() == before


@settings(deadline=None, max_examples=100)
@given(problems(), BUDGETS, LIMITS, st.integers(1, 6), st.data())
def test_blocks_write_many_directions_at_once(
    problem: Problem, budget: int | None, limits: tuple[int, int], most: int, data: st.DataObject
) -> None:
    first, done = problem.asked.first, 0
    with limited(*limits):
        point = Point(problem.asked, problem.weights, problem.layouts)
        for block in point.blocks(problem.asked, budget, most):
            assert 1 <= block.size <= most
            start = data.draw(st.integers(0, block.size - 1))
            stop = data.draw(st.integers(start + 1, block.size))
            for step in problem.asked.steps:
                evaluated = Pass(point, block, slice(start, stop), np.float32(step))
                ks = range(first + done + start, first + done + stop)
                for i in range(len(problem.table)):
                    assert wrote(problem, evaluated, i) == [expected(problem, i, k, step) for k in ks]
            done += block.size
    assert done == problem.asked.num_directions


@settings(deadline=None, max_examples=60)
@given(problems(), BUDGETS, st.integers(1, 9))
def test_flat_weights_are_those_of_every_portion(problem: Problem, budget: int | None, parts: int) -> None:
    """Perturbations.weights: one vector after another in one scratch buffer."""
    flat = replace(problem, layouts=tuple(Layout() for _ in problem.table))
    scratch = np.full_like(problem.weights, 77)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(perturb, "BUDGET", budget or perturb.BUDGET)
        found = []
        for part in problem.asked.split(parts):
            for w in part.weights(problem.weights, scratch):
                assert w is scratch
                found.append(settled(Layout(), w))
    assert found == [
        b"".join(expected(flat, i, k, step)[0] for i in range(len(flat.table))) for k, step in numbered(problem.asked)
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_and_backward_step_lie_around_the_weights(family: Family) -> None:
    """At zero they are exact negatives, and 2**-10 times the entries for sigma = 2**-10."""
    directions = Directions(make_table({"w": (3, 4), "b": (4,), "s": ()}), family, (1, 2))
    zero, scratch = np.zeros(17, np.float32), np.empty(17, np.float32)
    asked = Perturbations(directions, 2, (2**-10, -(2**-10)), baseline=0)
    passes = [w.copy() for w in asked.weights(zero, scratch)]
    for k in (0, 1):
        entries = np.concatenate([directions.entries(i, slice(k, k + 1))[0] for i in range(3)])
        assert np.array_equal(passes[2 * k], entries * directions.unit * 2**-10)
        assert np.array_equal(passes[2 * k + 1], -passes[2 * k])


def test_an_entry_is_rounded_once_in_the_sum() -> None:
    """bfloat16 has steps of 1/128 from 1 on and of 1/256 below: a half of one goes to the even one."""
    layouts = [Layout("bf16"), Layout("fp16")]
    weights = [1.0, 1.0, 1.0, 1.0078125, 0.0, 0.0]
    assert held(layouts, weights, 2**-8, 0, np.uint16) == [1 - 2**-8, 1 - 2**-8, 1.0, 1.015625]
    assert held(layouts, weights, 2**-9, 0, np.uint16) == [1.0, 1.0, 1.0, 1.0078125]


def test_codes_move_by_what_a_step_is_of_their_scale() -> None:
    layouts = [Layout("int8", scales=np.array([0.5, 2], np.float32)), Layout()]
    assert held(layouts, [1, -1, 4, 252, 0, 0], 2.0, 0, np.int8) == [-2, -6, 3, 127]


def test_the_order_of_memory_is_that_of_the_axes() -> None:
    """Channels last: the second dimension goes behind the others."""
    table = make_table({"w": (1, 2, 1, 3)})
    asked = Perturbations(Directions(table, "rademacher", (1, 1)), 1, (0.25,), 1)
    point = Point(asked, np.arange(6, dtype=np.float32), [Layout(axes=(0, 2, 3, 1))])
    memory = np.empty((1, 1, 3, 2), np.float32)
    plain, perturbed = point.passes(asked)
    plain.write(0, memory)
    assert memory.reshape(-1).tolist() == [0, 3, 1, 4, 2, 5]
    perturbed.write(0, memory)
    signs = asked.directions.entries(0, slice(0, 1))[0]
    assert memory.reshape(-1).tolist() == (np.arange(6) + signs / 4)[[0, 3, 1, 4, 2, 5]].tolist()


def test_a_branch_of_a_pruned_tensor_is_refused() -> None:
    table = make_table({"v": (2,), "w": (2, 2)}, {"w": np.eye(2, dtype=bool)})
    asked = Perturbations(Directions(table, "rank1", (7, 1)), 1, (0.1,), 1)
    with pytest.raises(PlanError, match="w: pruned, with a rank-1 branch"):
        Point(asked, np.zeros(6, np.float32), [Layout(), Layout("branch")])
    factors = np.empty(2, np.float32), np.empty(2, np.float32)
    with pytest.raises(PlanError, match="w: pruned"):
        next(asked.weights(np.zeros(6, np.float32), np.empty(6, np.float32), {1: factors}))


def test_one_slot_a_tensor() -> None:
    with pytest.raises(ValueError, match="shorter"):
        Point(unperturbed(HAND), np.zeros(6, np.float32), [Layout()])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_table_without_tensors_has_passes_of_nothing(family: Family) -> None:
    asked = Perturbations(Directions((), family, (7, 1)), 3, (0.1, -0.1), 2)
    assert [w.size for w in asked.weights(np.empty(0, np.float32), np.empty(0, np.float32))] == [0] * 8


@pytest.mark.parametrize(
    ("family", "a_direction"), [("rank1", 4 * 150 + 8), ("rademacher", 5000 // 8 + 8), ("gaussian", 2 * 5064)]
)
def test_blocks_fit_their_budget(family: Family, a_direction: int) -> None:
    asked = Perturbations(Directions(make_table({"w": (100, 50), "b": (64,)}), family, (7, 1)), 7, (0.1,), 1)
    point = Point(asked, np.zeros(5064, np.float32), [Layout(), Layout()])

    def sizes(budget: int, most: int | None = None) -> list[int]:
        return [block.size for block in point.blocks(asked, budget, most)]

    assert sizes(3 * a_direction) == [3, 3, 1]
    assert sizes(3 * a_direction - 1) == [2, 2, 2, 1]
    assert sizes(3 * a_direction, most=2) == [2, 2, 2, 1]
    assert sizes(1) == [1] * 7
    assert sizes(100 * a_direction) == [7]


def test_workers_share_a_point_and_draw_their_own_blocks() -> None:
    asked = Perturbations(DIRECTIONS, 4, (0.5,), 0)
    point = Point(asked, np.zeros(6, np.float32), [Layout(), Layout()])
    a, b = Block(point, slice(0, 4)), Block(point, slice(2, 4))
    for k in (0, 1):
        found = [np.empty(4, np.float32) for _ in range(2)]
        Pass(point, a, 2 + k, np.float32(0.5)).write(0, found[0])
        Pass(point, b, k, np.float32(0.5)).write(0, found[1])
        assert np.array_equal(found[0], found[1])


@given(st.integers(0, 9), st.integers(0, 9), st.integers(1, 2), st.integers(1, 12), st.sampled_from([0, 5]))
def test_portions_keep_every_pass_in_order(baseline: int, directions: int, steps: int, parts: int, first: int) -> None:
    whole = Perturbations(DIRECTIONS, directions, (0.5, -0.5)[:steps], baseline, first, lattice=2)
    portions = whole.split(parts)
    assert [p for part in portions for p in numbered(part)] == numbered(whole)
    assert [len(part) for part in portions] == [len(numbered(part)) for part in portions]
    assert len(portions) <= parts
    assert all(len(part) and part.lattice == 2 for part in portions)
    shares = [part.num_directions if directions else part.baseline for part in portions]
    alone = bool(directions) and baseline > 0 and portions[0].num_directions == 0  # the baseline has a worker
    assert max(shares, default=0) - min(shares[alone:], default=0) <= 1


def test_a_baseline_is_a_count_of_passes() -> None:
    asked = Perturbations(DIRECTIONS, 0, (), 5)
    assert len(asked) == 5
    assert [part.baseline for part in asked.split(2)] == [2, 3]
    weights = np.arange(6, dtype=np.float32)
    assert [w.tolist() for w in asked.weights(weights, np.empty_like(weights))] == [weights.tolist()] * 5
    assert len(unperturbed(HAND)) == 1
