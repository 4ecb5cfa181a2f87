"""Export of credited models: losses inside the graph, and what is refused."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from baffle.errors import PlanError
from baffle.exporter import export
from baffle.runtimes.onnx.openvino import OpenVinoRuntime
from baffle.runtimes.onnx.ort import OrtRuntime
from baffle.runtimes.pytorch.credit import CreditRuntime
from credited import data, model, numbers


def smoothed(outputs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(outputs, y, reduction="none", label_smoothing=0.1)


def of_logarithms(outputs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.nll_loss(outputs, y, reduction="none")


@pytest.mark.parametrize(
    ("loss", "tail"), [(smoothed, []), (of_logarithms, [nn.LogSoftmax(1)]), (F.cross_entropy, [nn.Tanh()])]
)
def test_a_loss_in_the_graph_and_layers_behind_the_last_matrix(
    loss: Callable[..., torch.Tensor], tail: list[nn.Module]
) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.Hardswish(), nn.Linear(12, 10), *tail)
    reference = CreditRuntime(net, loss, data(), threads=1)
    made = export(net, loss, data(), credit="local")
    assert made.manifest.blocks is not None
    assert made.manifest.blocks.loss
    wanted = numbers(reference, reference)
    for engine in (OrtRuntime(made, 1), OpenVinoRuntime(made, 1)):
        assert np.allclose(numbers(engine, engine), wanted, rtol=0, atol=2e-3 * np.abs(wanted).max())


def test_what_no_head_can_say_in_a_bundle_is_refused() -> None:
    with pytest.raises(PlanError, match="branches with credit local: a row has signs of its own"):
        export(model(), F.cross_entropy, data(), credit="local", branches=True)
    plain = export(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), F.cross_entropy, data())
    with pytest.raises(PlanError, match="without blocks gives one scalar per direction: export it with credit"):
        numbers(OrtRuntime(plain, 1), OrtRuntime(plain, 1))
