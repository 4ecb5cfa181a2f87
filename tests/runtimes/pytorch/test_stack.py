"""Rules of functions for a stack: each gives what every pass alone gives; functions without a rule are refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from baffle.core.types import Family
from baffle.errors import ModelError
from strategies import (
    REFUSED,
    STACKABLE,
    With,
    asked_of,
    by,
    data_of,
    exact_losses,
    layer,
    losses_of,
    made,
    parameter,
    runtime_of,
)

EMBEDDING = by(
    lambda m, x: m.a(m.e(x) + m.p).tanh().mean(1),
    e=lambda: nn.Embedding(7, 6, padding_idx=0),
    p=lambda: parameter(4, 6),
    a=layer,
)


class TestRules:
    @pytest.mark.parametrize("name", STACKABLE)
    @pytest.mark.parametrize("family", ["rank1", "rademacher", "gaussian"])
    def test_it_gives_what_every_pass_alone_gives(self, name: str, family: Family) -> None:
        model, data = made(*STACKABLE[name]), data_of(STACKABLE[name][1])
        stacked, copies = runtime_of(model, "stacked"), runtime_of(model, "copies")
        asked = asked_of(stacked, family=family)
        losses = losses_of(stacked, data, asked)
        assert np.array_equal(losses, losses_of(stacked, data, asked))
        assert np.allclose(losses, losses_of(copies, data, asked), 1e-5, 1e-6)
        assert np.abs(losses - exact_losses(model, stacked, data, asked)).max() < 2e-6 * max(1, losses.max())

    @pytest.mark.parametrize("steps", [(0.02,), (0.02, -0.02)])
    @pytest.mark.parametrize("k", [1, 4])
    def test_tokens(self, steps: tuple[float, ...], k: int) -> None:
        torch.manual_seed(0)
        model, data = EMBEDDING(), data_of((4,), tokens=True)
        stacked = runtime_of(model, "stacked")
        asked = asked_of(stacked, steps, k=k)
        exact = exact_losses(model, stacked, data, asked)
        assert np.abs(losses_of(stacked, data, asked) - exact).max() < 2e-6

    @pytest.mark.parametrize("name", REFUSED)
    def test_what_is_not_known_is_refused_and_evaluated_by_the_others(self, name: str) -> None:
        make, shape, told = REFUSED[name]
        torch.manual_seed(0)
        model, data = make(), data_of(shape)
        stacked, copies = runtime_of(model, "stacked"), runtime_of(model, "copies")
        asked = asked_of(copies)
        with pytest.raises(ModelError) as error:
            losses_of(stacked, data, asked)
        assert told in str(error.value)
        assert "expected copies or streaming" in str(error.value)
        exact = exact_losses(model, copies, data, asked)
        assert np.abs(losses_of(copies, data, asked) - exact).max() < 5e-6 * max(1, exact.max())

    def test_an_embedding_that_renormalises_its_weight_is_refused(self) -> None:
        model = With(lambda m, x: m.a(m.e(x).mean(1)), e=nn.Embedding(7, 6, max_norm=1.0), a=layer())
        stacked = runtime_of(model, "stacked")
        with pytest.raises(ModelError, match="max_norm"):
            losses_of(stacked, data_of((4,), tokens=True), asked_of(stacked, (1e-4,)))
