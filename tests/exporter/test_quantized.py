"""Int8 graphs: which layers are quantised, and how weights enter them."""

from __future__ import annotations

import collections
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto
from torch import Tensor, nn

from baffle.errors import PlanError
from baffle.exporter import export
from baffle.runtimes.onnx.bundle import Precision
from baffle.runtimes.onnx.openvino import OpenVinoRuntime
from baffle.runtimes.onnx.ort import OrtRuntime
from baffle.runtimes.pytorch.runtime import TorchRuntime
from exported import graph_of, losses, numbers, tokens, weight_inputs


class TestRefusals:
    @pytest.mark.parametrize("precision", ["int8", "int8-weights"])
    def test_int8_with_nothing_to_quantise(self, precision: Precision) -> None:
        model = nn.Sequential(nn.LayerNorm(6))
        with pytest.raises(PlanError, match=r"int8: no convolution and no linear layer to quantise$"):
            export(model, F.cross_entropy, numbers(6, classes=6), precision=precision)
        model = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 4))
        model[0].requires_grad_(False)
        with pytest.raises(PlanError, match="to quantise among the frozen ones"):
            export(model, F.cross_entropy, numbers(6), precision=precision)


class Matrix(nn.Module):
    """A weight [inputs, outputs], which is multiplied as it lies."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class TestInt8:
    @pytest.mark.parametrize(
        ("model", "shape", "coded"),
        [
            (nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(72, 4)), (4, 5, 5), 2),
            (nn.Sequential(nn.Conv1d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 4)), (4, 5), 2),
            (
                nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4, bias=False), nn.Flatten(), nn.Linear(20, 4)),
                (5, 6),
                3,
            ),
            (nn.Sequential(nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 4, bias=False)), (6,), 2),
            (
                nn.Sequential(nn.Conv2d(3, 4, 3, 2, "valid", 2, bias=False), nn.Flatten(), nn.Linear(16, 4)),
                (3, 8, 8),
                2,
            ),
        ],
        ids=["groups", "conv1d", "linear-3d", "no-bias", "strides"],
    )
    def test_kinds_of_layers(self, model: nn.Module, shape: tuple[int, ...], coded: int) -> None:
        data = numbers(*shape, examples=40)
        exact = losses(TorchRuntime(model, F.cross_entropy, 1), data)
        for weights_only in (True, False):
            precision: Precision = "int8-weights" if weights_only else "int8"
            bundle = export(model, F.cross_entropy, data, precision=precision, branches=not weights_only)
            codes = [f for f in bundle.manifest.feeds if f.startswith("codes")]
            assert len(codes) == coded
            assert bool(bundle.manifest.activations) != weights_only
            assert ("ranges.onnx" in bundle.files) != weights_only
            for runtime in (OrtRuntime(bundle, 1), OpenVinoRuntime(bundle, 1)):
                assert np.abs(losses(runtime, data) - exact).max() < 0.05

    def test_codes_and_scales_enter_instead_of_the_weight(self) -> None:
        model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
        bundle = export(model, F.cross_entropy, numbers(6), precision="int8-weights")
        types = {i.name: i.type.tensor_type.elem_type for i in graph_of(bundle).input}
        inputs = dict(weight_inputs(bundle))
        assert bundle.manifest.feeds == ("codes", "float32", "codes", "float32")
        for name, shape in (("0.weight", (5, 6)), ("1.weight", (4, 5))):
            assert name not in inputs
            assert (inputs[f"{name}.codes"], types[f"{name}.codes"]) == (shape, TensorProto.INT8)
            assert (inputs[f"{name}.scale"], types[f"{name}.scale"]) == (shape[:1], TensorProto.FLOAT)

    @pytest.mark.parametrize("precision", ["int8-weights", "int8"])
    def test_beside_a_frozen_backbone_the_trained_head_stays_in_float(self, precision: Precision) -> None:
        model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 4))
        model[:4].requires_grad_(False)
        data = numbers(2, 5, 5)
        exact = losses(TorchRuntime(model, F.cross_entropy, 1), data)
        bundle = export(model, F.cross_entropy, data, precision=precision)
        assert weight_inputs(bundle)[:2] == [("5.weight", (4, 8)), ("5.bias", (4,))]
        assert bundle.manifest.feeds == ("float32", "float32")
        constants = {tuple(sorted(c.dims)): c.data_type for c in graph_of(bundle).initializer if len(c.dims) > 1}
        assert constants == {(2, 3, 3, 4): TensorProto.INT8, (8, 36): TensorProto.INT8}
        assert np.abs(losses(OrtRuntime(bundle, 1), data) - exact).max() < 0.05
        # a perturbation of the head in float: nothing of it is rounded
        rows = losses(OrtRuntime(bundle, 1), data)
        assert np.abs((rows[1:] - rows[0]) - (exact[1:] - exact[0])).max() < 0.01

    @pytest.mark.parametrize(("precision", "size"), [("int8-weights", 5), ("int8", 6)])
    def test_a_weight_that_lies_the_other_way_stays_in_float(self, precision: Precision, size: int) -> None:
        """Its rows are inputs, but a scale is one of an output: as codes it would be another weight."""
        model, data = nn.Sequential(Matrix(6, size), nn.ReLU(), nn.Linear(size, 4)), numbers(6)
        exact = losses(TorchRuntime(model, F.cross_entropy, 1), data)
        bundle = export(model, F.cross_entropy, data, precision=precision)
        assert bundle.manifest.feeds == ("float32", "codes", "float32")
        assert np.abs(losses(OrtRuntime(bundle, 1), data) - exact).max() < 0.05

    def test_a_weight_that_is_looked_up_too_stays_in_float(self) -> None:
        class Text(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.embed, self.mix = nn.Embedding(9, 5), nn.Linear(5, 5)

            def forward(self, x: Tensor) -> Tensor:
                return F.linear(torch.relu(self.mix(self.embed(x).mean(1))), self.embed.weight)

        model, data = Text(), tokens()
        exact = losses(TorchRuntime(model, F.cross_entropy, 1), data)
        bundle = export(model, F.cross_entropy, data, precision="int8-weights")
        assert bundle.manifest.feeds == ("float32", "codes", "float32")
        assert np.abs(losses(OrtRuntime(bundle, 1), data) - exact).max() < 0.05

    def test_onnx_runtime_finds_an_int8_kernel_for_every_layer(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 8), nn.ReLU(), nn.Linear(8, 4)
        )
        data, session = numbers(1, 8, 8), onnxruntime.InferenceSession

        def spy(graph: bytes, options: onnxruntime.SessionOptions, **how: object) -> onnxruntime.InferenceSession:
            options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
            return session(graph, options, **how)

        bundle = export(model, F.cross_entropy, data, precision="int8")
        monkeypatch.setattr(onnxruntime, "InferenceSession", spy)
        OrtRuntime(bundle, 1)
        nodes = onnx.load(tmp_path / "optimised.onnx").graph.node
        kernels = collections.Counter(n.op_type for n in nodes)
        assert (kernels["QLinearConv"], kernels["MatMulIntegerToFloat"]) == (1, 2)
        assert not {"Conv", "Gemm", "MatMul"} & kernels.keys()
