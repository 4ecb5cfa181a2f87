"""TorchRuntime: what is trained, how weights and images are laid out, and what is refused."""

from __future__ import annotations

import gc
import weakref
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baffle.data import Dataset, load
from baffle.errors import DataError, ModelError, OptionError, PlanError
from baffle.models import build
from baffle.runtimes.pytorch.runtime import TorchRuntime, load_into, takes_channels_last
from contract import CLASSES, SHAPE, SIGMA, batch, linear, passes
from strategies import asked_of, data_of, layer, losses_of


@pytest.mark.parametrize(
    ("dtype", "off", "same"),
    [
        (torch.float32, 0.0, True),
        (torch.float32, 0.02, False),
        (torch.bfloat16, 0.02, True),
        (torch.bfloat16, 0.5, False),
        (torch.float16, 0.005, True),
        (torch.float16, 0.1, False),
        (torch.float64, 0.0, True),
    ],
)
def test_layouts_are_compared_as_precisely_as_they_compute(dtype: torch.dtype, off: float, same: bool) -> None:
    def outputs(x: Tensor, layout: torch.memory_format) -> Tensor:
        return torch.ones(len(x), 3, dtype=dtype) + off * (layout is torch.channels_last)

    assert takes_channels_last(outputs, (3, 8, 8), torch.device("cpu")) is same


def test_a_runtime_is_freed_with_its_last_reference() -> None:
    """Replicas are as large as the model: they do not wait for the collector of cycles."""
    gc.disable()
    try:
        runtime = TorchRuntime(layer(), F.cross_entropy, 2)
        losses_of(runtime, data_of((6,)), asked_of(runtime))
        replica = weakref.ref(runtime.lanes[1].replica)
        del runtime
        assert replica() is None
    finally:
        gc.enable()


def test_what_cannot_be_evaluated_is_told() -> None:
    runtime = TorchRuntime(layer(), F.cross_entropy, 1)
    weights, data = runtime.initial_weights(), data_of((6,))
    size = len(weights)
    empty = data.take(np.arange(0))
    for call in (partial(runtime.losses, weights, asked_of(runtime)), partial(runtime.evaluate, weights)):
        with pytest.raises(DataError, match="no examples: expected at least one"):
            call(empty)
    for wrong in (weights[:-1], weights.astype(np.float64)):
        with pytest.raises(PlanError, match=rf"weights: float\d+\[\d+\]: expected float32\[{size}\]"):
            runtime.losses(wrong, asked_of(runtime), data)  # type: ignore[arg-type]  # one has the wrong type


class TestPrecision:
    """Each runtime refuses what it cannot compute in, rather than compute in something else."""

    def test_torch_has_no_int8(self) -> None:
        for precision in ("int8", "int8-weights"):
            with pytest.raises(OptionError, match=f"runtime torch.*'{precision}': expected one of fp32, bf16, fp16"):
                TorchRuntime(linear(), F.cross_entropy, precision=precision)


def test_no_autograd_graph_is_ever_built() -> None:
    seen: list[tuple[bool, bool, bool]] = []

    class Spy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled(), x.requires_grad))
            return x

    runtime = TorchRuntime(linear(spy=Spy()), F.cross_entropy)
    runtime.losses(runtime.initial_weights(), passes(runtime), batch())
    runtime.evaluate(runtime.initial_weights(), batch())
    assert set(seen) == {(True, False, False)}


def test_frozen_parameters_are_neither_perturbed_nor_copied() -> None:
    model = build("mlp", SHAPE, CLASSES)
    for p in list(model.parameters())[:-2]:
        p.requires_grad_(False)
    runtime = TorchRuntime(model, F.cross_entropy)
    assert [s.name for s in runtime.table] == ["7.weight", "7.bias"]
    data = batch()
    losses = runtime.losses(runtime.initial_weights(), passes(runtime), data)
    with torch.inference_mode():
        hidden = model[:-1](torch.from_numpy(data.x)).numpy()  # type: ignore[index]  # build gives a Sequential
    scratch = runtime.initial_weights()
    for got, w in zip(losses, passes(runtime).weights(runtime.initial_weights(), scratch), strict=True):
        output = torch.from_numpy(hidden @ w[:640].reshape(10, 64).T + w[640:])
        assert np.allclose(got, F.cross_entropy(output, torch.from_numpy(data.y.copy()), reduction="none"), atol=1e-5)


def test_models_that_cannot_be_trained_are_refused() -> None:
    with pytest.raises(ModelError, match="no trainable parameter"):
        TorchRuntime(nn.Flatten(), F.cross_entropy)
    with pytest.raises(ModelError, match=r"1.weight: dtype torch.float64: expected float32"):
        TorchRuntime(linear().double(), F.cross_entropy)


def test_regression_has_no_accuracy() -> None:
    runtime = TorchRuntime(nn.Sequential(nn.Linear(3, 1), nn.Flatten(0)), F.mse_loss)
    data = Dataset(np.ones((5, 3)), np.zeros(5))
    result = runtime.evaluate(runtime.initial_weights(), data)
    assert result.correct is None
    assert result.losses.shape == (5,)


def test_tied_weights_are_one_tensor() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(10, 10, bias=False)
            self.second = nn.Linear(10, 10, bias=False)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return torch.as_tensor(self.second(self.first(x)))

    runtime = TorchRuntime(Tied(), F.cross_entropy)
    assert [s.name for s in runtime.table] == ["first.weight"]
    weights = np.eye(10, dtype=np.float32).reshape(-1) * 3
    data = Dataset(np.eye(10), np.arange(10))
    expected = F.cross_entropy(torch.eye(10) * 9, torch.arange(10), reduction="none").numpy()
    assert np.allclose(runtime.evaluate(weights, data).losses, expected)


@pytest.mark.parametrize("threads", [2, 3, 16])
def test_passes_side_by_side_have_the_bits_of_one_after_another(threads: int) -> None:
    model, data = build("lenet-small", SHAPE, CLASSES), batch(300)
    one, many = (TorchRuntime(model, F.cross_entropy, n) for n in (1, threads))
    weights, asked = one.initial_weights(), passes(one, (SIGMA, -SIGMA), k=7)
    assert np.array_equal(one.losses(weights, asked, data), many.losses(weights, asked, data))
    first, second = one.evaluate(weights, data), many.evaluate(weights, data)
    assert np.array_equal(first.losses, second.losses)
    assert np.array_equal(first.correct, second.correct)  # type: ignore[arg-type]  # labels: never None


def test_load_into_gives_the_weights_back() -> None:
    model, other = build("lenet-small", SHAPE, CLASSES, 1), build("lenet-small", SHAPE, CLASSES, 2)
    runtime = TorchRuntime(model, F.cross_entropy)
    load_into(other, runtime.table, runtime.initial_weights())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    with pytest.raises(ModelError, match="expected"):
        load_into(linear(), runtime.table, runtime.initial_weights())


class Strided(nn.Module):
    """Reads a convolution's output as it lies in memory; ``how`` says in which way."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.conv, self.head = how, nn.Conv2d(1, 4, 3), nn.Linear(144, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        if self.how == "as_strided":
            flat = torch.as_strided(y, (len(y), 144), (144, 1))
        elif self.how == "permute":
            flat = y.view(len(y), -1) if y.is_contiguous() else y.permute(0, 2, 3, 1).reshape(len(y), -1)
        else:
            assert y.is_contiguous()
            flat = y.reshape(len(y), -1)
        out: torch.Tensor = self.head(flat)
        return out


@pytest.mark.parametrize("how", ["as_strided", "permute", "assert"])
def test_a_model_that_reads_memory_as_it_lies_keeps_the_usual_layout(how: str) -> None:
    model = Strided(how)
    runtime = TorchRuntime(model, F.cross_entropy)
    train, _ = load("digits")
    found = runtime.evaluate(runtime.initial_weights(), train).losses
    with torch.inference_mode():
        expected = F.cross_entropy(
            model(torch.tensor(train.x.tolist())), torch.tensor(train.y.tolist()), reduction="none"
        )
    assert np.allclose(found, expected.numpy(), atol=1e-5)
