"""A round, end to end: plan, absorb, replay."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import baffle as bf
from baffle.client.respond import local_update, reply
from baffle.core.directions import Directions
from baffle.core.method import Method, examples_per_weight, replay
from baffle.core.rebuild import Execution
from baffle.core.scalars import Encoded, weight_of
from baffle.core.state import State, state_sha256, weights_sha256
from baffle.core.types import (
    FEW_BITS,
    MAX_WEIGHT,
    MAX_WEIGHT_OF_FEW_BITS,
    MAX_WEIGHT_SUM,
    Cohort,
    Integers,
    Reply,
    Row,
    Table,
    Task,
    make_table,
    table_size,
    unpack,
)
from baffle.errors import DivergedError, PlanError

TABLE: Table = make_table({"w": (3, 4), "b": (3,)})
SIZES = (10, 20, 30, 40)


def calibrated(method: Method, state: State) -> tuple[Row, State]:
    """Round 0, with scalars of about the target size."""
    task, cohort = method.plan(state, TABLE, SIZES, 5, None)
    return method.absorb(state, TABLE, task, cohort, answers(task, cohort, scale=1000), None)


def answers(task: Task, cohort: Cohort, scale: int = 1000, seed: int = 0) -> list[Reply]:
    rng = np.random.default_rng(seed)
    integers: Integers = rng.integers(-scale, scale + 1, (len(cohort), task.local_steps, task.num_directions))
    return [
        reply(task, c, weight, [Encoded(step, (222_000,), 0, 0) for step in vectors])
        for (c, weight), vectors in zip(cohort.items(), integers, strict=True)
    ]


def start(method: Method) -> State:
    return method.init(np.linspace(-1, 1, table_size(TABLE)).astype(np.float32))


def test_round_zero_only_calibrates() -> None:
    method = Method(num_directions=8)
    state = start(method)
    row, after = calibrated(method, state)
    assert not row.applied
    assert np.array_equal(after.weights, state.weights)
    assert (after.round, after.step) == (1, 0)


@pytest.mark.parametrize("sharing", ["shared", "per-client"])
@pytest.mark.parametrize("family", ["rank1", "rademacher", "gaussian"])
@pytest.mark.parametrize("optimizer", [bf.sgd(0.1), bf.sgd(0.1, momentum=0.9), bf.adam(0.01), bf.adamw(0.01)], ids=repr)
def test_replay_is_absorb_bit_for_bit(sharing: str, family: str, optimizer: bf.adam) -> None:
    method = msgspec.convert(
        {
            "num_directions": 9,
            "sharing": sharing,
            "family": family,
            "server": [{"type": "clip_update", "max_norm": 0.001}],
        },
        Method,
    )
    method = msgspec.structs.replace(method, optimizer=optimizer)
    last, state = calibrated(method, start(method))
    for seed in range(4):
        task, cohort = method.plan(state, TABLE, SIZES, 5, last)
        assert task.state_sha256 == state_sha256(state)
        row, after = method.absorb(state, TABLE, task, cohort, answers(task, cohort, seed=seed), last)
        assert row.applied
        assert row.clip_factor < 1
        for execution in (Execution(), Execution(threads=2, block=3), Execution(slow=True)):
            again = replay(state, TABLE, row, execution)
            assert state_sha256(again) == state_sha256(after) == row.state_sha256
            assert again.ema_weights.tobytes() == after.ema_weights.tobytes()
        assert row.weights_sha256 == weights_sha256(after.weights)
        assert not np.array_equal(after.weights, state.weights)
        last, state = row, after


def test_sgd_round_by_hand() -> None:
    table = make_table({"b": (2,)})
    method = Method(num_directions=1, family="rademacher", optimizer=bf.sgd(0.5), ema=0.0)
    state = method.init(np.array([1, 1], np.float32))
    state = State(1, 0, state.weights, state.slots, state.ema_weights)
    last = msgspec.structs.replace(calibrated(Method(num_directions=8), start(Method()))[0], applied=True)
    task, cohort = method.plan(state, table, (3, 1), 5, last)
    task = msgspec.structs.replace(task, exponents=(-3,))
    replies = [
        reply(task, 0, 3, [Encoded(np.array([8]), (0,), 0, 0)]),
        reply(task, 1, 1, [Encoded(np.array([-8]), (0,), 0, 0)]),
    ]
    row, after = method.absorb(state, table, task, cohort, replies, last)
    signs = Directions(table, "rademacher", (5, 1)).entries(0, slice(0, 1))[0]
    # mean scalar (3 * 1 - 1 * 1) / 4 = 0.5 along the direction, learning rate 0.5
    assert after.weights.tolist() == (1 - 0.25 * signs).tolist()
    assert (row.weight_sum, row.integers.tolist()) == (1, [[[4]]])  # 16 over 4, without their common factor


def test_a_round_without_a_finite_scalar_changes_nothing() -> None:
    method = Method(num_directions=4)
    last, state = calibrated(method, start(method))
    task, cohort = method.plan(state, TABLE, SIZES, 5, last)
    lost = [reply(task, c, w, [Encoded(np.zeros(4, np.int64), (0,), 0, 4)]) for c, w in cohort.items()]
    row, after = method.absorb(state, TABLE, task, cohort, lost, last)
    assert not row.applied
    assert after.weights.tobytes() == state.weights.tobytes()
    assert (after.round, after.step) == (state.round + 1, state.step)


def test_an_update_to_infinity_is_refused() -> None:
    method = Method(num_directions=4, optimizer=bf.sgd(1e38))
    last, state = calibrated(method, start(method))
    task, cohort = method.plan(state, TABLE, SIZES, 5, last)
    with pytest.raises(DivergedError, match=r"round 1: the update .* would bring the weights near overflow"):
        method.absorb(state, TABLE, msgspec.structs.replace(task, exponents=(30,)), cohort, answers(task, cohort), last)


def test_initial_weights_must_be_finite() -> None:
    with pytest.raises(DivergedError, match="initial weights"):
        Method().init(np.array([1, math.nan], np.float32))


def test_participants_are_sampled_by_round() -> None:
    method = Method(participation=0.5)
    state = start(method)
    cohorts = []
    for r in range(200):
        _, cohort = method.plan(State(r, 0, state.weights, state.slots, state.ema_weights), TABLE, SIZES, 5, None)
        assert len(cohort) == 2
        assert list(cohort) == sorted(cohort)
        cohorts.append(list(cohort))
    counts = np.bincount(np.array(cohorts).reshape(-1), minlength=4)
    assert counts.min() > 60  # 100 expected of 200
    assert Method(participation=1e-9).plan(state, TABLE, SIZES, 5, None)[1] in [{0: 10}, {1: 20}, {2: 30}, {3: 40}]


@pytest.mark.parametrize("participants", [1, 10, 514, 515, 5000, MAX_WEIGHT_SUM])
@pytest.mark.parametrize("largest", [1, 255, 256, 6000, 10**7])
def test_weights_always_fit_their_four_bytes(participants: int, largest: int) -> None:
    quantum = examples_per_weight(largest, participants)
    weight = max(1, (largest + quantum // 2) // quantum)
    assert weight <= MAX_WEIGHT
    assert weight * participants <= MAX_WEIGHT_SUM
    if quantum > 1:  # no finer quantum would do
        finer = (largest + quantum // 4) // (quantum // 2)
        assert finer > MAX_WEIGHT or finer * participants > MAX_WEIGHT_SUM


@pytest.mark.parametrize("bits", [1, FEW_BITS, FEW_BITS + 1, 15])
@given(sizes=st.lists(st.integers(1, 10**6), min_size=1, max_size=40))
def test_every_client_has_its_share_of_the_weight_to_half_a_unit(bits: int, sizes: list[int]) -> None:
    unit = examples_per_weight(max(sizes), len(sizes), bits)
    most = MAX_WEIGHT_OF_FEW_BITS if bits <= FEW_BITS else MAX_WEIGHT
    weights = [weight_of(size, unit) for size in sizes]
    assert max(weights) <= most
    assert unit == 1 or 2 * max(weights) >= most  # the weight's range is used
    for size, weight in zip(sizes, weights, strict=True):
        assert abs(weight * unit - size) <= unit / 2 or (weight, size < unit) == (1, True)


def test_clients_of_very_different_sizes_weigh_nearly_what_they_have() -> None:
    sizes = [5, 27, 46, 56, 61, 92, 151, 262, 369, 369]  # ten clients of digits, Dirichlet 0.1
    unit = examples_per_weight(max(sizes), len(sizes), 8)
    weights = [weight_of(size, unit) for size in sizes]
    assert (unit, weights) == (32, [1, 1, 1, 2, 2, 3, 5, 8, 12, 12])
    shares = [w / sum(weights) - s / sum(sizes) for w, s in zip(weights, sizes, strict=True)]
    assert sum(map(abs, shares)) / 2 < 0.03  # of the weight is with other clients than it should be


@pytest.mark.parametrize(("batch", "sizes", "smallest"), [(4, (10, 20), 4), (16, (10, 5), 5), (None, (7, 30), 7)])
def test_more_slices_than_examples_are_refused_when_planned(
    batch: int | None, sizes: tuple[int, ...], smallest: int
) -> None:
    method = Method(slices=8, batch_size=batch)
    with pytest.raises(PlanError, match=f"slices = 8 with a mini-batch of {smallest} examples"):
        method.plan(start(method), TABLE, sizes, 5, None)
    method = Method(slices=smallest, batch_size=batch)
    assert method.plan(start(method), TABLE, sizes, 5, None)[0].slices == smallest


def test_too_many_participants_are_refused() -> None:
    with pytest.raises(PlanError, match="expected at most 131071"):
        examples_per_weight(1, MAX_WEIGHT_SUM + 1)


def test_a_plan_that_cannot_be_exact_is_refused() -> None:
    method = Method(num_directions=2**20, family="gaussian", local_steps=50, optimizer=bf.sgd(0.1))
    with pytest.raises(PlanError, match=r"expected < 2\*\*53"):
        method.plan(start(method), TABLE, SIZES, 5, None)


@pytest.mark.parametrize("participation", [0.25, 0.5, 1.0])
def test_exactness_is_of_the_heaviest_clients_that_may_meet(
    participation: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = (7, 300, 2, 90, 90, 1000, 1, 40)
    told: list[int] = []
    monkeypatch.setattr("baffle.core.method.check_exact", lambda *arguments: told.append(arguments[3]))
    task, _ = Method(participation=participation).plan(start(Method()), TABLE, sizes, 5, None)
    weights = sorted((weight_of(size, task.quantum) for size in sizes), reverse=True)
    assert told == [sum(weights[: round(participation * len(sizes))])]


def test_plain_sgd_with_local_steps_is_federated_averaging() -> None:
    method = Method(num_directions=6, local_steps=3, optimizer=bf.sgd(0.3))
    last, state = calibrated(method, start(method))
    task, cohort = method.plan(state, TABLE, SIZES, 5, last)
    assert task.local_lr == float(np.float32(0.3 / 3))
    replies = answers(task, cohort)
    _, after = method.absorb(state, TABLE, task, cohort, replies, last)
    expected = np.zeros(table_size(TABLE))
    for answer in replies:
        weights = state.weights
        vectors = unpack(answer.scalars, task.bits, 18).reshape(3, 6)
        for step, integers in enumerate(vectors):
            weights = local_update(task, TABLE, weights, Encoded(integers, (0,), 0, 0), step, Execution())
        expected += answer.weight * weights.astype(np.float64)
    assert np.allclose(after.weights, expected / sum(SIZES), atol=1e-6)


def test_lists_of_clippers_are_welcome() -> None:
    method = Method(client=[bf.clip_scalars(2.0), bf.clip_scalars(1.0)], server=[])  # type: ignore[arg-type]  # on purpose
    assert isinstance(method.client, tuple)
    last, state = calibrated(method, start(method))
    assert method.plan(state, TABLE, SIZES, 5, None)[0].clip is None  # calibration measures what there is
    assert method.plan(state, TABLE, SIZES, 5, last)[0].clip == 1.0


def test_numbers_encode_alike_however_they_were_written() -> None:
    whole = Method(sigma=1, participation=1, ema=0, optimizer=bf.sgd(lr=1), server=(bf.clip_update(1),))
    dotted = Method(sigma=1.0, participation=1.0, ema=0.0, optimizer=bf.sgd(lr=1.0), server=(bf.clip_update(1.0),))
    assert msgspec.msgpack.encode(whole) == msgspec.msgpack.encode(dotted)
    assert msgspec.json.decode(msgspec.json.encode(whole), type=Method) == whole
