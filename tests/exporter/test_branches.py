"""Rank-1 side branches: which layers get one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baffle.errors import ModelError, PlanError
from baffle.exporter import export
from baffle.runtimes.onnx.ort import OrtRuntime
from baffle.runtimes.pytorch.runtime import TorchRuntime
from exported import assert_same, losses, numbers


class TestRefusals:
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


class TestManifest:
    def test_pruned_layers_get_no_branch(self) -> None:
        model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
        masks = {"0.weight": np.arange(30).reshape(5, 6) % 2 == 0}
        bundle = export(model, F.cross_entropy, numbers(6), branches=True, masks=masks)
        assert bundle.manifest.feeds == ("float32", "float32", "branch", "float32")
        expected = losses(TorchRuntime(model, F.cross_entropy, 1, masks=masks), numbers(6))
        assert np.allclose(losses(OrtRuntime(bundle, 1), numbers(6)), expected, atol=5e-6)
        with pytest.raises(ModelError, match=r"branches: .*not pruned"):
            export(nn.Linear(6, 4), F.cross_entropy, numbers(6), branches=True, masks={"weight": np.eye(4, 6) > 0})
