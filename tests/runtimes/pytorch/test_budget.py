"""A memory budget bounds what an evaluation allocates, and changes no loss."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from baffle.core.types import Family, make_table
from baffle.errors import OptionError, PlanError
from baffle.runtimes.perturb import Point, unperturbed
from baffle.runtimes.pytorch.budget import Sizes, _Living, activation_bytes, weight_bytes, within
from baffle.runtimes.pytorch.runtime import STRATEGIES, TorchRuntime
from strategies import asked_of, data_of, frozen, layer, losses_of

BIG = st.integers(1, 2**34)


class TestBudget:
    @given(BIG, BIG, st.integers(0, 2**34), st.integers(1, 4096), st.integers(1, 2**16), BIG)
    def test_sizes_fit_or_the_bytes_needed_are_told(
        self, budget: int, an_example: int, weights: int, examples: int, rows: int, drawn: int
    ) -> None:
        usual = Sizes(examples, rows, drawn)
        try:
            sizes = within(budget, usual, an_example, weights)
        except PlanError as error:
            needed = int(str(error).split("at least ")[1].split()[0])
            assert needed == weights + 2**16 + an_example
            least = within(8 * needed, usual, an_example, weights)  # directions take an eighth at most
            assert least.examples >= 1
            return
        assert 1 <= sizes.examples <= examples
        assert 1 <= sizes.rows <= rows
        assert sizes.kept >= 0
        assert weights + sizes.directions + max(sizes.examples, sizes.rows) * an_example <= budget

    @given(BIG, BIG, st.integers(1, 2**20))
    def test_more_memory_never_means_less_at_once(self, budget: int, more: int, an_example: int) -> None:
        usual = Sizes(64, 4096, 2**16)
        try:
            sizes = within(budget, usual, an_example, 1000)
        except PlanError:
            return
        larger = within(budget + more, usual, an_example, 1000)
        assert larger.examples >= sizes.examples
        assert larger.rows >= sizes.rows

    @pytest.mark.parametrize("precision", ["fp32", "bf16"])
    @pytest.mark.parametrize("examples", [1, 7, 4000])  # a view of a batch is not the batch
    def test_the_activations_of_a_known_model(self, precision: str, examples: int) -> None:
        model = nn.Sequential(nn.Flatten(), nn.Linear(12, 100, bias=False), nn.ReLU(), nn.Linear(100, 3, bias=False))
        runtime = TorchRuntime(model, F.cross_entropy, 1, precision=precision)
        lane, size = runtime.lanes[0].replica, 4 if precision == "fp32" else 2
        point = Point(unperturbed(runtime.table), runtime.initial_weights(), runtime._layouts())
        batch = torch.zeros(examples, 3, 4)
        with torch.inference_mode():
            found = activation_bytes(lane, point, batch[:1])
        weight = 1200 * size  # lives while its layer runs; measured with four examples
        assert abs(found - (12 + 200) * size - weight / 4) <= 12 * size + weight / 4

    def test_the_bytes_of_weights(self) -> None:
        table = make_table({"a": (10, 10), "b": (30,)})
        assert weight_bytes(table, 4, "copies") == 520
        assert weight_bytes(table, 2, "stacked") == 260
        assert weight_bytes(table, 4, "streaming") == 400

    @pytest.mark.parametrize("strategy", STRATEGIES)
    @pytest.mark.parametrize("steps", [(0.02,), (0.02, -0.02)])
    @pytest.mark.parametrize("family", ["rank1", "rademacher"])
    @pytest.mark.parametrize("kind", ["mlp", "images", "frozen"])
    def test_passes_stay_within_it_and_give_the_same_losses(
        self, strategy: str, steps: tuple[float, ...], family: Family, kind: str
    ) -> None:
        torch.manual_seed(0)
        budget, shape = 300_000, (1, 8, 8) if kind == "images" else (64,)
        model = {
            "mlp": lambda: nn.Sequential(layer(64, 128), nn.ReLU(), layer(128, 128), nn.ReLU(), layer(128)),
            "images": lambda: nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), layer(8 * 36)),
            "frozen": lambda: nn.Sequential(frozen(layer(64, 512)), nn.ReLU(), layer(512)),
        }[kind]()
        usual = TorchRuntime(model, F.cross_entropy, 1, strategy=strategy)
        small = TorchRuntime(model, F.cross_entropy, 1, strategy=strategy, memory=budget)
        data, asked = data_of(shape, 400), asked_of(small, steps, family=family, k=8)
        expected, living = losses_of(usual, data, asked), _Living()
        losses_of(small, data, asked)  # what is tried once
        with living:
            losses = losses_of(small, data, asked)
        assert np.abs(losses - expected).max() < 2e-6
        given_and_asked_for = 4 * data.x.size + data.y.nbytes + losses.nbytes
        assert 10_000 < living.most - given_and_asked_for <= budget

    @pytest.mark.parametrize("strategy", STRATEGIES)
    def test_too_little_is_told(self, strategy: str) -> None:
        runtime = TorchRuntime(layer(), F.cross_entropy, 1, strategy=strategy, memory=1000)
        with pytest.raises(PlanError, match=r"memory = 1000 bytes a thread: expected at least 65\d\d\d for"):
            losses_of(runtime, data_of((6,)), asked_of(runtime))

    def test_the_batch_that_comes_first_does_not_decide_the_chunks(self) -> None:
        chosen = set[Sizes]()
        for examples in (1, 10, 3000):
            runtime = TorchRuntime(nn.Sequential(nn.Flatten(), layer(64)), F.cross_entropy, 1)
            runtime.evaluate(runtime.initial_weights(), data_of((8, 8), examples))
            chosen.update(runtime._sizes.values())
        assert len(chosen) == 1


@pytest.mark.parametrize("memory", [0, -1, "1GB"])
def test_a_budget_is_a_number_of_bytes(memory: Any) -> None:
    with pytest.raises(OptionError, match=r"memory = .*: expected an integer >= 1"):
        TorchRuntime(layer(), F.cross_entropy, 1, memory=memory)
