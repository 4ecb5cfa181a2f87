"""The contract that every runtime keeps, and what is particular to PyTorch."""

from __future__ import annotations

import copy
from collections.abc import Callable

import msgspec
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baffle.client import finite_differences
from baffle.data import Dataset, load
from baffle.directions import Directions
from baffle.errors import ModelError
from baffle.models import MODELS, build
from baffle.perturb import Perturbations
from baffle.runtimes import Runtime
from baffle.runtimes.pytorch import TorchRuntime, load_into
from baffle.types import Task, Weights
from helpers import TASK

RUNTIMES: dict[str, Callable[[nn.Module], Runtime]] = {
    "torch": lambda model: TorchRuntime(model, F.cross_entropy, threads=1),
}
SHAPE, CLASSES, SIGMA = (1, 8, 8), 10, 3e-3


def batch(examples: int = 40, seed: int = 0) -> Dataset:
    rng = np.random.default_rng(seed)
    return Dataset(rng.normal(size=(examples, *SHAPE)), rng.integers(0, CLASSES, examples))


def passes(runtime: Runtime, steps: tuple[float, ...] = (SIGMA,), baseline: bool = True, k: int = 6) -> Perturbations:
    return Perturbations(Directions(runtime.table, "rank1", (3, 1)), k, steps, baseline)


def task(difference: str = "forward", k: int = 6) -> Task:
    return msgspec.structs.replace(
        TASK, round=1, key=3, difference=difference, num_directions=k, sigma=SIGMA, exponent=-10
    )


def reference_losses(model: nn.Module, runtime: Runtime, weights: Weights, data: Dataset) -> Tensor:
    """Per-example losses in float64 under flat weights, by PyTorch's own functional call."""
    double = copy.deepcopy(model).double()
    flat = torch.from_numpy(weights.astype(np.float64))
    parameters = {s.name: flat[s.slice].view(s.shape) for s in runtime.table}
    output = torch.func.functional_call(double, parameters, (torch.from_numpy(data.x.astype(np.float64)),))
    return F.cross_entropy(output, torch.from_numpy(data.y.copy()), reduction="none")


@pytest.fixture(params=sorted(MODELS))
def model(request: pytest.FixtureRequest) -> nn.Module:
    return build(request.param, SHAPE, CLASSES, seed=1)


@pytest.fixture(params=sorted(RUNTIMES))
def runtime(request: pytest.FixtureRequest, model: nn.Module) -> Runtime:
    return RUNTIMES[request.param](model)


class TestContract:
    def test_table_is_the_models(self, runtime: Runtime, model: nn.Module) -> None:
        assert [(s.name, s.shape) for s in runtime.table] == [(n, tuple(p.shape)) for n, p in model.named_parameters()]
        flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()]).numpy()
        assert np.array_equal(runtime.initial_weights(), flat)

    def test_losses_have_the_shape_and_type_of_the_seam(self, runtime: Runtime) -> None:
        losses = runtime.losses(runtime.initial_weights(), passes(runtime), batch())
        assert losses.shape == (7, 40)
        assert losses.dtype == np.float32

    def test_losses_agree_with_float64(self, runtime: Runtime, model: nn.Module) -> None:
        weights, data, asked = runtime.initial_weights(), batch(), passes(runtime, (SIGMA, -SIGMA))
        losses = runtime.losses(weights, asked, data)
        scratch = np.empty_like(weights)
        for got, perturbed in zip(losses, asked.weights(weights, scratch), strict=True):
            expected = reference_losses(model, runtime, perturbed, data).detach().numpy()
            assert np.abs(got - expected).max() < 5e-6

    @pytest.mark.parametrize("difference", ["forward", "central"])
    def test_scalars_agree_with_float64(self, runtime: Runtime, model: nn.Module, difference: str) -> None:
        weights, data, k = runtime.initial_weights(), batch(), 20
        forward = difference == "forward"
        asked = passes(runtime, (SIGMA,) if forward else (SIGMA, -SIGMA), baseline=forward, k=k)
        got = finite_differences(task(difference, k), runtime.losses(weights, asked, data))
        exact = [
            reference_losses(model, runtime, w, data).detach().numpy() for w in asked.weights(weights, weights.copy())
        ]
        if forward:
            expected = np.array([(row - exact[0]).mean() / SIGMA for row in exact[1:]])
        else:
            pairs = zip(exact[::2], exact[1::2], strict=True)
            expected = np.array([(plus - minus).mean() / (2 * SIGMA) for plus, minus in pairs])
        assert np.linalg.norm(got - expected) < 2e-3 * np.linalg.norm(expected)

    def test_central_scalars_are_directional_derivatives(self, runtime: Runtime, model: nn.Module) -> None:
        weights, data = runtime.initial_weights(), batch()
        asked = passes(runtime, (SIGMA, -SIGMA), baseline=False)
        got = finite_differences(task("central"), runtime.losses(weights, asked, data))
        double = copy.deepcopy(model).double()
        loss = F.cross_entropy(double(torch.from_numpy(data.x.astype(np.float64))), torch.from_numpy(data.y.copy()))
        gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(double.parameters()))]).numpy()
        entries = [asked.directions.entries(i, slice(0, 6)) for i in range(len(runtime.table))]
        expected = np.concatenate(entries, axis=1) @ gradient
        assert np.corrcoef(got, expected)[0, 1] > 0.99

    def test_nothing_handed_over_changes(self, runtime: Runtime, model: nn.Module) -> None:
        before = copy.deepcopy(model.state_dict())
        weights = runtime.initial_weights()
        kept = weights.copy()
        runtime.losses(weights, passes(runtime), batch())
        runtime.evaluate(weights + 1, batch())
        assert np.array_equal(weights, kept)
        assert np.array_equal(runtime.initial_weights(), kept)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    def test_the_same_call_gives_the_same_bits(self, runtime: Runtime) -> None:
        weights = runtime.initial_weights()
        first = runtime.losses(weights, passes(runtime), batch())
        runtime.losses(weights * 2, passes(runtime), batch(7))
        assert np.array_equal(first, runtime.losses(weights, passes(runtime), batch()))

    def test_evaluate_is_the_unperturbed_pass(self, runtime: Runtime, model: nn.Module) -> None:
        weights, data = runtime.initial_weights(), batch(300)
        result = runtime.evaluate(weights, data)
        only = Perturbations(Directions(runtime.table, "rank1", (0, 0)), 0, (), baseline=True)
        assert np.array_equal(result.losses, runtime.losses(weights, only, data)[0])
        with torch.inference_mode():
            hits = model(torch.from_numpy(data.x)).argmax(1).numpy() == data.y
        assert result.correct is not None
        assert np.array_equal(result.correct, hits)


def linear(**extra: nn.Module) -> nn.Sequential:
    layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    for name, module in extra.items():
        layers.add_module(name, module)
    return layers


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


def test_models_that_cannot_be_trained_are_refused() -> None:
    with pytest.raises(ModelError, match="no trainable parameter"):
        TorchRuntime(nn.Flatten(), F.cross_entropy)
    with pytest.raises(ModelError, match=r"1.weight: dtype torch.float64: expected float32"):
        TorchRuntime(linear().double(), F.cross_entropy)


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


def test_a_loss_that_is_not_per_example_is_explained() -> None:
    runtime = TorchRuntime(linear(), lambda output, target: F.cross_entropy(output, target))
    with pytest.raises(ModelError, match=r"shape \(\) for 40 examples: expected one number an example"):
        runtime.evaluate(runtime.initial_weights(), batch())


def test_labels_that_the_loss_refuses_are_explained() -> None:
    runtime = TorchRuntime(linear(), F.cross_entropy)
    data = Dataset(batch().x, np.full(40, 12))
    with pytest.raises(ModelError, match=r"outputs \(40, 10\) and targets \(40,\).*12 is out of bounds"):
        runtime.evaluate(runtime.initial_weights(), data)


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


def test_a_pass_takes_one_thread_and_the_setting_comes_back() -> None:
    before = torch.get_num_threads()
    seen: list[int] = []

    class Spy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(torch.get_num_threads())
            return x

    runtime = TorchRuntime(linear(spy=Spy()), F.cross_entropy, threads=2)
    runtime.losses(runtime.initial_weights(), passes(runtime), batch())
    assert set(seen) == {1}
    assert torch.get_num_threads() == before


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


def test_whatever_a_model_raises_is_told() -> None:
    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise KeyError("no such thing")

    runtime = TorchRuntime(Failing(), F.cross_entropy)
    with pytest.raises(ModelError, match="no such thing"):
        runtime.evaluate(runtime.initial_weights(), load("digits")[1])
