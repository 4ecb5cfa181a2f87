"""Models and losses that cannot be evaluated example by example are refused, with the way out."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baffle.data import Dataset
from baffle.errors import ModelError
from baffle.runtimes.pytorch.runtime import TorchRuntime
from contract import batch, linear, passes
from strategies import layer


@pytest.mark.parametrize("trained", [True, False])
def test_a_model_without_numbers_is_refused(trained: bool) -> None:
    model = nn.Sequential(layer(), nn.Linear(2, 2, device="meta").requires_grad_(trained))
    with pytest.raises(ModelError, match=r"1\.weight: on the device meta: expected numbers"):
        TorchRuntime(model, F.cross_entropy, 1)


def test_batchnorm_in_training_mode_is_refused_with_the_way_out() -> None:
    with pytest.raises(ModelError, match=r"norm \(BatchNorm1d\).*GroupNorm.*eval"):
        TorchRuntime(linear(norm=nn.BatchNorm1d(10)), F.cross_entropy)
    with pytest.raises(ModelError, match="GroupNorm"):
        TorchRuntime(linear(norm=nn.BatchNorm1d(10, track_running_stats=False)).eval(), F.cross_entropy)


def test_batchnorm_in_eval_mode_keeps_its_buffers() -> None:
    model = linear(norm=nn.BatchNorm1d(10)).eval()
    runtime = TorchRuntime(model, F.cross_entropy)
    runtime.losses(runtime.initial_weights(), passes(runtime), batch())
    norm = model.get_submodule("norm")
    assert isinstance(norm, nn.BatchNorm1d)
    assert norm.running_mean is not None
    assert norm.num_batches_tracked is not None
    assert not norm.running_mean.any()
    assert int(norm.num_batches_tracked) == 0


def test_dropout_in_training_mode_is_refused() -> None:
    with pytest.raises(ModelError, match=r"Dropout.*eval"):
        TorchRuntime(linear(drop=nn.Dropout(0.5)), F.cross_entropy)
    TorchRuntime(linear(drop=nn.Dropout(0.0)), F.cross_entropy)
    TorchRuntime(linear(drop=nn.Dropout(0.5)).eval(), F.cross_entropy)


def test_dropout_inside_other_modules_is_refused() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, dropout=0.5)

    with pytest.raises(ModelError, match=r"attention \(MultiheadAttention\).*eval"):
        TorchRuntime(Attention(), F.cross_entropy)
    with pytest.raises(ModelError, match="LSTM"):
        TorchRuntime(nn.LSTM(3, 3, num_layers=2, dropout=0.5), F.cross_entropy)
    TorchRuntime(Attention().eval(), F.cross_entropy)


def test_losses_with_more_dimensions_are_averaged_for_each_example() -> None:
    data = Dataset(np.arange(12).reshape(4, 3) / 10, np.zeros((4, 2), np.float32))
    model = nn.Linear(3, 2)
    for loss in (F.mse_loss, nn.MSELoss()):
        runtime = TorchRuntime(model, loss)
        with torch.no_grad():
            expected = model(torch.from_numpy(data.x)).square().mean(1).numpy()
        assert np.allclose(runtime.evaluate(runtime.initial_weights(), data).losses, expected)


@pytest.mark.parametrize(
    "loss",
    [
        F.cross_entropy,
        nn.CrossEntropyLoss(),
        nn.CrossEntropyLoss(reduction="none"),
        lambda output, target: F.cross_entropy(output, target, reduction="none"),
    ],
)
def test_losses_of_torch_and_of_the_users_own(loss: Callable[..., Tensor]) -> None:
    model = linear()
    expected = TorchRuntime(model, F.cross_entropy)
    got = TorchRuntime(model, loss)
    weights, data = got.initial_weights(), batch()
    assert np.array_equal(got.evaluate(weights, data).losses, expected.evaluate(weights, data).losses)
    if isinstance(loss, nn.CrossEntropyLoss):
        assert loss.reduction in ("mean", "none")
