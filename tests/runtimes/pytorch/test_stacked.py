"""The strategy stacked: it gives what passes alone give, and is never confused by dimensions of equal length."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from baffle.errors import ModelError
from strategies import STACKABLE, With, asked_of, data_of, layer, losses_of, made, runtime_of


class TestStacked:
    @pytest.mark.parametrize("name", ["mlp", "two convs", "layer norm of tokens", "position", "group norm"])
    @pytest.mark.parametrize("steps", [(0.02,), (0.02, -0.02)])
    @pytest.mark.parametrize("precision", ["fp32", "bf16"])
    @pytest.mark.parametrize(("lattice", "masked"), [(0, False), (2, False), (0, True)])
    def test_differences_masks_lattices_and_precisions(
        self, name: str, steps: tuple[float, ...], precision: str, lattice: int, masked: bool
    ) -> None:
        model, data = made(*STACKABLE[name]), data_of(STACKABLE[name][1])
        rng = np.random.default_rng(1)
        masks = {n: rng.random(tuple(p.shape)) > 0.4 for n, p in model.named_parameters() if p.ndim > 1}
        stacked, copies = (runtime_of(model, s, precision, masks if masked else None) for s in ("stacked", "copies"))
        asked = asked_of(stacked, steps, lattice=lattice)
        bound = 2e-6 if precision == "fp32" else 0.03
        assert np.abs(losses_of(stacked, data, asked) - losses_of(copies, data, asked)).max() < bound

    @pytest.mark.parametrize("examples", [1, 2, 3, 4, 6, 12])
    @pytest.mark.parametrize("k", [1, 2, 3, 6])
    @pytest.mark.parametrize(
        "name", ["mlp", "linear of tokens", "position behind", "layer norm of tokens", "two convs"]
    )
    def test_numbers_that_coincide_change_nothing(self, name: str, examples: int, k: int) -> None:
        model, data = made(*STACKABLE[name]), data_of(STACKABLE[name][1], examples)
        stacked, copies = runtime_of(model, "stacked"), runtime_of(model, "copies")
        asked = asked_of(stacked, k=k)
        assert np.allclose(losses_of(stacked, data, asked), losses_of(copies, data, asked), 1e-5, 1e-6)

    @pytest.mark.parametrize("step", [1e-1, 1e-3, 1e-5])  # below some a wrong loss is near a right one
    def test_tokens_first_are_not_taken_for_examples(self, step: float) -> None:
        model = With(lambda m, x: m.b(torch.tanh(m.a(x.transpose(0, 1))).mean(0)), a=layer(6, 5), b=layer(5))
        stacked = runtime_of(model, "stacked")
        with pytest.raises(ModelError, match="beside 13 examples"):
            losses_of(stacked, data_of((12, 6), 12), asked_of(stacked, (step,)))

    @pytest.mark.parametrize("step", [1e-1, 1e-3, 1e-5])
    def test_tokens_flat_are_not_taken_for_passes(self, step: float) -> None:
        def run(m: With, x: Tensor) -> Tensor:
            return m.b(torch.tanh(m.a(x.reshape(-1, 6))).reshape(len(x), 8, 5).mean(1))  # type: ignore[no-any-return, operator]

        model = With(run, a=layer(6, 5), b=layer(5))
        stacked = runtime_of(model, "stacked")
        with pytest.raises(ModelError, match="beside 13 examples"):
            losses_of(stacked, data_of((8, 6), 12), asked_of(stacked, (step, -step), k=4))
