"""Training a part of a model: gains that start at one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from baffle.models import build


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
    from baffle.models import train_only

    torch.manual_seed(0)
    model = Shared() if name == "shared" else build(name, (1, 8, 8), 10)
    x = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        before = model(x)
        train_only(model, "scales")
        assert torch.allclose(model(x), before, atol=1e-5)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all(n.endswith(("gain", "bias")) for n in trained)
    if name == "shared":
        assert trained == ["first.gain", "first.bias", "head.gain", "head.bias"]
