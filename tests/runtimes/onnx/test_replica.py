"""What an engine is fed, observed by an engine that only records it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from baffle.core.quantize import on_lattice, row_scales
from baffle.core.types import Array, Weights, make_table
from baffle.data import Dataset
from baffle.runtimes.onnx.bundle import Bundle, Example, Feed, Manifest, make_bundle
from baffle.runtimes.onnx.runtime import Buffers, GraphRuntime
from contract import SIGMA, passes

Fed = dict[str, npt.NDArray[Any]]


class TestFeeding:
    """What an engine is fed, by an engine that only takes it down."""

    def test_codes_on_the_lattice_are_the_codes_of_the_weights_plus_or_minus_m(self) -> None:
        for m in (1, 8):
            bundle, weights = toy(("codes", "float32"))
            runtime, fed = recorded(bundle)
            asked = passes(runtime, (SIGMA, -SIGMA), k=5, lattice=m)
            runtime.losses(weights, asked, toy_batch())
            scales = row_scales(bundle.manifest.table[0], weights)
            base = np.rint(weights[:30].reshape(6, 5) / scales[:, None])
            a, b = asked.directions.factors(slice(0, 5))[0]
            expected = [base]
            for k in range(5):
                step = m * a[k][:, None].astype(float) * b[k]
                expected += [base + step, base - step]
            assert len(fed) == 11
            for buffers, codes in zip(fed, expected, strict=True):
                assert np.array_equal(buffers["0.weight.codes"], codes)
                assert np.array_equal(buffers["0.weight.scale"], scales)

    def test_codes_are_the_nearest_to_the_perturbed_weights_on_the_scales_of_the_unperturbed(self) -> None:
        bundle, weights = toy(("codes", "float32"))
        runtime, fed = recorded(bundle)
        asked = passes(runtime, (SIGMA, -SIGMA), k=3)
        runtime.losses(weights, asked, toy_batch())
        scales = row_scales(bundle.manifest.table[0], weights)
        for buffers, perturbed in zip(fed, asked.weights(weights, weights.copy()), strict=True):
            assert np.array_equal(buffers["0.weight.scale"], scales)
            units = perturbed[:30].reshape(6, 5) / scales[:, None]
            assert np.abs(buffers["0.weight.codes"] - units).max() <= 0.5
            assert np.array_equal(buffers["0.bias"], perturbed[30:])

    @pytest.mark.parametrize("feed", ["branch", "codes+branch"])
    @pytest.mark.parametrize("lattice", [0, 2])
    def test_beside_a_branch_the_weight_never_moves(self, feed: Feed, lattice: int) -> None:
        bundle, weights = toy((feed, "float32"))
        runtime, fed = recorded(bundle)
        asked = passes(runtime, (SIGMA, -SIGMA), k=3, lattice=lattice)
        runtime.losses(weights, asked, toy_batch())
        table = bundle.manifest.table
        kept = on_lattice(table, weights) if lattice else weights
        for buffers, perturbed in zip(fed, asked.weights(weights, weights.copy()), strict=True):
            if feed == "branch":
                assert np.array_equal(buffers["0.weight"].reshape(-1), kept[:30])
            else:
                units = kept[:30].reshape(6, 5) / row_scales(table[0], weights)[:, None]
                assert np.array_equal(buffers["0.weight.codes"], np.rint(units))
            product = np.outer(buffers["0.weight.left"], buffers["0.weight.right"])
            assert np.allclose(kept[:30].reshape(6, 5) + product, perturbed[:30].reshape(6, 5), atol=1e-7)
            assert np.array_equal(buffers["0.bias"], perturbed[30:])
        assert not fed[0]["0.weight.left"].any()

    def test_half_precision_weights_are_the_perturbed_ones_rounded(self) -> None:
        bundle, weights = toy(("float16", "float16"))
        weights[0] = 1e6  # more than float16 has: infinite, without a warning
        runtime, fed = recorded(bundle)
        asked = passes(runtime, k=2)
        runtime.losses(weights, asked, toy_batch())
        for buffers, perturbed in zip(fed, asked.weights(weights, weights.copy()), strict=True):
            with np.errstate(over="ignore"):
                half = perturbed.astype(np.float16)
            assert np.array_equal(buffers["0.weight"].reshape(-1), half[:30])
            assert np.array_equal(buffers["0.bias"], half[30:])

    def test_chunks_are_of_one_size_and_the_last_is_padded_with_an_example_of_its_own(self) -> None:
        bundle, weights = toy(("float32", "float32"))
        runtime, fed = recorded(bundle)
        data = toy_batch(300)
        losses = runtime.losses(weights, passes(runtime, k=0), data)
        assert losses.shape == (1, 300)
        assert [buffers["x"].shape for buffers in fed] == [(128, 5)] * 3
        assert np.array_equal(np.concatenate([buffers["x"] for buffers in fed])[:300], data.x)
        assert np.array_equal(np.concatenate([buffers["y"] for buffers in fed])[:300], data.y)
        assert np.array_equal(fed[2]["x"][44:], np.repeat(data.x[256:257], 84, axis=0))

    @pytest.mark.parametrize(
        ("low", "high", "zero"), [(-2.0, 1.0, 170), (2.0, 5.0, 0), (-5.0, -2.0, 255), (-1.0, 3.0, 64), (0.0, 0.0, 0)]
    )
    def test_activation_codes_hold_the_measured_range_and_zero_for_all_passes(
        self, low: float, high: float, zero: int
    ) -> None:
        bundle, weights = toy(("codes", "float32"), activations=("x",))
        runtime, fed = recorded(bundle, {"x.min": low, "x.max": high})
        runtime.losses(weights, passes(runtime, k=3), toy_batch(300))
        assert len(fed) == 3 * 4
        width = max(high, 0) - min(low, 0)
        for buffers in fed:
            assert buffers["x.zero"] == zero
            assert buffers["x.scale"] == pytest.approx(max(width / 255, 1e-12))

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_activations_that_are_not_finite_have_such_losses(self, value: float) -> None:
        bundle, weights = toy(("codes", "float32"), activations=("x",))
        runtime, _ = recorded(bundle, {"x.min": 0.0, "x.max": value})
        assert np.isnan(runtime.losses(weights, passes(runtime), toy_batch())).all()
        assert np.isnan(runtime.evaluate(weights, toy_batch()).losses).all()


def toy(feeds: tuple[Feed, ...], activations: tuple[str, ...] = ()) -> tuple[Bundle, Weights]:
    """A bundle of a linear layer 5 -> 6 without a graph."""
    table = make_table({"0.weight": (6, 5), "0.bias": (6,)})
    weights = np.random.default_rng(0).normal(size=36).astype(np.float32)
    manifest = Manifest(
        table=table,
        feeds=feeds,
        precision="fp32",
        loss="cross-entropy",
        x=Example((5,), "float32"),
        y=Example((), "int64"),
        pixels=None,
        activations=activations,
        files={},
    )
    return make_bundle(manifest, {"model.onnx": b""}, weights), weights


def toy_batch(examples: int = 8) -> Dataset:
    rng = np.random.default_rng(1)
    return Dataset(rng.normal(size=(examples, 5)), rng.integers(0, 6, examples))


def recorded(bundle: Bundle, ranges: Mapping[str, float] | None = None) -> tuple[GraphRuntime, list[Fed]]:
    """A runtime whose outputs are 0, and what it was fed, run by run of the model on more than one example."""
    fed: list[Fed] = []

    @dataclass
    class Program:
        file: str
        buffers: Buffers

        def run(self) -> Mapping[str, Array]:
            if self.file == "ranges.onnx":
                return {name: np.float32(value) for name, value in (ranges or {}).items()}  # type: ignore[misc]
            if len(self.buffers["x"]) > 1:
                fed.append({name: array.copy() for name, array in self.buffers.items()})
            return {"outputs": np.zeros((len(self.buffers["x"]), 6), np.float32)}

    return GraphRuntime(bundle, Program, {}, threads=1), fed
