"""What is kept of a frozen beginning, what an evaluation may take of memory and threads, and models that do odd
things."""

from __future__ import annotations

import copy
import gc
import sys
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

from baffle.core.types import Family, Losses, make_table
from baffle.data import Dataset
from baffle.errors import DataError, ModelError, OptionError, PlanError
from baffle.runtimes.lanes import side_by_side
from baffle.runtimes.perturb import Point, unperturbed
from baffle.runtimes.pytorch.allocator import give_back_freed_memory, keep_freed_memory
from baffle.runtimes.pytorch.budget import Sizes, _Living, activation_bytes, weight_bytes, within
from baffle.runtimes.pytorch.runtime import STRATEGIES, TorchRuntime, takes_channels_last
from baffle.runtimes.pytorch.threads import one_thread
from runtimes.pytorch.test_stacked import (
    Make,
    With,
    asked_of,
    by,
    data_of,
    exact_losses,
    frozen,
    layer,
    losses_of,
    parameter,
)

CALLS = list[int]()


class Spy(nn.Module):
    """A frozen linear layer that counts the examples it is given, and has a buffer."""

    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inner = frozen(layer(6, 6))
        self.register_buffer("shift", torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        CALLS.append(len(x))
        return torch.tanh(self.inner(x)) + self.shift


def calls_of(runtime: TorchRuntime, data: Dataset, k: int) -> list[int]:
    """Sizes of the calls of spies in one evaluation, when all that is tried once was."""
    losses_of(runtime, data, asked_of(runtime, k=k))
    CALLS.clear()
    losses_of(runtime, data, asked_of(runtime, k=k))
    return CALLS.copy()


def in_place(m: Any, x: Tensor) -> object:
    h = m.a(x)
    h.mul_(2)
    return m.b(h)


def writes_first(m: Any, x: Tensor) -> object:
    h = m.a(x)
    return m.c(h + m.b(h))


class WritesInput(nn.Module):
    """A frozen module that changes what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = frozen(layer(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.inner(x.add_(1))
        return found


class TestFrozenPrefix:
    @pytest.mark.parametrize("strategy", ["copies", "stacked"])
    @pytest.mark.parametrize("k", [1, 5])
    def test_it_is_evaluated_once_a_chunk(self, strategy: str, k: int) -> None:
        model = nn.Sequential(Spy(), layer())
        runtime = TorchRuntime(model, F.cross_entropy, 1, strategy=strategy)
        baseline = [128, 72] if strategy == "stacked" else []  # evaluated apart
        assert calls_of(runtime, data_of((6,), 200), k) == [*baseline, 128, 72]

    @pytest.mark.parametrize("strategy", ["copies", "stacked"])
    def test_nothing_is_ever_stale(self, strategy: str) -> None:
        model = nn.Sequential(Spy(), layer())
        runtime = TorchRuntime(model, F.cross_entropy, 1, strategy=strategy)
        asked, rng = asked_of(runtime), np.random.default_rng(5)
        for examples in (150, 150, 40, 200):
            data = Dataset(rng.normal(size=(examples, 6)), rng.integers(0, 3, examples))
            for _ in range(2):
                exact = exact_losses(model, runtime, data, asked)
                assert np.abs(losses_of(runtime, data, asked) - exact).max() < 2e-6
                assert np.abs(runtime.evaluate(runtime.initial_weights(), data).losses - exact[0]).max() < 2e-6
                data.x[:] = rng.normal(size=data.x.shape)

    @pytest.mark.parametrize(
        "make",
        [
            pytest.param(lambda: nn.Sequential(layer(6, 6), Spy(), layer()), id="behind a trained layer"),
            pytest.param(by(lambda m, x: m.b(m.a(m.a(x))), a=Spy, b=layer), id="called twice"),
            pytest.param(by(lambda m, x: m.b(m.a(x) * m.p), a=Spy, b=layer, p=lambda: parameter(6)), id="gate"),
            pytest.param(
                by(lambda m, x: m.b(m.a(x * m.p)), a=Spy, b=layer, p=lambda: parameter(6)), id="behind a gate"
            ),
            pytest.param(by(in_place, a=Spy, b=layer), id="its output is written on"),
            pytest.param(by(writes_first, a=Spy, b=WritesInput, c=layer), id="writes on its input"),
            pytest.param(lambda: nn.Sequential(torch.jit.script(layer(6, 6)), Spy(), layer()), id="behind a script"),
            pytest.param(lambda: nn.Sequential(nn.Sequential(Spy(), layer(6, 6)), Spy(), layer()), id="nested"),
        ],
    )
    @pytest.mark.parametrize("k", [2, 5])
    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_losses_are_right_wherever_it_stands(self, make: Make, k: int) -> None:
        torch.manual_seed(0)
        model = make()
        runtime, data = TorchRuntime(model, F.cross_entropy, 1), data_of((6,), 20)
        asked, weights = asked_of(runtime, k=k), runtime.initial_weights()
        alone = []
        for w in asked.weights(weights, weights.copy()):
            alone.append(TorchRuntime(model, F.cross_entropy, 1).evaluate(w.copy(), data).losses)
        assert np.array_equal(losses_of(runtime, data, asked), np.stack(alone))

    @pytest.mark.parametrize(
        "make",
        [
            pytest.param(lambda: nn.Sequential(layer(6, 6), Spy(), layer()), id="behind a trained layer"),
            pytest.param(by(lambda m, x: m.b(m.a(m.a(x))), a=Spy, b=layer), id="called twice"),
            pytest.param(by(in_place, a=Spy, b=layer), id="its output is written on"),
        ],
    )
    def test_it_is_not_taken_where_it_changes(self, make: Make) -> None:
        runtime = TorchRuntime(make(), F.cross_entropy, 1)
        few, many = (len(calls_of(runtime, data_of((6,)), k)) for k in (1, 4))
        assert many > few

    def test_within_little_memory_less_is_kept_and_the_losses_are_the_same(self) -> None:
        model, data = nn.Sequential(Spy(), layer()), data_of((6,), 200)
        all_of_it, little = (TorchRuntime(model, F.cross_entropy, 1, memory=m) for m in (10**8, 70_000))
        assert len(calls_of(all_of_it, data, 5)) == 2
        assert len(calls_of(little, data, 5)) > 20
        asked = asked_of(little)
        assert np.abs(losses_of(little, data, asked) - losses_of(all_of_it, data, asked)).max() < 1e-6


BIG = st.integers(1, 2**34)


class TestBudget:
    @given(BIG, BIG, st.integers(0, 2**34), st.integers(1, 4096), st.integers(1, 2**16), BIG)
    def test_sizes_fit_or_the_bytes_needed_are_told(
        self, budget: int, an_example: int, weights: int, examples: int, rows: int, drawn: int
    ) -> None:
        usual = Sizes(examples, rows, drawn)
        try:
            sizes = within(budget, usual, an_example, weights)
        except PlanError as error:
            needed = int(str(error).split("at least ")[1].split()[0])
            assert needed == weights + 2**16 + an_example
            least = within(8 * needed, usual, an_example, weights)  # directions take an eighth at most
            assert least.examples >= 1
            return
        assert 1 <= sizes.examples <= examples
        assert 1 <= sizes.rows <= rows
        assert sizes.kept >= 0
        assert weights + sizes.directions + max(sizes.examples, sizes.rows) * an_example <= budget

    @given(BIG, BIG, st.integers(1, 2**20))
    def test_more_memory_never_means_less_at_once(self, budget: int, more: int, an_example: int) -> None:
        usual = Sizes(64, 4096, 2**16)
        try:
            sizes = within(budget, usual, an_example, 1000)
        except PlanError:
            return
        larger = within(budget + more, usual, an_example, 1000)
        assert larger.examples >= sizes.examples
        assert larger.rows >= sizes.rows

    @pytest.mark.parametrize("precision", ["fp32", "bf16"])
    @pytest.mark.parametrize("examples", [1, 7, 4000])  # a view of a batch is not the batch
    def test_the_activations_of_a_known_model(self, precision: str, examples: int) -> None:
        model = nn.Sequential(nn.Flatten(), nn.Linear(12, 100, bias=False), nn.ReLU(), nn.Linear(100, 3, bias=False))
        runtime = TorchRuntime(model, F.cross_entropy, 1, precision=precision)
        lane, size = runtime.lanes[0].replica, 4 if precision == "fp32" else 2
        point = Point(unperturbed(runtime.table), runtime.initial_weights(), runtime._layouts())
        batch = torch.zeros(examples, 3, 4)
        with torch.inference_mode():
            found = activation_bytes(lane, point, batch[:1])
        weight = 1200 * size  # lives while its layer runs; measured with four examples
        assert abs(found - (12 + 200) * size - weight / 4) <= 12 * size + weight / 4

    def test_the_bytes_of_weights(self) -> None:
        table = make_table({"a": (10, 10), "b": (30,)})
        assert weight_bytes(table, 4, "copies") == 520
        assert weight_bytes(table, 2, "stacked") == 260
        assert weight_bytes(table, 4, "streaming") == 400

    @pytest.mark.parametrize("strategy", STRATEGIES)
    @pytest.mark.parametrize("steps", [(0.02,), (0.02, -0.02)])
    @pytest.mark.parametrize("family", ["rank1", "rademacher"])
    @pytest.mark.parametrize("kind", ["mlp", "images", "frozen"])
    def test_passes_stay_within_it_and_give_the_same_losses(
        self, strategy: str, steps: tuple[float, ...], family: Family, kind: str
    ) -> None:
        torch.manual_seed(0)
        budget, shape = 300_000, (1, 8, 8) if kind == "images" else (64,)
        model = {
            "mlp": lambda: nn.Sequential(layer(64, 128), nn.ReLU(), layer(128, 128), nn.ReLU(), layer(128)),
            "images": lambda: nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), layer(8 * 36)),
            "frozen": lambda: nn.Sequential(frozen(layer(64, 512)), nn.ReLU(), layer(512)),
        }[kind]()
        usual = TorchRuntime(model, F.cross_entropy, 1, strategy=strategy)
        small = TorchRuntime(model, F.cross_entropy, 1, strategy=strategy, memory=budget)
        data, asked = data_of(shape, 400), asked_of(small, steps, family=family, k=8)
        expected, living = losses_of(usual, data, asked), _Living()
        losses_of(small, data, asked)  # what is tried once
        with living:
            losses = losses_of(small, data, asked)
        assert np.abs(losses - expected).max() < 2e-6
        given_and_asked_for = 4 * data.x.size + data.y.nbytes + losses.nbytes
        assert 10_000 < living.most - given_and_asked_for <= budget

    @pytest.mark.parametrize("strategy", STRATEGIES)
    def test_too_little_is_told(self, strategy: str) -> None:
        runtime = TorchRuntime(layer(), F.cross_entropy, 1, strategy=strategy, memory=1000)
        with pytest.raises(PlanError, match=r"memory = 1000 bytes a thread: expected at least 65\d\d\d for"):
            losses_of(runtime, data_of((6,)), asked_of(runtime))

    def test_the_batch_that_comes_first_does_not_decide_the_chunks(self) -> None:
        chosen = set[Sizes]()
        for examples in (1, 10, 3000):
            runtime = TorchRuntime(nn.Sequential(nn.Flatten(), layer(64)), F.cross_entropy, 1)
            runtime.evaluate(runtime.initial_weights(), data_of((8, 8), examples))
            chosen.update(runtime._sizes.values())
        assert len(chosen) == 1


class TestThreads:
    def test_nested_and_restored(self) -> None:
        before = torch.get_num_threads()
        with one_thread():
            with one_thread():
                assert torch.get_num_threads() == 1
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == before

    def test_restored_when_it_fails(self) -> None:
        before = torch.get_num_threads()
        with pytest.raises(ValueError, match="inside"), one_thread():
            raise ValueError("inside")
        assert torch.get_num_threads() == before

    def test_unwanted_it_changes_nothing(self) -> None:
        before = torch.get_num_threads()
        with one_thread(False):
            assert torch.get_num_threads() == before

    def test_from_several_threads(self) -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(3)
        inside, leave = threading.Barrier(3), threading.Barrier(3)

        def work(_: int) -> int:
            with one_thread():
                inside.wait(10)
                found = torch.get_num_threads()
                leave.wait(10)
            return found

        try:
            with one_thread(), ThreadPoolExecutor(3) as pool:
                assert list(pool.map(work, range(3))) == [1, 1, 1]
                assert torch.get_num_threads() == 1
            assert torch.get_num_threads() == 3
        finally:
            torch.set_num_threads(before)

    @pytest.mark.parametrize("parts", [1, 4])
    def test_side_by_side_raises_what_a_worker_raises(self, parts: int) -> None:
        def work(i: int) -> int:
            if i == parts - 1:
                raise ModelError(f"part {i}")
            return i

        with pytest.raises(ModelError, match=f"part {parts - 1}"):
            side_by_side(work, parts)

    def test_side_by_side_keeps_the_order_and_works_at_once(self) -> None:
        together = threading.Barrier(4)

        def work(i: int) -> int:
            together.wait(10)
            return i * i

        assert side_by_side(work, 4) == [0, 1, 4, 9]


@pytest.mark.parametrize("tell", [give_back_freed_memory, keep_freed_memory])
def test_the_c_library_is_told(tell: Callable[[], bool]) -> None:
    glibc = sys.platform == "linux" and bool(sys.modules["os"].confstr("CS_GNU_LIBC_VERSION"))
    assert tell() is glibc


def test_a_glibc_that_refuses_large_thresholds_is_told_a_smaller_one(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int]] = []

    def mallopt(option: int, value: int) -> bool:
        told.append((option, value))
        return option != -3 or value <= 2**25  # M_MMAP_THRESHOLD before glibc 2.35

    monkeypatch.setattr("baffle.runtimes.pytorch.allocator._mallopt", mallopt)
    assert keep_freed_memory()
    assert told == [(-3, 2**30), (-3, 2**25), (-1, 2**30)]


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


@pytest.mark.parametrize("memory", [0, -1, "1GB"])
def test_a_budget_is_a_number_of_bytes(memory: Any) -> None:
    with pytest.raises(OptionError, match=r"memory = .*: expected an integer >= 1"):
        TorchRuntime(layer(), F.cross_entropy, 1, memory=memory)


@pytest.mark.parametrize("trained", [True, False])
def test_a_model_without_numbers_is_refused(trained: bool) -> None:
    model = nn.Sequential(layer(), nn.Linear(2, 2, device="meta").requires_grad_(trained))
    with pytest.raises(ModelError, match=r"1\.weight: on the device meta: expected numbers"):
        TorchRuntime(model, F.cross_entropy, 1)


def writes_on_input(m: Any, x: Tensor) -> object:
    x += 1
    return m.a(x)


def without_grad(m: Any, x: Tensor) -> object:
    with torch.no_grad():
        return m.a(x)


class Doubled(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w * 2


def doubled() -> nn.Module:
    model = layer()
    parametrize.register_parametrization(model, "weight", Doubled())
    return model


class Product(torch.autograd.Function):
    @staticmethod
    def forward(_: object, x: Tensor, w: Tensor) -> Tensor:
        return x @ w.t()


apply: Callable[..., Tensor] = Product.apply


def mapped(m: Any, x: Tensor) -> object:
    return torch.vmap(lambda v: m.w @ v)(x)


# fmt: off
# ruff: noqa: E501
ODD: dict[str, Make] = {
    "writes on its input": by(writes_on_input, a=layer),
    "relu in place": lambda: nn.Sequential(nn.ReLU(inplace=True), layer()),
    "relu in place behind": lambda: nn.Sequential(layer(6, 5), nn.ReLU(inplace=True), layer(5)),
    "in place on frozen": by(in_place, a=lambda: frozen(layer(6, 6)), b=layer),
    "data": by(lambda m, x: F.linear(x, m.w.data), w=lambda: parameter(3, 6)),
    "detach": by(lambda m, x: F.linear(x, m.w.detach()), w=lambda: parameter(3, 6)),
    "no grad": by(without_grad, a=layer),
    "keywords": by(lambda m, x: F.linear(input=x, weight=m.w), w=lambda: parameter(3, 6)),
    "parametrized": doubled,
    "weight norm": lambda: parametrizations.weight_norm(layer()),
    "checkpoint": by(lambda m, x: m.b(checkpoint(m.a, x, use_reentrant=False)), a=lambda: layer(6, 5), b=lambda: layer(5)),
    "function": by(lambda m, x: apply(x, m.w), w=lambda: parameter(3, 6)),
    "vmap": by(mapped, w=lambda: parameter(3, 6)),
    "a number of it": by(lambda m, x: m.a(x) * float(m.p), a=layer, p=lambda: parameter()),
    "a decision": by(lambda m, x: m.a(x) if m.p > 1 else -m.a(x), a=layer, p=lambda: parameter()),
}
# fmt: on


STACKS = {n for n in ODD if " place" in n} | {"writes on its input", "no grad", "keywords", "checkpoint"}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_odd_models_are_evaluated_right_or_refused_as_a_stack(name: str, strategy: str) -> None:
    torch.manual_seed(0)
    model, data = ODD[name](), data_of((6,), 200)
    runtime = TorchRuntime(model, F.cross_entropy, 1, strategy=strategy)
    asked, before, x = asked_of(runtime), copy.deepcopy(model.state_dict()), data.x.copy()
    exact = exact_losses(model, runtime, data, asked)

    def evaluate() -> list[Losses]:
        evaluated = runtime.evaluate(runtime.initial_weights(), data).losses
        return [losses_of(runtime, data, asked), losses_of(runtime, data, asked), evaluated]

    if strategy == "stacked" and name not in STACKS:
        with pytest.raises(ModelError, match="expected copies or streaming"):
            evaluate()
        return
    found = evaluate()
    for losses, expected in zip(found, (exact, exact, exact[0]), strict=True):
        assert np.abs(losses - expected).max() < 3e-6 * max(1, exact.max())
    assert np.array_equal(data.x, x)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def counts(m: Any, x: Tensor) -> object:
    m.count.add_(1)
    m.mean.mul_(0.9)
    return m.a(x)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_buffers_that_a_model_writes_are_its_copys(strategy: str) -> None:
    model = With(counts, a=layer())
    model.register_buffer("count", torch.zeros((), dtype=torch.int64))
    model.register_buffer("mean", torch.ones(3))
    runtime = TorchRuntime(model, F.cross_entropy, 2, strategy=strategy)
    losses_of(runtime, data_of((6,)), asked_of(runtime))
    assert int(model.get_buffer("count")) == 0
    assert model.get_buffer("mean").tolist() == [1, 1, 1]


def fails(_: Any, x: Tensor) -> object:
    raise ValueError(f"no {len(x)}")


@pytest.mark.parametrize(
    ("run", "told"),
    [
        (lambda m, x: (m.a(x), 1), "gives a tuple: expected one tensor"),
        (lambda m, x: None, "gives a NoneType: expected one tensor"),
        (lambda m, x: {"logits": m.a(x)}, "gives a dict: expected one tensor"),
        (fails, "the model failed on inputs"),
    ],
)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_is_no_model_is_told(run: Callable[..., object], told: str, strategy: str) -> None:
    runtime = TorchRuntime(With(run, a=layer()), F.cross_entropy, 1, strategy=strategy)
    data = data_of((6,))
    for call in (
        partial(losses_of, runtime, data, asked_of(runtime)),
        partial(runtime.evaluate, runtime.initial_weights(), data),
    ):
        with pytest.raises(ModelError, match=told):
            call()


def test_a_model_that_cannot_be_copied_is_told() -> None:
    model = layer()
    model.__dict__["extra"] = (torch.ones(2, requires_grad=True) * 2,)  # not a leaf
    with pytest.raises(ModelError, match="the model cannot be copied for a thread: Only Tensors created explicitly"):
        TorchRuntime(model, F.cross_entropy, 1)
