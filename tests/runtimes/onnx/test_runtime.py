"""Runtimes of exported graphs: families, side branches, pruned weights, tokens, pixels, and data that is refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import msgspec
import numpy as np
import pytest
import torch.nn.functional as F
from torch import nn

from baffle.core.types import Family
from baffle.data import Dataset, Scaling
from baffle.errors import DataError, ModelError, PlanError
from baffle.exporter import export
from baffle.models import build
from baffle.runtimes import Runtime
from baffle.runtimes.onnx.bundle import Bundle, Precision, make_bundle
from baffle.runtimes.onnx.openvino import OpenVinoRuntime
from baffle.runtimes.onnx.ort import OrtRuntime
from baffle.runtimes.pytorch.runtime import TorchRuntime
from contract import batch, bundle_of, model_of, passes, references

GRAPHS: dict[str, Callable[[Bundle], Runtime]] = {
    "ort": lambda bundle: OrtRuntime(bundle, threads=1),
    "openvino": lambda bundle: OpenVinoRuntime(bundle, threads=1),
}


@pytest.fixture(params=sorted(GRAPHS))
def engine(request: pytest.FixtureRequest) -> Callable[[Bundle], Runtime]:
    return GRAPHS[request.param]


Engine = Callable[[Bundle], Runtime]


class TestExportedGraphs:
    """What runtimes of client bundles do besides."""

    @pytest.mark.parametrize("family", ["rademacher", "gaussian"])
    def test_other_families_agree_with_float64(self, engine: Engine, family: Family) -> None:
        runtime = engine(bundle_of("mlp"))
        weights, asked = runtime.initial_weights(), passes(runtime, k=3, family=family)
        exact = references(model_of("mlp"), runtime, weights, asked, batch())
        assert np.abs(runtime.losses(weights, asked, batch()) - exact).max() < 5e-6

    @pytest.mark.parametrize("precision", ["fp32", "int8-weights"])
    def test_branches_take_rank1_directions_only(self, engine: Engine, precision: Precision) -> None:
        runtime = engine(bundle_of("mlp", precision, True))
        for family in ("rademacher", "gaussian"):
            with pytest.raises(PlanError, match=f"family '{family}'.*branches: expected rank1"):
                runtime.losses(runtime.initial_weights(), passes(runtime, family=family), batch())

    @pytest.mark.parametrize("precision", ["fp32", "int8-weights", "int8"])
    def test_an_unperturbed_branch_adds_nothing(self, engine: Engine, precision: Precision) -> None:
        plain, branched = (engine(bundle_of("mlp", precision, branches)) for branches in (False, True))
        weights = plain.initial_weights()
        losses = plain.evaluate(weights, batch()).losses
        assert np.abs(losses - branched.evaluate(weights, batch()).losses).max() < 2e-6

    def test_pruned_weights_stay_zero(self, engine: Engine) -> None:
        model, rng = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), np.random.default_rng(0)
        masks = {"1.weight": rng.random((10, 64)) < 0.3}
        torch_runtime = TorchRuntime(model, F.cross_entropy, threads=1, masks=masks)
        runtime = engine(export(model, F.cross_entropy, batch(), masks=masks))
        weights = runtime.initial_weights()
        assert runtime.table == torch_runtime.table
        assert np.array_equal(weights, torch_runtime.initial_weights())
        assert not weights[:640][~masks["1.weight"].reshape(-1)].any()
        expected = torch_runtime.losses(weights, passes(runtime), batch())
        assert np.allclose(runtime.losses(weights, passes(runtime), batch()), expected, atol=5e-6)

    def test_tokens_are_int64(self, engine: Engine) -> None:
        rng = np.random.default_rng(0)
        model = build("transformer", (12,), 2, vocabulary=50)
        data = Dataset(rng.integers(0, 50, (40, 12)), rng.integers(0, 2, 40))
        bundle = token_bundle()
        runtime = engine(bundle)
        weights, asked = runtime.initial_weights(), passes(runtime, k=2)
        exact = references(model, runtime, weights, asked, data)
        assert np.abs(runtime.losses(weights, asked, data) - exact).max() < 5e-6
        with pytest.raises(DataError, match=r"data.x: float32\[40, 12\]: expected int64 \[examples, 12\]"):
            runtime.evaluate(weights, Dataset(data.x.astype(np.float32), data.y))

    def test_bytes_of_pixels_are_scaled(self, engine: Engine) -> None:
        rng = np.random.default_rng(0)
        pixels = Dataset(
            rng.integers(0, 256, (40, 2, 4, 4), np.uint8),
            rng.integers(0, 3, 40),
            "photos",
            Scaling((0.4, 0.5), (0.2, 0.3)),
        )
        model = nn.Sequential(nn.Flatten(), nn.Linear(32, 3))
        bundle = export(model, F.cross_entropy, pixels)
        assert bundle.scaling == pixels.scaling
        runtime = engine(bundle)
        weights, asked = runtime.initial_weights(), passes(runtime, k=2)
        losses = runtime.losses(weights, asked, pixels)
        assert np.abs(losses - references(model, runtime, weights, asked, pixels)).max() < 5e-6
        assert np.array_equal(losses, runtime.losses(weights, asked, Dataset(pixels.inputs(), pixels.y)))
        with pytest.raises(DataError, match=r"photos.x: int64\[40, 2, 4, 4\]: expected float32 \[examples, 2, 4, 4\]"):
            runtime.evaluate(weights, Dataset(pixels.x.astype(np.int64), pixels.y, "photos"))

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (Dataset(batch().x, np.full(40, 12), "d"), r"d.y\[0\] = 12: expected a label in 0..9"),
            (Dataset(batch().x, np.r_[np.zeros(39, int), -1], "d"), r"d.y\[39\] = -1: expected a label in 0..9"),
            (
                Dataset(batch().x[:, :, 1:], batch().y, "d"),
                r"d.x: float32\[40, 1, 7, 8\]: expected float32 \[examples, 1, 8",
            ),
            (
                Dataset(batch().x[:, 0], batch().y, "d"),
                r"d.x: float32\[40, 8, 8\]: expected float32 \[examples, 1, 8, 8\]",
            ),
            (
                Dataset(batch().x.astype(int), batch().y, "d"),
                r"d.x: int64\[40, 1, 8, 8\]: expected float32 \[examples, 1",
            ),
            (Dataset(batch().x, batch().y.astype(np.float32), "d"), r"d.y: float32\[40\]: expected int64 \[examples\]"),
            (Dataset(batch().x, batch().y[:, None], "d"), r"d.y: int64\[40, 1\]: expected int64 \[examples\]"),
        ],
    )
    def test_data_of_another_kind_is_refused(self, engine: Engine, data: Dataset, message: str) -> None:
        runtime = engine(bundle_of("mlp"))
        with pytest.raises(DataError, match=message):
            runtime.losses(runtime.initial_weights(), passes(runtime), data)
        with pytest.raises(DataError, match=message):
            runtime.evaluate(runtime.initial_weights(), data)

    def test_a_graph_that_cannot_be_read_is_told_in_one_line(self, engine: Engine) -> None:
        good = bundle_of("mlp")
        broken = make_bundle(good.manifest, {"model.onnx": b"no graph"}, good.initial)
        with pytest.raises(ModelError, match=r"model.onnx failed: .") as caught:
            engine(broken).evaluate(good.initial, batch())
        assert "\n" not in str(caught.value)

    def test_a_graph_with_inputs_that_the_manifest_does_not_have_is_told(self, engine: Engine) -> None:
        good = bundle_of("mlp")
        first, *rest = good.manifest.table
        renamed = msgspec.structs.replace(good.manifest, table=(msgspec.structs.replace(first, name="other"), *rest))
        with pytest.raises(ModelError, match=first.name):
            engine(Bundle(renamed, good.files)).evaluate(good.initial, batch())


@cache
def token_bundle() -> Bundle:
    rng = np.random.default_rng(0)
    data = Dataset(rng.integers(0, 50, (40, 12)), rng.integers(0, 2, 40))
    return export(build("transformer", (12,), 2, vocabulary=50), F.cross_entropy, data)
