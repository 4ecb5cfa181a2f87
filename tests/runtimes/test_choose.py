"""Choosing how to evaluate: what is measured, what the margin decides, and what is told, by a clock that tests move."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, repeat
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import baffle as bf
from baffle.core.types import Losses, Table, Weights, make_table
from baffle.data import Dataset, load, partition
from baffle.errors import DataError, MissingExtraError, ModelError, OptionError, PlanError
from baffle.runtimes import Evaluation, Runtime
from baffle.runtimes import choose as choosing
from baffle.runtimes.choose import MARGIN, Choice, choose
from baffle.runtimes.perturb import Perturbations
from baffle.training import build as assemble
from baffle.training.options import TrainConfig
from helpers import linear

fit = sys.modules["baffle.training.fit"]  # the name in the package is the function's
BATCH = Dataset(np.zeros((6, 2), np.float32), np.zeros(6, np.int64))
TURNS = 4


class World:
    """A clock, and what was asked of whom."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.asked = 0.0, list[tuple[str, Perturbations, Dataset]]()
        monkeypatch.setattr(choosing, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def make(self, name: str, *seconds: float, fails: Exception | None = None) -> Callable[[], Runtime]:
        """A runtime that takes so many seconds a pass in each call, the last of them in all that follow."""
        return lambda: Scripted(self, name, seconds, fails)

    def of(self, name: str) -> list[Perturbations]:
        """What a runtime was asked."""
        return [asked for n, asked, _ in self.asked if n == name]


class Scripted:
    """A runtime that moves the clock."""

    def __init__(self, world: World, name: str, seconds: Sequence[float], fails: Exception | None) -> None:
        self._world, self._name, self._fails = world, name, fails
        self._seconds: Iterator[float] = chain(seconds, repeat(seconds[-1]))
        self.table: Table = make_table({"w": (2, 3)})
        self.plan: dict[str, str | int] = {"runtime": name}

    def initial_weights(self) -> Weights:
        return np.zeros(6, np.float32)

    def losses(self, weights: Weights, perturbations: Perturbations, batch: Dataset) -> Losses:
        if self._fails is not None:
            raise self._fails
        self._world.asked.append((self._name, perturbations, batch))
        self._world.now += next(self._seconds) * len(perturbations)
        return np.zeros((len(perturbations), len(batch)), np.float32)

    def evaluate(self, weights: Weights, data: Dataset) -> Evaluation:
        raise AssertionError("it is passes that count")


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


# --- the margin


@pytest.mark.parametrize(
    ("other", "margin", "taken"),
    [
        (4.0, MARGIN, "usual"),
        (3.0, MARGIN, "usual"),
        (2.5, MARGIN, "usual"),  # faster, but within the margin
        (2.0, MARGIN, "other"),  # exactly the margin
        (1.0, MARGIN, "other"),
        (2.5, 1.0, "other"),  # without a margin the faster one
        (3.0, 1.0, "usual"),  # as fast as the usual way
        (1.0, 3.5, "usual"),
    ],
)
def test_another_way_has_to_be_faster_by_the_margin(world: World, other: float, margin: float, taken: str) -> None:
    ways = {"usual": world.make("usual", 3.0), "other": world.make("other", other)}
    choice = choose(ways, BATCH, margin=margin)
    assert choice.name == taken
    assert choice.runtime.plan == {"runtime": taken}
    assert choice.rates == pytest.approx({"usual": 1 / 3, "other": 1 / other})
    assert list(choice.rates) == ["usual", "other"]


@given(
    costs=st.lists(st.integers(1, 40), min_size=2, max_size=5),
    margin=st.sampled_from([1.0, 1.25, 1.5, 2.0]),
)
def test_the_choice_is_that_of_the_definition(costs: list[int], margin: float) -> None:
    with pytest.MonkeyPatch.context() as patch:
        world = World(patch)
        ways = {str(i): world.make(str(i), cost) for i, cost in enumerate(costs)}
        choice = choose(ways, BATCH, margin=margin)
    fastest = min(costs)
    assert choice.name == ("0" if costs[0] < margin * fastest else str(costs.index(fastest)))


def test_a_turn_that_was_disturbed_does_not_count(world: World) -> None:
    noisy = world.make("usual", 900.0, 900.0, 2.0, 900.0, 900.0)  # the first call prepares
    choice = choose({"usual": noisy, "other": world.make("other", 1.5)}, BATCH)
    assert choice.name == "usual"
    assert choice.rates["usual"] == pytest.approx(1 / 2)


def test_what_preparing_takes_does_not_count(world: World) -> None:
    choice = choose({"usual": world.make("usual", 2.0), "other": world.make("other", 900.0, 1.0)}, BATCH)
    assert choice.name == "other"
    assert choice.rates == pytest.approx({"usual": 1 / 2, "other": 1.0})


def test_where_turns_are_short_there_are_more_of_them(world: World) -> None:
    usual = world.make("usual", *[1e-3] * 30, 1e-4)  # something else took the processor for long
    choice = choose({"usual": usual, "other": world.make("other", 1.1e-4)}, BATCH, num_directions=4, seconds=0.1)
    assert choice.name == "usual"
    assert choice.rates == pytest.approx({"usual": 1e4, "other": 1e4 / 1.1})
    assert len(world.of("usual")) == len(world.of("other")) == 1 + 32


def test_turns_end_when_they_have_taken_their_time(world: World) -> None:
    choose({"a": world.make("a", 0.003), "b": world.make("b", 0.003)}, BATCH, num_directions=8, seconds=0.1)
    assert len(world.of("a")) == 1 + 17  # of 24 ms each, and four times 0.1 s for either


# --- what is measured


def test_ways_are_measured_in_turn_on_the_batch(world: World) -> None:
    choose({"a": world.make("a", 1.0), "b": world.make("b", 1.0)}, BATCH, family="rademacher")
    assert [name for name, _, _ in world.asked] == ["a", "b"] * (1 + TURNS)
    assert all(batch is BATCH for _, _, batch in world.asked)
    assert {asked.directions.family for _, asked, _ in world.asked} == {"rademacher"}
    assert {(asked.baseline, len(asked.steps)) for _, asked, _ in world.asked} == {(0, 1)}


@pytest.mark.parametrize(
    ("cost", "num_directions", "passes"),
    [
        (0.01, 100, [2, 8, 10, 10, 10]),  # as many as take the seconds
        (0.0001, 100, [2, 8, 100, 100, 100]),  # never more than a round has
        (1.0, 100, [2, 8, 4, 4, 4]),  # never fewer than four
        (1.0, 3, [2, 3, 3, 3, 3]),
        (0.0001, 1, [2, 1, 1, 1, 1]),
    ],
)
def test_passes_take_about_the_seconds(world: World, cost: float, num_directions: int, passes: list[int]) -> None:
    cost *= 1 - 2**-20  # so that a quotient is not just below a whole number
    ways = {"a": world.make("a", cost), "b": world.make("b", 1.0)}
    choose(ways, BATCH, num_directions=num_directions, seconds=0.1)
    assert [asked.num_directions for asked in world.of("a")] == passes


def test_one_candidate_is_tried_and_not_measured(world: World) -> None:
    choice = choose({"usual": world.make("usual", 1.0)}, BATCH)
    assert (choice.name, choice.rates) == ("usual", {})
    assert [asked.num_directions for asked in world.of("usual")] == [2]


# --- what does not work here

DO_NOT_WORK = [
    MissingExtraError("not installed"),
    ModelError("cannot be exported"),
    OptionError("precision", "bf16", "one that this processor has"),
    PlanError("memory"),
]


def failing(error: Exception) -> Callable[[], Runtime]:
    def make() -> Runtime:
        raise error

    return make


@pytest.mark.parametrize("error", DO_NOT_WORK, ids=lambda e: type(e).__name__)
def test_one_that_fails_is_left_out(world: World, error: Exception) -> None:
    ways = {
        "usual": world.make("usual", 3.0),
        "unmade": failing(error),
        "other": world.make("other", 1.0),
        "fails": world.make("fails", 0.5, fails=error),
    }
    choice = choose(ways, BATCH)
    assert choice.name == "other"
    assert choice.rates == pytest.approx({"usual": 1 / 3, "other": 1.0})


@pytest.mark.parametrize("error", DO_NOT_WORK, ids=lambda e: type(e).__name__)
def test_where_the_others_fail_the_usual_one_is_not_measured(world: World, error: Exception) -> None:
    ways = {"usual": world.make("usual", 3.0), "a": failing(error), "b": world.make("b", 1.0, fails=error)}
    choice = choose(ways, BATCH)
    assert (choice.name, choice.rates) == ("usual", {})
    assert len(world.of("usual")) == 1


@pytest.mark.parametrize("error", DO_NOT_WORK, ids=lambda e: type(e).__name__)
def test_the_usual_ones_failure_is_raised(world: World, error: Exception) -> None:
    for usual in (failing(error), world.make("usual", 1.0, fails=error)):
        with pytest.raises(type(error)) as raised:
            choose({"usual": usual, "other": world.make("other", 1.0)}, BATCH)
        assert raised.value is error
    assert world.asked == []


def test_a_mistake_of_ours_is_not_hidden(world: World) -> None:
    with pytest.raises(ZeroDivisionError):
        choose({"usual": world.make("usual", 1.0), "other": failing(ZeroDivisionError())}, BATCH)


# --- what runs measure


class Offered:
    """What a run would choose from."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[tuple[list[str], Dataset, dict[str, object]]] = []
        for module in (assemble, fit):
            monkeypatch.setattr(module, "choose", self.choose)

    def choose(self, ways: Mapping[str, Callable[[], Runtime]], batch: Dataset, **options: object) -> Choice:
        self.asked.append((list(ways), batch, options))
        name = next(iter(ways))
        return Choice(ways[name](), name, {})


@pytest.fixture
def offered(monkeypatch: pytest.MonkeyPatch) -> Offered:
    return Offered(monkeypatch)


SMALL = TrainConfig(model="mlp", batch_size=8, clients=5, threads=1)


@pytest.mark.parametrize(
    ("changes", "ways", "examples", "margin"),
    [
        ({}, ["copies", "stacked"], 5 * 8, MARGIN),
        ({"clients": 40}, ["copies", "stacked"], 16 * 8, MARGIN),  # not of more clients than that
        ({"clients": 40, "participation": 0.1}, ["copies", "stacked"], 4 * 8, MARGIN),
        ({"participation": 0.01}, ["copies", "stacked"], 8, MARGIN),
        ({"sharing": "per-client"}, ["copies", "stacked"], 8, MARGIN),  # each client goes alone
        ({"local_steps": 2, "local_lr": 0.1}, ["copies", "stacked"], 8, MARGIN),
        ({"batch_size": 1000}, ["copies", "stacked"], 1438, MARGIN),  # all that the clients have
        ({"precision": "bf16"}, ["copies", "stacked"], 5 * 8, MARGIN),
        ({"memory": "1GB"}, ["copies", "stacked"], 5 * 8, MARGIN),
        ({"runtime": "auto"}, ["copies", "stacked", "openvino"], 5 * 8, 1.0),
        ({"runtime": "auto", "precision": "bf16"}, ["copies", "stacked", "openvino"], 5 * 8, 1.0),
    ],
)
def test_a_run_measures_what_a_round_evaluates(
    offered: Offered, changes: dict[str, Any], ways: list[str], examples: int, margin: float
) -> None:
    options = msgspec.structs.replace(SMALL, num_directions=7, family="gaussian", **changes)
    setup = assemble.assemble(options)
    [(names, batch, told)] = offered.asked
    assert (names, len(batch)) == (ways, examples)
    assert told == {"num_directions": 7, "family": "gaussian", "margin": margin}
    assert setup.choice is not None
    assert setup.engine.plan["precision"] == options.precision
    assert setup.engine.plan.get("memory") == options.memory_bytes


@pytest.mark.parametrize(
    "changes",
    [
        {"strategy": "copies"},
        {"strategy": "stacked"},
        {"strategy": "streaming", "memory": "64MB"},
        {"runtime": "ort"},
        {"backprop": "fedsgd"},
    ],
)
def test_what_is_told_is_not_measured(offered: Offered, changes: dict[str, Any]) -> None:
    options = msgspec.structs.replace(SMALL, **changes)
    setup = assemble.assemble(options)
    assert offered.asked == []
    assert setup.choice is None
    assert setup.engine.plan["runtime"] == options.runtime
    assert setup.engine.plan.get("strategy", "auto") == changes.get(
        "strategy", "copies" if options.backprop else "auto"
    )


def test_the_short_way_in_measures_too(offered: Offered) -> None:
    train, _ = load("digits")
    clients = partition(train, 20)
    run = bf.fit(linear(), clients, loss=F.cross_entropy, rounds=1, method=bf.Method(num_directions=3, batch_size=2))
    assert [(ways, len(batch), told) for ways, batch, told in offered.asked] == [
        (["copies", "stacked"], 16 * 2, {"num_directions": 3, "family": "rank1"})
    ]
    assert run.config.plan["strategy"] == "copies"


@pytest.mark.parametrize(
    ("clients", "words"),
    [([], "clients: an empty list"), ([BATCH, BATCH.take(np.arange(0))], "client 1 has no examples")],
)
def test_clients_are_looked_at_before_anything_is_measured(
    offered: Offered, clients: list[Dataset], words: str
) -> None:
    with pytest.raises(DataError, match=words):
        bf.fit(linear(2), clients, loss=F.cross_entropy, rounds=1)
    assert offered.asked == []


# --- what is told


def test_a_choice_in_words(world: World) -> None:
    runtime = world.make("x", 1.0)()
    rates = {"copies": 1234567.8, "stacked": 100.0, "openvino": 99.96, "slow": 0.012345}
    told = "stacked (passes a second: copies 1,234,568, stacked 100, openvino 100, slow 0.0123)"
    assert str(Choice(runtime, "stacked", rates)) == told
    assert str(Choice(runtime, "copies", {})) == "copies"
