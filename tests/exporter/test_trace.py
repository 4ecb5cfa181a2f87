"""The traced graph: its inputs are the weights, and its losses are the model's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor, nn

from baffle.data import Dataset
from baffle.errors import ModelError
from baffle.exporter import export
from baffle.exporter.trace import host_loss
from baffle.models import build
from baffle.runtimes.onnx.bundle import Example
from baffle.runtimes.onnx.openvino import OpenVinoRuntime
from baffle.runtimes.onnx.ort import OrtRuntime
from baffle.runtimes.pytorch.runtime import TorchRuntime
from exported import Loss, assert_same, graph_of, numbers, weight_inputs


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
