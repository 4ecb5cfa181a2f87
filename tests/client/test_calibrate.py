"""Sigma by measurement: errors without a reference, the choice, and training that begins with it."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import baffle as bf
from baffle.client.calibrate import (
    DIRECTIONS,
    LADDER,
    Agreement,
    Calibration,
    calibrate,
    choose,
    compare,
    estimate_errors,
)
from baffle.client.respond import finite_differences, perturbations
from baffle.core.directions import Directions
from baffle.core.method import FIRST_SIGMA
from baffle.core.quantize import lattice_steps, on_lattice, row_scales
from baffle.core.state import State
from baffle.core.types import Difference, Family, Row, Task, Weights
from baffle.data import Dataset
from baffle.engines import Exchange
from baffle.errors import DivergedError
from baffle.models import build
from baffle.protocol.encoding import decode_row
from baffle.runtimes.pytorch.runtime import TorchRuntime
from helpers import TASK, initial_weights, linear

Float64 = npt.NDArray[np.float64]

TRAIN, TEST = bf.load("digits")
INF, NAN = math.inf, math.nan
NUMBER = st.one_of(st.integers(-40, 40).map(lambda i: i / 4), st.sampled_from([0.0, NAN, INF, -INF, 1e30]))


def array(rows: Sequence[Sequence[float]]) -> Float64:
    return np.array(rows, np.float64)


# Errors from disagreement


@pytest.mark.parametrize(
    ("scalars", "expected"),
    [
        ([[6, 8], [3, 4], [3, 4]], [1, 0, 0]),  # |(3, 4)| / |(3, 4)|, then none
        ([[3, 4], [3, 5], [9, 13]], [0.2, 0.2, 10 / math.sqrt(34)]),
        ([[1, 1]], [INF]),
        ([[0, 0]], [INF]),
        ([[0, 0], [0, 0], [0, 0]], [INF, INF, INF]),  # losses that do not move say nothing
        ([[0, 0], [3, 4], [3, 4]], [INF, 0, 0]),
        ([[3, 4], [NAN, 4], [3, 4]], [INF, INF, INF]),
        ([[3, 4], [3, 4], [INF, 4], [-INF, 4]], [0, 0, INF, INF]),
        ([[INF, 0], [INF, 0]], [INF, INF]),
        ([[NAN, NAN]] * 3, [INF] * 3),
    ],
)
def test_errors_by_hand(scalars: Sequence[Sequence[float]], expected: Sequence[float]) -> None:
    assert estimate_errors(array(scalars)).tolist() == pytest.approx(expected)


@given(st.integers(1, 6), st.integers(1, 4), st.data())
def test_errors_equal_the_loop(sigmas: int, directions: int, data: st.DataObject) -> None:
    rows = data.draw(
        st.lists(st.lists(NUMBER, min_size=directions, max_size=directions), min_size=sigmas, max_size=sigmas)
    )

    def gap(a: Sequence[float], b: Sequence[float]) -> float:
        if not np.isfinite([*a, *b]).all():
            return INF
        shorter = min(math.hypot(*a), math.hypot(*b))
        apart = math.hypot(*(x - y for x, y in zip(a, b, strict=True)))
        return apart / shorter if shorter else INF

    errors = estimate_errors(array(rows)).tolist()
    for i, error in enumerate(errors):
        neighbours = [rows[j] for j in (i - 1, i + 1) if 0 <= j < sigmas]
        assert error == pytest.approx(min([gap(rows[i], other) for other in neighbours], default=INF), rel=1e-6)
    assert 0 <= choose(np.array(errors)) < sigmas


# The choice


@pytest.mark.parametrize(
    ("errors", "expected"),
    [
        ([0.9, 0.14, 0.01, 0.02, 0.14, 0.5], 3),
        ([0.1] * 7, 3),
        ([0.0] * 4, 2),
        ([0.14, 0.01, 0.14], 1),
        ([0.1, 0.9], 0),
        ([0.9, 0.1], 1),
        ([0.1, 0.9, 0.05, 0.1, 0.9], 3),  # the run around the smallest, not all that are good
        ([0.9, 0.5, 0.7, 0.8], 2),  # none is good: half as much again as the best one will do
        ([INF], 0),
        ([0.3], 0),
        ([INF, INF, INF], 1),
        ([INF] * 7, 3),
        ([INF, 0.6, INF], 1),
        ([0.1, INF, INF, INF], 0),
    ],
)
def test_choices_by_hand(errors: Sequence[float], expected: int) -> None:
    assert choose(np.array(errors)) == expected


@given(st.lists(st.one_of(st.floats(0, 3), st.just(INF)), min_size=1, max_size=9))
def test_what_is_chosen_is_nearly_the_best(errors: list[float]) -> None:
    best, chosen = min(errors), errors[choose(np.array(errors))]
    assert chosen <= max(0.15, 1.5 * best)


# Agreement with derivatives


def agreements(scalars: Sequence[Sequence[float]], derivatives: Sequence[float]) -> tuple[Agreement, ...]:
    sigmas = tuple(10.0**-i for i in range(len(scalars)))
    made = Calibration(sigmas, array(scalars), estimate_errors(array(scalars)), sigmas[0], 0, 0)
    found = compare(made, np.array(derivatives, np.float64))
    assert tuple(a.sigma for a in found) == sigmas
    return found


@pytest.mark.parametrize(
    ("scalars", "expected"),
    [
        ([3, 4], (1, 1, 0, 0)),
        ([6, 8], (1, 2, 0, 1)),
        ([-3, -4], (-1, -1, 0, 2)),
        ([4, -3], (0, 0, 1, math.sqrt(2))),
        ([7, 1], (1 / math.sqrt(2), 1, 1, 1)),  # the derivatives, and as much at a right angle
        ([0, 0], (0, 0, 0, 1)),
        ([NAN, 4], (0, 0, INF, INF)),
        ([3, INF], (0, 0, INF, INF)),
        ([-INF, INF], (0, 0, INF, INF)),
    ],
)
def test_agreement_by_hand(scalars: Sequence[float], expected: tuple[float, ...]) -> None:
    _, found = agreements([[3, 4], scalars], [3, 4])
    assert (found.correlation, found.slope, found.noise, found.error) == pytest.approx(expected)


@pytest.mark.parametrize("derivatives", [[0, 0], [NAN, 1], [INF, 1]])
def test_nothing_agrees_with_no_derivatives(derivatives: Sequence[float]) -> None:
    for found in agreements([[0, 0], [1, 2]], derivatives):
        assert (found.correlation, found.slope, found.noise, found.error) == (0, 0, INF, INF)


def test_error_is_noise_and_slope_together() -> None:
    rng = np.random.default_rng(0)
    derivatives = rng.standard_normal(20)
    (found,) = agreements([(1.3 * derivatives + 0.2 * rng.standard_normal(20)).tolist()], derivatives.tolist())
    assert found.error**2 == pytest.approx(found.noise**2 + (found.slope - 1) ** 2)
    assert found.correlation == pytest.approx(found.slope / math.hypot(found.slope, found.noise))


# Measuring


def batch(examples: int = 64, seed: int = 1) -> Dataset:
    return TRAIN.take(np.random.default_rng(seed).permutation(len(TRAIN))[:examples])


def derivatives(model: nn.Module, runtime: TorchRuntime, data: Dataset, task: Task, weights: Weights) -> Float64:
    """Along a task's directions, in float64 by backpropagation; on the lattice along the stretched ones."""
    double, k = copy.deepcopy(model).double(), slice(0, task.num_directions)
    drawn = Directions(runtime.table, task.family, (task.key, task.round))
    entries = [drawn.entries(i, k) * drawn.unit for i in range(len(runtime.table))]
    if task.lattice:
        for i, steps in lattice_steps(runtime.table, weights, task.sigma, task.lattice).items():
            entries[i] = entries[i] * np.repeat(steps.astype(np.float64), runtime.table[i].size // len(steps))
        weights = on_lattice(runtime.table, weights)
    with torch.no_grad():
        for spec, p in zip(runtime.table, double.parameters(), strict=True):
            p.copy_(torch.from_numpy(weights[spec.slice].astype(np.float64)).view(spec.shape))
    loss = F.cross_entropy(double(torch.from_numpy(data.inputs().astype(np.float64))), torch.from_numpy(data.y.copy()))
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(double.parameters()))])
    return np.asarray(np.concatenate(entries, axis=1) @ gradient.numpy())


def task_for(difference: Difference, family: Family = "rank1", num_directions: int = DIRECTIONS) -> Task:
    return msgspec.structs.replace(
        TASK, round=0, key=1, family=family, difference=difference, num_directions=num_directions
    )


@pytest.mark.parametrize(("difference", "passes"), [("forward", 17), ("central", 32)])
def test_every_sigma_is_measured_along_the_same_directions(difference: Difference, passes: int) -> None:
    runtime, data = TorchRuntime(linear(), F.cross_entropy, 1), batch(20)
    weights, task = runtime.initial_weights(), task_for(difference, num_directions=3)
    kept = weights.copy()
    found = calibrate(task, runtime, weights, data)
    assert found.sigmas == LADDER
    assert found.scalars.shape == (len(LADDER), DIRECTIONS)
    assert found.forward_passes == len(LADDER) * passes
    assert found.samples_forwarded == len(LADDER) * passes * 20
    assert np.array_equal(weights, kept)
    for sigma, scalars in zip(found.sigmas, found.scalars, strict=True):
        probe = msgspec.structs.replace(task, sigma=sigma, num_directions=DIRECTIONS)
        losses = runtime.losses(weights, perturbations(probe, runtime.table, 0), data)
        assert np.array_equal(scalars, finite_differences(probe, losses))
    assert np.array_equal(found.errors, estimate_errors(found.scalars))
    assert found.sigma == LADDER[choose(found.errors)]
    assert calibrate(task, runtime, weights, data, num_directions=5).scalars.shape == (len(LADDER), 5)


@pytest.mark.parametrize("difference", ["forward", "central"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["mlp", "lenet-small"])
def test_the_guess_is_near_the_error_and_the_choice_is_good(name: str, precision: str, difference: Difference) -> None:
    model = build(name, (1, 8, 8), 10, seed=1)
    runtime, task = TorchRuntime(model, F.cross_entropy, 1, precision=precision), task_for(difference)
    weights, data = runtime.initial_weights(), batch()
    found = calibrate(task, runtime, weights, data)
    compared = compare(found, derivatives(model, runtime, data, task, weights))
    pairs = [(guess, a.error) for guess, a in zip(found.errors, compared, strict=True) if 0.02 <= a.error <= 1]
    assert len(pairs) >= 2
    for guess, error in pairs:
        assert error / 3 < guess < 3 * error
    chosen = compared[found.sigmas.index(found.sigma)]
    assert chosen.correlation >= 0.97
    # both ends of the ladder are wrong in their own way, and the chosen one is better than either
    assert compared[-1].error > 1
    assert chosen.error < compared[-1].error
    if precision == "bf16":
        assert compared[0].noise > 3 * chosen.noise


def test_where_passes_round_more_sigma_is_larger() -> None:
    chosen = []
    for precision in ("fp32", "bf16"):
        runtime = TorchRuntime(build("mlp", (1, 8, 8), 10, seed=1), F.cross_entropy, 1, precision=precision)
        chosen.append(calibrate(task_for("central"), runtime, runtime.initial_weights(), batch()).sigma)
    assert chosen[0] < chosen[1]


@pytest.mark.parametrize("codes", [1, 8])
def test_on_the_lattice_sigma_is_what_most_weights_move_by(codes: int) -> None:
    model = build("lenet-small", (1, 8, 8), 10, seed=1)
    runtime = TorchRuntime(model, F.cross_entropy, 1)
    weights, data = runtime.initial_weights(), batch(16)
    task = msgspec.structs.replace(task_for("central"), lattice=codes)
    found = calibrate(task, runtime, weights, data)
    moves: list[float] = []
    for spec in runtime.table:
        if spec.matrix is not None:
            for scale in row_scales(spec, weights).tolist():
                moves += [codes * scale] * spec.matrix[1]
    assert found.sigmas == (found.sigma,)
    assert found.sigma == float(np.float32(found.sigma)) == pytest.approx(float(np.median(moves)), rel=1e-6)
    assert found.errors.tolist() == [INF]
    assert found.forward_passes == 2 * DIRECTIONS
    asked = msgspec.structs.replace(task, sigma=found.sigma)
    (compared,) = compare(found, derivatives(model, runtime, data, asked, weights))
    assert compared.correlation > 0.97


def test_on_the_lattice_without_matrices_sigma_is_the_ladders_middle() -> None:
    class Shift(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(10))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1)[:, :10] + self.shift

    runtime = TorchRuntime(Shift(), F.cross_entropy, 1)
    task = msgspec.structs.replace(task_for("central"), lattice=2)
    assert calibrate(task, runtime, runtime.initial_weights(), batch(4)).sigmas == (LADDER[3],)


def test_losses_that_say_nothing_give_the_middle() -> None:
    """Constant losses, and losses that are not finite."""
    for factor in (0.0, NAN, INF):
        runtime = TorchRuntime(linear(), lambda output, y, factor=factor: output.sum(1) * 0 + factor, 1)
        found = calibrate(task_for("forward"), runtime, runtime.initial_weights(), batch(4))
        assert found.errors.tolist() == [INF] * len(LADDER)
        assert found.sigma == LADDER[3]


# Training


METHOD = bf.Method(num_directions=4, batch_size=8, optimizer=bf.sgd(0.05, momentum=0.5))


class Watched(bf.LocalEngine):
    """Counts calibrations, and is killed in the middle of a round."""

    calibrations: int = 0
    killed_in: int | None = None
    found: Calibration | None = None

    def calibrate(self, task: Task, participants: Sequence[int], state: State) -> Calibration:
        self.calibrations += 1
        self.found = super().calibrate(task, participants, state)
        return self.found

    def exchange(self, task: Task, participants: Sequence[int], state: State, rows: Sequence[bytes]) -> Exchange:
        if task.round == self.killed_in:
            raise KeyboardInterrupt
        return super().exchange(task, participants, state, rows)


def engine(precision: str = "fp32") -> Watched:
    runtime = TorchRuntime(linear(), F.cross_entropy, 1, precision=precision)
    return Watched(runtime, bf.partition(TRAIN, 3))


def rows_of(run: Path) -> list[Row]:
    return [decode_row(row) for row in bf.Journal.open(run).rows]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_row_carries_the_measured_sigma(precision: str, tmp_path: Path) -> None:
    here = engine(precision)
    run = bf.train(METHOD, here, initial_weights(), rounds=4, out=tmp_path / "run")
    assert here.calibrations == 1
    assert here.found is not None
    assert here.found.sigma in LADDER
    assert {row.sigma for row in rows_of(tmp_path / "run")} == {here.found.sigma}
    assert {record.sigma for record in run.records} == {here.found.sigma}
    assert run.summary()["sigma"] == here.found.sigma
    assert bf.Journal.open(tmp_path / "run").config.method.sigma == "auto"


def test_it_is_the_calibration_of_the_first_batches() -> None:
    """As many participants as make up 64 examples: two of the batches of 40, cut to 64."""
    method = msgspec.structs.replace(METHOD, batch_size=40)
    here = engine()
    bf.train(method, here, initial_weights(), rounds=1)
    state = method.init(initial_weights())
    task, cohort = method.plan(state, here.table, here.sizes, 0, None)
    assert task.sigma == FIRST_SIGMA
    first, second = (here.batch(task, client, 0) for client in list(cohort)[:2])
    data = Dataset(np.concatenate([first.x, second.x[:24]]), np.concatenate([first.y, second.y[:24]]))
    runtime = TorchRuntime(linear(), F.cross_entropy, 1)
    expected = calibrate(task, runtime, state.weights, data)
    assert here.found is not None
    assert np.allclose(here.found.scalars, expected.scalars, rtol=1e-2, atol=1e-3)
    assert here.found.samples_forwarded == expected.samples_forwarded == expected.forward_passes * 64


@pytest.mark.parametrize(("difference", "passes", "measured"), [("forward", 5, 17), ("central", 8, 32)])
def test_round_zero_counts_the_calibration(difference: Difference, passes: int, measured: int) -> None:
    method = msgspec.structs.replace(METHOD, difference=difference)
    auto = bf.train(method, engine(), initial_weights(), rounds=2)
    fixed = bf.train(msgspec.structs.replace(method, sigma=1e-3), engine(), initial_weights(), rounds=2)
    assert [r.forward_passes for r in fixed.records] == [3 * passes] * 3
    assert [r.forward_passes for r in auto.records] == [3 * passes + len(LADDER) * measured, 3 * passes, 3 * passes]
    assert [r.samples_forwarded for r in auto.records] == [
        3 * passes * 8 + len(LADDER) * measured * 24,
        3 * passes * 8,
        3 * passes * 8,
    ]


def test_a_sigma_that_was_given_is_not_measured() -> None:
    here = engine()
    run = bf.train(msgspec.structs.replace(METHOD, sigma=0.02), here, initial_weights(), rounds=2)
    assert here.calibrations == 0
    assert {record.sigma for record in run.records} == {0.02}


@pytest.mark.parametrize("killed_in", [0, 1, 3])
def test_a_killed_run_ends_as_an_undisturbed_one(killed_in: int, tmp_path: Path) -> None:
    straight = bf.train(METHOD, engine(), initial_weights(), rounds=5)
    here = engine()
    here.killed_in = killed_in
    with pytest.raises(KeyboardInterrupt):
        bf.train(METHOD, here, initial_weights(), rounds=5, out=tmp_path / "run", snapshot_every=2)
    assert len(rows_of(tmp_path / "run")) == killed_in
    again = engine()
    run = bf.resume(tmp_path / "run", again)
    assert again.calibrations == (1 if killed_in == 0 else 0)  # what was measured is in the rows
    assert run.weights_sha256 == straight.weights_sha256
    assert np.array_equal(run.average, straight.average)
    assert {row.sigma for row in rows_of(tmp_path / "run")} == {straight.records[0].sigma}
    costs = [(r.forward_passes, r.samples_forwarded, r.bytes_up, r.bytes_down) for r in run.records]
    assert costs == [(r.forward_passes, r.samples_forwarded, r.bytes_up, r.bytes_down) for r in straight.records]


def test_a_run_that_goes_back_keeps_its_sigma(tmp_path: Path) -> None:
    here = engine()
    with pytest.raises(DivergedError, match="the run diverged"):
        bf.train(
            msgspec.structs.replace(METHOD, optimizer=bf.sgd(1e12)),
            here,
            initial_weights(),
            rounds=9,
            out=tmp_path / "run",
        )
    rows = rows_of(tmp_path / "run")
    assert here.found is not None
    assert sum(row.restores is not None for row in rows) > 1
    assert {row.sigma for row in rows} == {here.found.sigma}


@pytest.mark.parametrize("codes", [1, 4])
def test_on_the_lattice_rows_carry_the_sigma_of_the_codes(codes: int, tmp_path: Path) -> None:
    method = msgspec.structs.replace(METHOD, difference="central", lattice=codes)
    here = engine()
    run = bf.train(method, here, initial_weights(), rounds=6, out=tmp_path / "run", snapshot_every=2)
    rows = rows_of(tmp_path / "run")
    scales = row_scales(here.table[0], initial_weights())  # ten rows of 64 weights each
    expected = float(np.float32(codes) * np.median(np.repeat(scales, 64)))
    assert {(row.lattice, row.sigma) for row in rows} == {(codes, expected)}
    assert here.calibrations == 1
    assert run.records[0].forward_passes == 3 * 8 + 2 * DIRECTIONS
    assert (run.summary()["lattice"], run.summary()["sigma"]) == (codes, expected)
    # replay divides by the steps of the codes, and gives the same bits
    assert list(bf.Journal.open(tmp_path / "run").states())[-1].weights.tobytes() == run.weights.tobytes()
    fixed = bf.train(msgspec.structs.replace(method, sigma=0.01), engine(), initial_weights(), rounds=1)
    assert {record.sigma for record in fixed.records} == {0.01}


@pytest.mark.parametrize("codes", [0, 2])
def test_training_learns_with_the_measured_sigma(codes: int) -> None:
    method = bf.Method(
        num_directions=50,
        batch_size=16,
        difference="central",
        lattice=codes,
        optimizer=bf.adam(0.02, schedule=bf.cosine(80)),
    )
    run = bf.train(method, engine(), initial_weights(), rounds=80, test=TEST)
    assert (run.accuracy or 0) > 0.8
