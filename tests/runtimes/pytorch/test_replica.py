"""A thread's copy of the model: streaming has the bits of copies, and the user's model is never changed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baffle.data import Dataset, load
from baffle.errors import ModelError
from baffle.models import MODELS
from baffle.runtimes.pytorch.replica import Replica
from baffle.runtimes.pytorch.runtime import STRATEGIES, TorchRuntime
from contract import SIGMA, batch, linear, model_of, passes
from strategies import REFUSED, STACKABLE, With, asked_of, data_of, frozen, layer, losses_of, made, runtime_of


def counts(m: Any, x: Tensor) -> object:
    m.count.add_(1)
    m.mean.mul_(0.9)
    return m.a(x)


class TestStreaming:
    @pytest.mark.parametrize("name", [*STACKABLE, *REFUSED])
    @pytest.mark.parametrize("precision", ["fp32", "bf16"])
    def test_it_has_the_bits_of_copies(self, name: str, precision: str) -> None:
        make, shape = STACKABLE[name] if name in STACKABLE else REFUSED[name][:2]
        model, data = made(make, shape), data_of(shape)
        streaming, copies = runtime_of(model, "streaming", precision), runtime_of(model, "copies", precision)
        for asked in (asked_of(copies), asked_of(copies, (0.02,), lattice=2), asked_of(copies, family="gaussian")):
            assert np.array_equal(losses_of(streaming, data, asked), losses_of(copies, data, asked))
        a, b = (r.evaluate(r.initial_weights(), data).losses for r in (streaming, copies))
        assert np.array_equal(a, b)

    def test_one_layer_has_its_weights_at_a_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        alive, most = weakref.WeakSet[torch.UntypedStorage](), list[int]()
        written = Replica.written

        def spy(self: Replica, *args: object) -> Tensor:
            most.append(sum(s.nbytes() for s in alive))
            made = written(self, *args)  # type: ignore[arg-type]
            alive.add(made.untyped_storage())
            return made

        monkeypatch.setattr(Replica, "written", spy)
        model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(6)])
        runtime = runtime_of(model, "streaming")
        data = data_of((8,))
        losses_of(runtime, data, asked_of(runtime))
        runtime.evaluate(runtime.initial_weights(), data)
        assert len(most) > 100
        assert max(most) <= 4 * 8 * 8  # its own weight, when the bias is made

    @pytest.mark.parametrize("strategy", ["streaming", "stacked"])
    @pytest.mark.parametrize("call", ["losses", "evaluate"])
    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_a_use_that_is_hidden_is_told(self, strategy: str, call: str) -> None:
        runtime = runtime_of(nn.Sequential(torch.jit.script(layer(6, 5)), layer(5)), strategy)
        weights, data = runtime.initial_weights(), data_of((6,))
        run = (
            partial(runtime.evaluate, weights)
            if call == "evaluate"
            else partial(losses_of, runtime, asked=asked_of(runtime))
        )
        with pytest.raises(ModelError, match=r"0.weight: no function was seen to use it"):
            run(data=data)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("where", ["first", "last", "all", "frozen"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_copies_perturb_what_torchscript_has(where: str, precision: str) -> None:
    torch.manual_seed(0)
    first, between, last = layer(6, 5), frozen(layer(5, 5)), layer(5)
    plain = nn.Sequential(first, between, last)
    script: Callable[[nn.Module], nn.Module] = torch.jit.script
    parts: Sequence[nn.Module] = (
        script(first) if where == "first" else first,
        script(between) if where == "frozen" else between,
        script(last) if where == "last" else last,
    )
    scripted = script(plain) if where == "all" else nn.Sequential(*parts)
    a, b = runtime_of(scripted, "copies", precision), runtime_of(plain, "copies", precision)
    losses = losses_of(a, data_of((6,)), asked_of(a))
    assert np.array_equal(losses, losses_of(b, data_of((6,)), asked_of(b)))
    assert np.ptp(losses, axis=0).min() > 1e-3


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


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_streaming_and_copies_give_the_same_bits(name: str, precision: str) -> None:
    how: dict[str, Any] = {"threads": 1, "precision": precision}
    copies, streaming = (
        TorchRuntime(model_of(name), F.cross_entropy, **how, strategy=s) for s in ("copies", "streaming")
    )
    weights, asked = copies.initial_weights(), passes(copies, (SIGMA, -SIGMA), k=2)
    assert np.array_equal(copies.losses(weights, asked, batch()), streaming.losses(weights, asked, batch()))
    assert np.array_equal(copies.evaluate(weights, batch()).losses, streaming.evaluate(weights, batch()).losses)


def test_a_loss_that_is_not_per_example_is_explained() -> None:
    runtime = TorchRuntime(linear(), lambda output, target: F.cross_entropy(output, target))
    with pytest.raises(ModelError, match=r"shape \(\) for 40 examples: expected one number per example"):
        runtime.evaluate(runtime.initial_weights(), batch())


def test_labels_that_the_loss_refuses_are_explained() -> None:
    runtime = TorchRuntime(linear(), F.cross_entropy)
    data = Dataset(batch().x, np.full(40, 12))
    with pytest.raises(ModelError, match=r"outputs \(40, 10\) and targets \(40,\).*12 is out of bounds"):
        runtime.evaluate(runtime.initial_weights(), data)


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
