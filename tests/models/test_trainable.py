"""Which parameters are trained: everything else is frozen, and a model with new gains computes what it did before."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from baffle.errors import OptionError
from baffle.models import build
from baffle.models.trainable import train_only


def trained(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad]


@pytest.mark.parametrize(
    ("which", "expected"),
    [
        ("all", ["1.weight", "1.bias", "4.weight", "4.bias", "7.weight", "7.bias"]),
        ("head", ["7.weight", "7.bias"]),
        ("*.bias", ["1.bias", "4.bias", "7.bias"]),
        ("?.weight", ["1.weight", "4.weight", "7.weight"]),
        ("4.weight", ["4.weight"]),
        ("scales", ["1.gain", "1.bias", "4.gain", "4.bias", "7.gain", "7.bias"]),
    ],
)
def test_the_parameters_that_are_named_and_no_others(which: str, expected: list[str]) -> None:
    model = build("mlp", (1, 8, 8), 10)
    train_only(model, which)
    assert trained(model) == expected


@pytest.mark.parametrize("name", ["mlp", "lenet-small", "wrn-10-2"])
def test_gains_of_one_change_no_output(name: str) -> None:
    model, x = build(name, (1, 8, 8), 10), torch.randn(5, 1, 8, 8)
    with torch.no_grad():
        before = model(x)
        train_only(model, "scales")
        assert torch.allclose(model(x), before, atol=1e-6)


def test_a_layer_with_two_names_gets_one_gain() -> None:
    layer = nn.Linear(3, 3)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    train_only(model, "scales")
    assert model[0] is model[2]
    assert trained(model) == ["0.gain", "0.bias"]


@pytest.mark.parametrize("which", ["tail", "", "weight"])
def test_where_nothing_would_be_trained_the_names_are_listed(which: str) -> None:
    with pytest.raises(OptionError, match=r"all, head, scales, or a pattern of parameter names \(1\.weight, 1\.bias"):
        train_only(build("mlp", (1, 8, 8), 10), which)


class Shared(nn.Module):
    """One layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.second = self.first
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.second(torch.relu(self.first(x.flatten(1)))))
        return y


@pytest.mark.parametrize("name", ["mlp", "lenet-small", "wrn-10-2", "transformer", "shared"])
def test_gains_of_one_change_nothing(name: str) -> None:
    torch.manual_seed(0)
    model = Shared() if name == "shared" else build(name, (1, 8, 8), 10)
    x = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        before = model(x)
        train_only(model, "scales")
        assert torch.allclose(model(x), before, atol=1e-5)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert names
    assert all(n.endswith(("gain", "bias")) for n in names)
    if name == "shared":
        assert names == ["first.gain", "first.bias", "head.gain", "head.bias"]
