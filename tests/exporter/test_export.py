"""From a PyTorch model to a client bundle: the graph has the model's tensors as inputs, and computes what it does."""

from __future__ import annotations

import collections
import copy
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, numpy_helper
from torch import Tensor, nn

import baffle
from baffle.core.directions import Directions
from baffle.data import Dataset, Scaling
from baffle.errors import ModelError, OptionError, PlanError
from baffle.exporter import export
from baffle.exporter.trace import host_loss
from baffle.models import build
from baffle.runtimes import Runtime
from baffle.runtimes.onnx.bundle import Bundle, Example, Pixels, Precision
from baffle.runtimes.onnx.openvino import OpenVinoRuntime
from baffle.runtimes.onnx.ort import OrtRuntime
from baffle.runtimes.perturb import Perturbations
from baffle.runtimes.pytorch.runtime import TorchRuntime

Loss = Callable[..., Tensor]


def numbers(*shape: int, examples: int = 12, classes: int = 4, name: str = "data") -> Dataset:
    rng = np.random.default_rng(0)
    return Dataset(rng.normal(size=(examples, *shape)), rng.integers(0, classes, examples), name)


def tokens(length: int = 7, vocabulary: int = 9) -> Dataset:
    rng = np.random.default_rng(0)
    return Dataset(rng.integers(0, vocabulary, (12, length)), rng.integers(0, vocabulary, 12))


def graph_of(bundle: Bundle, file: str = "model.onnx") -> onnx.GraphProto:
    return onnx.load_from_string(bundle.files[file]).graph


def weight_inputs(bundle: Bundle) -> list[tuple[str, tuple[int, ...]]]:
    found = [i for i in graph_of(bundle).input if i.name not in ("x", "y")]
    return [(i.name, tuple(d.dim_value for d in i.type.tensor_type.shape.dim)) for i in found]


def losses(runtime: Runtime, data: Dataset, sigma: float = 0.01) -> np.ndarray:
    """Losses at the initial weights and at some around them."""
    asked = Perturbations(Directions(runtime.table, "rank1", (1, 1)), 3, (sigma, -sigma), baseline=True)
    return runtime.losses(runtime.initial_weights(), asked, data)


def assert_same(model: nn.Module, loss: Loss, data: Dataset, bundle: Bundle, atol: float = 5e-6) -> None:
    """The bundle gives the losses and hits of the model, at the initial weights and around them."""
    expected, runtime = TorchRuntime(model, loss, threads=1), OrtRuntime(bundle, threads=1)
    assert np.allclose(losses(runtime, data), losses(expected, data), rtol=0, atol=atol)
    weights = runtime.initial_weights()
    found, known = runtime.evaluate(weights, data), expected.evaluate(weights, data)
    assert np.allclose(found.losses, known.losses, rtol=0, atol=atol)
    assert (found.correct is None) == (known.correct is None)
    if atol < 1e-4 and found.correct is not None and known.correct is not None:
        assert np.array_equal(found.correct, known.correct)


class TestInputs:
    """Every trainable tensor is an input of its own: what nothing merges, folds or transposes can be perturbed."""

    @pytest.mark.parametrize("name", ["mlp", "lenet-small"])
    def test_they_are_the_named_parameters(self, name: str) -> None:
        model, data = build(name, (1, 8, 8), 4), numbers(1, 8, 8)
        bundle = export(model, F.cross_entropy, data)
        named = [(n, tuple(p.shape)) for n, p in model.named_parameters()]
        assert weight_inputs(bundle) == named
        assert [(s.name, s.shape) for s in bundle.manifest.table] == named
        assert bundle.manifest.table == TorchRuntime(model, F.cross_entropy).table
        assert np.array_equal(bundle.initial, TorchRuntime(model, F.cross_entropy).initial_weights())

    def test_examples_are_one_dimension_of_any_size(self) -> None:
        bundle = export(nn.Linear(6, 4), F.cross_entropy, numbers(6))
        (x,) = [i for i in graph_of(bundle).input if i.name == "x"]
        first, second = x.type.tensor_type.shape.dim
        assert first.dim_param
        assert second.dim_value == 6

    def test_equal_weights_stay_apart(self) -> None:
        model = nn.Sequential(*[m for _ in range(3) for m in (nn.LayerNorm(6), nn.Linear(6, 6))], nn.Linear(6, 4))
        for p in model[1].parameters():  # the second and third linear layer equal the first
            with torch.no_grad():
                model[3].get_parameter("weight" if p.ndim == 2 else "bias").copy_(p)
        bundle = export(model, F.cross_entropy, numbers(6))
        assert [name for name, _ in weight_inputs(bundle)] == [n for n, _ in model.named_parameters()]
        assert_same(model, F.cross_entropy, numbers(6), bundle)

    def test_tied_weights_are_one(self) -> None:
        class Tied(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)
                self.second.weight = self.first.weight

            def forward(self, x: Tensor) -> Tensor:
                return torch.as_tensor(self.head(self.second(torch.relu(self.first(x)))))

        model, data = Tied(), numbers(6)
        names = ["first.weight", "first.bias", "second.bias", "head.weight", "head.bias"]
        for branches in (False, True):
            bundle = export(model, F.cross_entropy, data, branches=branches)
            assert [s.name for s in bundle.manifest.table] == names
            assert_same(model, F.cross_entropy, data, bundle)
        assert bundle.manifest.feeds == ("float32", "float32", "float32", "branch", "float32")
        bundle = export(model, F.cross_entropy, data, precision="int8-weights")
        assert bundle.manifest.feeds == ("codes", "float32", "float32", "codes", "float32")

    def test_frozen_parameters_and_buffers_are_constants(self) -> None:
        class Frozen(nn.Module):
            scale: Tensor

            def __init__(self) -> None:
                super().__init__()
                self.backbone, self.head = nn.Linear(6, 5), nn.Linear(5, 4)
                self.backbone.requires_grad_(False)
                self.register_buffer("scale", torch.rand(6) + 0.5)

            def forward(self, x: Tensor) -> Tensor:
                return torch.as_tensor(self.head(torch.relu(self.backbone(x * self.scale))))

        model = Frozen()
        bundle = export(model, F.cross_entropy, numbers(6))
        assert weight_inputs(bundle) == [("head.weight", (4, 5)), ("head.bias", (4,))]
        constants = [numpy_helper.to_array(c) for c in graph_of(bundle).initializer]
        kept = model.backbone.weight.detach().numpy()
        assert any(np.array_equal(c, kept) or np.array_equal(c, kept.T) for c in constants)
        assert any(np.array_equal(c, model.scale.numpy()) for c in constants)
        assert_same(model, F.cross_entropy, numbers(6), bundle)

    def test_a_parameter_that_is_not_used_is_named(self) -> None:
        class Unused(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.used, self.extra = nn.Linear(6, 4), nn.Linear(6, 4)

            def forward(self, x: Tensor) -> Tensor:
                return torch.as_tensor(self.used(x))

        for branches in (False, True):
            with pytest.raises(ModelError, match=r"^extra.weight, extra.bias: the model does not use it: freeze it"):
                export(Unused(), F.cross_entropy, numbers(6), branches=branches)
        model = Unused()
        model.extra.requires_grad_(False)
        assert_same(model, F.cross_entropy, numbers(6), export(model, F.cross_entropy, numbers(6)))

    def test_scalars_lstms_and_attention(self) -> None:
        class Mixed(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.gain, self.lstm = nn.Parameter(torch.tensor(1.5)), nn.LSTM(6, 4, batch_first=True)
                self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
                self.head = nn.Linear(4, 4)

            def forward(self, x: Tensor) -> Tensor:
                y = self.lstm(x)[0] * self.gain
                y = y + self.attention(y, y, y, need_weights=False)[0]
                return torch.as_tensor(self.head(y[:, -1]))

        model = Mixed()
        bundle = export(model, F.cross_entropy, numbers(5, 6))
        assert weight_inputs(bundle) == [(n, tuple(p.shape)) for n, p in model.named_parameters()]
        assert_same(model, F.cross_entropy, numbers(5, 6), bundle)


class Linear(nn.Module):
    """A linear layer after something that is done to its inputs."""

    def __init__(self, before: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.before, self.linear = before, nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.linear(self.before(x)))


class TestRefusals:
    @pytest.mark.parametrize(
        ("before", "message"),
        [
            (lambda x: x * len(x) if len(x) < 3 else x, "depends on how many examples there are"),
            (lambda x: x - x.mean(0), "an example alone.*does the model depend on the batch"),
            (lambda x: x + torch.randn_like(x), "does the model depend on the batch, or on anything random"),
            (
                lambda x: x if x.sum() > 0 else -x,
                "cannot be exported to ONNX with a batch of any size: .*data-dependent",
            ),
            (lambda x: x[x[:, 0].argsort()], "does the model depend on the batch"),
        ],
        ids=["size", "statistics", "noise", "values", "order"],
    )
    def test_a_model_that_is_no_function_of_one_example(
        self, before: Callable[[Tensor], Tensor], message: str, capfd: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(ModelError, match=message) as caught:
            export(Linear(before), F.cross_entropy, numbers(6))
        told = str(caught.value)
        assert len(told.splitlines()) == 1
        for inner in ("Traceback", "File ", "\x1b", "site-packages", "torch.export"):
            assert inner not in told
        assert capfd.readouterr() == ("", "")

    def test_a_model_that_gives_several_outputs(self) -> None:
        class Two(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x), x  # type: ignore[return-value]  # the mistake that is tested

        with pytest.raises(ModelError, match="the model gives a tuple: expected one tensor"):
            export(Two(6, 4), F.cross_entropy, numbers(6))

    def test_training_mode(self) -> None:
        for module, cause in ((nn.BatchNorm1d(6), r"GroupNorm.*eval"), (nn.Dropout(0.5), r"Dropout.*eval")):
            model = nn.Sequential(nn.Linear(6, 6), module, nn.Linear(6, 4))
            with pytest.raises(ModelError, match=cause):
                export(model, F.cross_entropy, numbers(6))
            model.eval()
            assert_same(model, F.cross_entropy, numbers(6), export(model, F.cross_entropy, numbers(6)))

    def test_models_that_torch_cannot_train_either(self) -> None:
        with pytest.raises(ModelError, match="no trainable parameter"):
            export(nn.Flatten(), F.cross_entropy, numbers(6))
        with pytest.raises(ModelError, match=r"dtype torch.float64: expected float32"):
            export(nn.Linear(6, 4).double(), F.cross_entropy, numbers(6))

    def test_data_without_examples(self) -> None:
        with pytest.raises(OptionError, match="data = 'none': expected at least one example"):
            export(nn.Linear(6, 4), F.cross_entropy, numbers(6, name="none").take(np.arange(0)))

    def test_one_example_is_enough(self) -> None:
        model, data = nn.Linear(6, 4), numbers(6)
        assert_same(model, F.cross_entropy, data, export(model, F.cross_entropy, data.take(np.arange(1))))

    @pytest.mark.parametrize("precision", ["int8", "int8-weights"])
    def test_int8_with_nothing_to_quantise(self, precision: Precision) -> None:
        model = nn.Sequential(nn.LayerNorm(6))
        with pytest.raises(PlanError, match=r"int8: no convolution and no linear layer to quantise$"):
            export(model, F.cross_entropy, numbers(6, classes=6), precision=precision)
        model = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 4))
        model[0].requires_grad_(False)
        with pytest.raises(PlanError, match="to quantise among the frozen ones"):
            export(model, F.cross_entropy, numbers(6), precision=precision)

    def test_branches_without_a_layer_for_them(self) -> None:
        with pytest.raises(ModelError, match=r"branches: no trainable linear layer or convolution"):
            export(nn.LayerNorm(6), F.cross_entropy, numbers(6, classes=6), branches=True)

    def test_branches_in_fp16(self) -> None:
        with pytest.raises(PlanError, match="branches with precision fp16: expected fp32, int8-weights or int8"):
            export(nn.Linear(6, 4), F.cross_entropy, numbers(6), precision="fp16", branches=True)

    def test_a_branch_that_would_miss_a_use_of_its_weight(self) -> None:
        class Twice(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.hidden, self.head = nn.Linear(6, 6), nn.Linear(6, 4)

            def forward(self, x: Tensor) -> Tensor:
                y = F.linear(torch.relu(self.hidden(x)), self.hidden.weight)  # not through the layer
                return torch.as_tensor(self.head(y))

        model = Twice()
        assert_same(model, F.cross_entropy, numbers(6), export(model, F.cross_entropy, numbers(6)))
        with torch.no_grad():
            model.head.weight.mul_(30)
        with pytest.raises(ModelError, match="the exported graph gives a loss of"):
            export(model, F.cross_entropy, numbers(6), branches=True)


class TestLosses:
    @pytest.mark.parametrize(
        "loss",
        [
            nn.CrossEntropyLoss(label_smoothing=0.1),
            nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5, 1.0]), ignore_index=2, label_smoothing=0.2),
            nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5, 1.0])),
            lambda output, target: F.cross_entropy(output, target, reduction="none", label_smoothing=0.1),
            lambda output, target: F.multi_margin_loss(output, target, reduction="none"),
            nn.NLLLoss(),
        ],
        ids=["smoothed", "all", "weighted", "function", "margin", "nll"],
    )
    def test_any_but_the_plain_ones_go_into_the_graph(self, loss: Loss) -> None:
        model, data = nn.Sequential(nn.Linear(6, 4), nn.LogSoftmax(1)), numbers(6)
        bundle = export(model, loss, data)
        assert bundle.manifest.loss == "graph"
        assert {i.name for i in graph_of(bundle).input} >= {"x", "y"}
        assert [o.name for o in graph_of(bundle).output] == ["outputs", "losses"]
        assert_same(model, loss, data, bundle)
        expected = TorchRuntime(model, loss).evaluate(bundle.initial, data)
        assert np.allclose(OpenVinoRuntime(bundle, 1).evaluate(bundle.initial, data).losses, expected.losses, atol=5e-6)

    def test_probabilities_as_targets(self) -> None:
        data = Dataset(numbers(6).x, np.random.default_rng(1).dirichlet(np.ones(4), 12))
        for loss in (F.cross_entropy, nn.CrossEntropyLoss(weight=torch.arange(1.0, 5.0), label_smoothing=0.1)):
            bundle = export(nn.Linear(6, 4), loss, data)
            assert bundle.manifest.loss == "graph"
            assert bundle.manifest.y == Example((4,), "float32")
            assert OrtRuntime(bundle, 1).evaluate(bundle.initial, data).correct is None
        model = nn.Linear(6, 4)
        assert_same(model, F.cross_entropy, data, export(model, F.cross_entropy, data))

    def test_a_label_a_position(self) -> None:
        class Text(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.embed, self.head = nn.Embedding(9, 5), nn.Linear(5, 9)

            def forward(self, x: Tensor) -> Tensor:
                return torch.as_tensor(self.head(self.embed(x))).transpose(1, 2)

        rng, model = np.random.default_rng(0), Text()
        data = Dataset(rng.integers(0, 9, (12, 7)), rng.integers(0, 9, (12, 7)))
        for loss in (F.cross_entropy, nn.CrossEntropyLoss(label_smoothing=0.1, ignore_index=3)):
            bundle = export(model, loss, data)
            assert bundle.manifest.loss == "graph"
            assert_same(model, loss, data, bundle)

    @pytest.mark.parametrize("loss", [F.cross_entropy, nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="none")])
    def test_plain_cross_entropy_is_taken_on_the_host(self, loss: Loss) -> None:
        labels = numbers(6).y
        assert host_loss(loss, labels) == "cross-entropy"
        assert host_loss(nn.CrossEntropyLoss(ignore_index=0), labels) is None

    @pytest.mark.parametrize("loss", [F.mse_loss, nn.MSELoss()])
    def test_squared_errors_are_taken_on_the_host_and_have_no_accuracy(self, loss: Loss) -> None:
        rng = np.random.default_rng(0)
        for model, shape in ((nn.Linear(6, 3), (3,)), (nn.Sequential(nn.Linear(6, 1), nn.Flatten(0)), ())):
            data = Dataset(rng.normal(size=(12, 6)), rng.normal(size=(12, *shape)))
            bundle = export(model, loss, data)
            assert bundle.manifest.loss == "mse"
            assert [i.name for i in graph_of(bundle).input if i.name == "y"] == []
            assert OrtRuntime(bundle, 1).evaluate(bundle.initial, data).correct is None
            assert_same(model, loss, data, bundle)

    def test_a_loss_that_is_not_per_example_is_explained(self) -> None:
        with pytest.raises(ModelError, match="expected one number per example"):
            export(nn.Linear(6, 4), lambda output, target: F.cross_entropy(output, target), numbers(6))


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


class TestManifest:
    def test_masks_travel_in_the_table(self) -> None:
        masks = {"weight": np.arange(24).reshape(4, 6) % 3 == 0}
        bundle = export(nn.Linear(6, 4), F.cross_entropy, numbers(6), masks=masks)
        again = Bundle.decode(bundle.encode())
        mask = again.manifest.table[0].mask
        assert mask is not None
        assert np.array_equal(mask.reshape(4, 6), masks["weight"])
        assert again.manifest.table[1].mask is None
        assert not again.initial[:24][~masks["weight"].reshape(-1)].any()
        with pytest.raises(ModelError, match=r"mask of bias: bool\[3\]: expected bool\[4\]"):
            export(nn.Linear(6, 4), F.cross_entropy, numbers(6), masks={"bias": np.ones(3, bool)})

    def test_pruned_layers_get_no_branch(self) -> None:
        model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
        masks = {"0.weight": np.arange(30).reshape(5, 6) % 2 == 0}
        bundle = export(model, F.cross_entropy, numbers(6), branches=True, masks=masks)
        assert bundle.manifest.feeds == ("float32", "float32", "branch", "float32")
        expected = losses(TorchRuntime(model, F.cross_entropy, 1, masks=masks), numbers(6))
        assert np.allclose(losses(OrtRuntime(bundle, 1), numbers(6)), expected, atol=5e-6)
        with pytest.raises(ModelError, match=r"branches: .*not pruned"):
            export(nn.Linear(6, 4), F.cross_entropy, numbers(6), branches=True, masks={"weight": np.eye(4, 6) > 0})

    def test_it_says_what_examples_look_like(self) -> None:
        rng = np.random.default_rng(0)
        pixels = Dataset(
            rng.integers(0, 256, (12, 2, 3, 3), np.uint8), np.arange(12) % 4, "p", Scaling((0.1, 0.2), (1, 2))
        )
        manifest = export(nn.Sequential(nn.Flatten(), nn.Linear(18, 4)), F.cross_entropy, pixels).manifest
        assert (manifest.x, manifest.y) == (Example((2, 3, 3), "float32"), Example((), "int64"))
        assert manifest.pixels == Pixels((0.1, 0.2), (1, 2))
        text = nn.Sequential(nn.Embedding(9, 3), nn.Flatten(), nn.Linear(21, 9))
        manifest = export(text, F.cross_entropy, tokens()).manifest
        assert (manifest.x, manifest.pixels) == (Example((7,), "int64"), None)

    @pytest.mark.parametrize("precision", ["fp16", "int8"])
    def test_it_says_the_precision(self, precision: Precision) -> None:
        model = nn.Linear(6, 4)
        bundle = export(nn.Sequential(model), F.cross_entropy, numbers(6), precision=precision)
        assert bundle.manifest.precision == precision
        assert OrtRuntime(bundle, 1).plan["precision"] == precision
        assert OrtRuntime(bundle, 1).plan["bundle"] == bundle.sha256
        assert np.abs(bundle.initial[:24] - model.weight.detach().numpy().reshape(-1)).max() == 0


AGAIN = """
import numpy as np
import torch.nn.functional as F
from baffle.data import Dataset
from baffle.exporter import export
from baffle.models import build

data = Dataset(np.random.default_rng(0).normal(size=(12, 1, 8, 8)), np.arange(12) % 4)
print(export(build("lenet-small", (1, 8, 8), 4), F.cross_entropy, data, precision="int8", branches=True).sha256)
"""


class TestSideEffects:
    @pytest.mark.parametrize("precision", ["fp32", "int8"])
    def test_the_same_model_gives_the_same_bundle(self, precision: Precision) -> None:
        model, data = build("mlp", (1, 8, 8), 4), numbers(1, 8, 8)
        first = export(model, F.cross_entropy, data, precision=precision)
        torch.manual_seed(1)
        second = export(copy.deepcopy(model), F.cross_entropy, data, precision=precision)
        assert first.sha256 == second.sha256
        assert first.encode() == second.encode()

    def test_another_process_in_another_folder_gives_the_same_bundle_and_prints_nothing(self, tmp_path: Path) -> None:
        (tmp_path / "again.py").write_text(AGAIN)
        done = subprocess.run(
            [sys.executable, "-W", "always", "again.py"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONHASHSEED": "7"},
            capture_output=True,
            text=True,
            check=True,
        )
        data = Dataset(np.random.default_rng(0).normal(size=(12, 1, 8, 8)), np.arange(12) % 4)
        model = build("lenet-small", (1, 8, 8), 4)
        assert done.stdout.strip() == export(model, F.cross_entropy, data, precision="int8", branches=True).sha256
        assert done.stderr == ""

    @pytest.mark.parametrize("precision", ["fp32", "int8"])
    def test_a_bundle_tells_nothing_about_the_machine_or_the_source(self, precision: Precision) -> None:
        bundle = export(build("lenet-small", (1, 8, 8), 4), F.cross_entropy, numbers(1, 8, 8), precision=precision)
        for data in (bundle.encode(), *bundle.files.values()):
            for private in (str(Path(baffle.__file__).parents[1]), str(Path.cwd()), "site-packages", ".py", "forward"):
                assert private.encode() not in data

    def test_the_model_stays_as_it_was(self) -> None:
        class Spied(nn.Sequential):
            pass

        model = Spied(nn.Linear(6, 6), nn.BatchNorm1d(6).eval(), nn.Dropout(0.0), nn.Linear(6, 4))
        model[0].requires_grad_(False)
        parameters, state = list(model.parameters()), copy.deepcopy(model.state_dict())
        modes = [m.training for m in model.modules()]
        export(model, F.cross_entropy, numbers(6), branches=True)
        export(model, F.cross_entropy, numbers(6), precision="fp16")
        export(model, F.cross_entropy, numbers(6), precision="int8")
        assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
        assert [m.training for m in model.modules()] == modes
        assert [p.requires_grad for p in parameters] == [False, False, True, True, True, True]
        assert all(p.grad is None and p.dtype == torch.float32 for p in parameters)
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert [type(m) for m in model] == [nn.Linear, nn.BatchNorm1d, nn.Dropout, nn.Linear]

    def test_nothing_is_printed_logged_or_warned_and_no_global_state_changes(
        self, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
    ) -> None:
        models = nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.5)).eval(), nn.Sequential(nn.Conv1d(6, 4, 1), nn.Flatten())
        state, threads, level = torch.get_rng_state(), torch.get_num_threads(), logging.root.manager.disable
        filters = list(warnings.filters)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            export(models[0], nn.CrossEntropyLoss(label_smoothing=0.1), numbers(6), branches=True)
            export(models[1], F.cross_entropy, numbers(6, 1), precision="int8")
        assert warned == []
        assert capfd.readouterr() == ("", "")
        assert [r for r in caplog.records if r.levelno > logging.INFO] == []
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.get_num_threads() == threads
        assert logging.root.manager.disable == level
        assert list(warnings.filters) == filters
