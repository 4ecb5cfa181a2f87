"""Models cut into units: which rows own which features, through which heads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from baffle.errors import ModelError
from baffle.models import build
from baffle.runtimes.pytorch.chain import Chain, find_chain
from baffle.runtimes.pytorch.credit_table import examples_like


def chain_of(model: nn.Module, *shape: int, local: bool = True) -> Chain:
    return find_chain(model.eval(), examples_like(torch.zeros(1, *shape)), local)


def test_a_lenet_has_a_head_of_its_own_and_its_last_layer() -> None:
    chain = chain_of(build("lenet", (1, 28, 28), 10), 1, 28, 28)
    assert [segment.names for segment in chain.segments] == [("0.weight", "0.bias"), ("4.weight", "4.bias")]
    assert [(head.weight, head.count, head.own) for head in chain.heads] == [
        ("0.local_head.weight", 64, False),
        ("9.weight", 64, True),
    ]
    assert chain.segments[0].owners.tolist() == np.repeat(np.arange(16), 4).tolist()  # 2 x 2 cells per channel
    assert chain.segments[1].owners.tolist() == list(range(64))


def test_feature_credit_is_of_what_the_last_layer_sees() -> None:
    chain = chain_of(build("lenet", (1, 28, 28), 10), 1, 28, 28, local=False)
    assert [segment.names for segment in chain.segments] == [("4.weight", "4.bias")]
    assert [head.own for head in chain.heads] == [True]


def test_residual_units_share_the_head_behind_their_sum() -> None:
    chain = chain_of(build("wrn-10-2", (3, 16, 16), 10), 3, 16, 16)
    by_name = {segment.names[0]: segment.head for segment in chain.segments}
    assert len(by_name) == 10
    assert len(chain.heads) == 7
    assert by_name["1.residual.5.weight"] == by_name["1.shortcut.2.weight"]


def test_values_own_features_and_queries_and_keys_share_a_number() -> None:
    chain = chain_of(build("transformer", (1, 8, 8), 10), 1, 8, 8)
    qkv = next(segment for segment in chain.segments if segment.names[0] == "blocks.0.qkv.weight")
    assert qkv.count == 65
    assert qkv.numbers["blocks.0.qkv.weight"].tolist() == [64] * 128 + list(range(64))
    first = chain.segments[0]
    assert first.names == ("embed.weight", "embed.bias", "positions")
    assert set(first.numbers["positions"].tolist()) == {64}


def test_writes_in_place_norms_and_views_do_not_matter() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(144, 10), nn.LogSoftmax(1)
    )
    chain = chain_of(model, 1, 8, 8)
    assert chain.segments[0].names[:2] == ("0.weight", "0.bias")
    assert {"1.weight", "1.bias"} <= set(chain.segments[0].names)
    assert [head.own for head in chain.heads] == [True]
    assert len(chain.tail) == 1


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.inner(self.inner(x)))
        return y


class Unused(Tied):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(x)
        return y


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Tied(), "inner.weight: used 2 times|inner.bias: used 2 times"),
        (Unused(), "used 0 times"),
        (nn.Sequential(nn.Linear(4, 4), nn.Flatten(), nn.Bilinear(4, 4, 2)), "no graph|does not end|inputs"),
        (nn.Sequential(nn.Linear(4, 2), nn.Hardswish(), nn.Unflatten(1, (1, 2))), "outputs of shape"),
    ],
)
def test_a_model_that_has_no_such_chain_is_refused(model: nn.Module, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        chain_of(model, 4)
