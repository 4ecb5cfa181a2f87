"""The contract that every runtime keeps, on every engine, in every precision, with every strategy."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import msgspec
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from baffle.client.respond import finite_differences
from baffle.core.directions import Directions
from baffle.core.types import Task
from baffle.errors import OptionError
from baffle.exporter import export
from baffle.runtimes import Runtime
from baffle.runtimes.onnx.openvino import OpenVinoRuntime
from baffle.runtimes.onnx.ort import OrtRuntime
from baffle.runtimes.perturb import Perturbations
from baffle.runtimes.pytorch.runtime import TorchRuntime
from contract import (
    HERE,
    SIGMA,
    Float64,
    Kind,
    batch,
    bundle_of,
    linear,
    model_of,
    passes,
    references,
    runtime_of,
)
from helpers import TASK


def task(difference: str = "forward", k: int = 6) -> Task:
    return msgspec.structs.replace(
        TASK, round=1, key=3, difference=difference, num_directions=k, sigma=SIGMA, exponents=(-10,)
    )


@cache
def known(name: str, difference: str) -> tuple[Float64, Float64]:
    """Losses of 20 directions in float64, and their derivatives by backpropagation."""
    runtime = TorchRuntime(model_of(name), F.cross_entropy, threads=1)
    weights, asked, data = runtime.initial_weights(), scalar_passes(runtime, difference), batch()
    double = copy.deepcopy(model_of(name)).double()
    loss = F.cross_entropy(double(torch.from_numpy(data.x.astype(np.float64))), torch.from_numpy(data.y.copy()))
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(double.parameters()))]).numpy()
    entries = [asked.directions.entries(i, slice(0, 20)) for i in range(len(runtime.table))]
    return references(model_of(name), runtime, weights, asked, data), np.concatenate(entries, axis=1) @ gradient


@cache
def known_for_300(name: str) -> Float64:
    """Losses of one direction on 300 examples in float64."""
    runtime = TorchRuntime(model_of(name), F.cross_entropy, threads=1)
    return references(model_of(name), runtime, runtime.initial_weights(), passes(runtime, k=1), batch(300))


def scalar_passes(runtime: Runtime, difference: str) -> Perturbations:
    forward = difference == "forward"
    return passes(runtime, (SIGMA,) if forward else (SIGMA, -SIGMA), baseline=forward, k=20)


@dataclass(frozen=True)
class Case:
    kind: Kind
    name: str

    def __str__(self) -> str:
        return f"{self.kind}-{self.name}"

    @property
    def runtime(self) -> Runtime:
        return runtime_of(self.kind, self.name)

    @property
    def model(self) -> nn.Module:
        return model_of(self.name)


CASES = [Case(kind, name) for kind in HERE for name in kind.models.split()]


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    found: Case = request.param
    return found


class TestContract:
    def test_table_is_the_models(self, case: Case) -> None:
        runtime, named = case.runtime, list(case.model.named_parameters())
        assert [(s.name, s.shape) for s in runtime.table] == [(n, tuple(p.shape)) for n, p in named]
        flat = torch.cat([p.detach().reshape(-1) for _, p in named]).numpy()
        assert np.array_equal(runtime.initial_weights(), flat)

    def test_the_plan_says_how(self, case: Case) -> None:
        plan = case.runtime.plan
        assert (plan["runtime"], plan["precision"], plan["threads"]) == (case.kind.engine, case.kind.precision, 1)
        assert plan.get("strategy", "copies") == case.kind.strategy

    def test_losses_have_the_shape_and_type_of_the_seam(self, case: Case) -> None:
        losses = case.runtime.losses(case.runtime.initial_weights(), passes(case.runtime), batch())
        assert losses.shape == (7, 40)
        assert losses.dtype == np.float32

    @pytest.mark.parametrize("difference", ["forward", "central"])
    def test_losses_and_scalars_agree_with_float64(self, case: Case, difference: str) -> None:
        runtime, (exact, _) = case.runtime, known(case.name, difference)
        losses = runtime.losses(runtime.initial_weights(), scalar_passes(runtime, difference), batch())
        assert np.abs(losses - exact).max() < case.kind.losses
        if not case.kind.exact:  # it computes in what it says, not in something better
            assert np.abs(losses - exact).max() > 1e-5
        got = finite_differences(task(difference, 20), losses)
        if difference == "forward":
            expected = (exact[1:] - exact[0]).mean(axis=1) / SIGMA
        else:
            expected = (exact[::2] - exact[1::2]).mean(axis=1) / (2 * SIGMA)
        bound = case.kind.forward if difference == "forward" else case.kind.central
        assert np.linalg.norm(got - expected) < bound * np.linalg.norm(expected)

    def test_central_scalars_are_directional_derivatives(self, case: Case) -> None:
        runtime, (_, derivatives) = case.runtime, known(case.name, "central")
        losses = runtime.losses(runtime.initial_weights(), scalar_passes(runtime, "central"), batch())
        got = finite_differences(task("central", 20), losses)
        assert np.corrcoef(got, derivatives)[0, 1] > (0.97 if case.kind.precision == "int8" else 0.99)

    @pytest.mark.parametrize("examples", [1, 33, 300])
    def test_batches_of_any_size_give_the_losses_of_their_examples(self, case: Case, examples: int) -> None:
        runtime, data = case.runtime, batch(300).take(np.arange(300 - examples, 300))
        losses = runtime.losses(runtime.initial_weights(), passes(runtime, k=1), data)
        assert losses.shape == (2, examples)
        assert np.abs(losses - known_for_300(case.name)[:, 300 - examples :]).max() < 2 * case.kind.losses

    def test_nothing_handed_over_changes(self, case: Case) -> None:
        runtime, data, before = case.runtime, batch(), copy.deepcopy(case.model.state_dict())
        weights, x, y = runtime.initial_weights(), data.x.copy(), data.y.copy()
        kept = weights.copy()
        runtime.losses(weights, passes(runtime), data)
        runtime.evaluate(weights + 1, data)
        assert np.array_equal(weights, kept)
        assert np.array_equal(runtime.initial_weights(), kept)
        assert np.array_equal(data.x, x)
        assert np.array_equal(data.y, y)
        assert all(torch.equal(value, before[name]) for name, value in case.model.state_dict().items())

    def test_the_same_call_gives_the_same_bits(self, case: Case) -> None:
        runtime = case.runtime
        weights, asked = runtime.initial_weights(), passes(runtime, k=2)
        first = runtime.losses(weights, asked, batch())
        kept = first.copy()
        runtime.losses(weights * 2, asked, batch(7))
        runtime.evaluate(weights - 1, batch(seed=1))
        assert np.array_equal(kept, runtime.losses(weights, asked, batch()))
        assert np.array_equal(kept, first)  # what was given is not a buffer that later calls overwrite

    def test_evaluate_is_the_unperturbed_pass(self, case: Case) -> None:
        runtime, data = case.runtime, batch(300)
        weights = runtime.initial_weights()
        runtime.losses(weights, passes(runtime, k=1), data)  # nothing of a perturbation stays behind
        result = runtime.evaluate(weights, data)
        only = Perturbations(Directions(runtime.table, "rank1", (0, 0)), 0, (), baseline=True)
        assert np.array_equal(result.losses, runtime.losses(weights, only, data)[0])
        with torch.inference_mode():
            hits = case.model(torch.from_numpy(data.x)).argmax(1).numpy() == data.y
        assert result.correct is not None
        assert np.mean(result.correct != hits) <= (0 if case.kind.exact else 0.05)

    @pytest.mark.parametrize(("position", "value"), [(0, np.inf), (-1, np.nan)])
    def test_weights_that_are_not_finite_have_such_losses(self, case: Case, position: int, value: float) -> None:
        runtime = case.runtime
        weights = runtime.initial_weights()
        weights[position] = value
        assert not np.isfinite(runtime.losses(weights, passes(runtime, k=1), batch(7))).any()
        assert not np.isfinite(runtime.evaluate(weights, batch(7)).losses).any()
        weights = runtime.initial_weights()
        assert np.isfinite(runtime.losses(weights, passes(runtime, k=1), batch(7))).all()


THREADED = [k for k in HERE if k.models != "wrn-10-2" and k.strategy == "copies"]


@pytest.mark.parametrize("kind", THREADED, ids=str)
def test_any_number_of_threads_gives_the_same_bits(kind: Kind) -> None:
    name = kind.models.split()[0]
    one = runtime_of(kind, name)
    weights, asked, data = one.initial_weights(), passes(one, (SIGMA, -SIGMA), k=5), batch(300)
    expected, first = one.losses(weights, asked, data), one.evaluate(weights, data)
    for threads in (2, 3):
        many = runtime_of(kind, name, threads)
        assert many.plan["threads"] == threads
        second = many.evaluate(weights, data)
        assert np.array_equal(expected, many.losses(weights, asked, data))
        assert np.array_equal(first.losses, second.losses)
        assert np.array_equal(first.correct, second.correct)  # type: ignore[arg-type]  # labels: never None


@pytest.mark.parametrize("kind", [k for k in HERE if k.strategy != "copies"], ids=str)
@pytest.mark.parametrize("examples", [3, 300])
def test_where_threads_share_a_stack_or_memory_losses_agree(kind: Kind, examples: int) -> None:
    """How many directions or examples go through the model together depends on the threads, and so may the last bit."""
    one, many = (runtime_of(kind, kind.models.split()[0], threads) for threads in (1, 3))
    weights, data = one.initial_weights(), batch(examples)
    for asked in (passes(one, k=7), passes(one, (SIGMA, -SIGMA), k=5)):
        expected, found = one.losses(weights, asked, data), many.losses(weights, asked, data)
        assert np.abs(expected - found).max() < kind.losses
        assert np.array_equal(found, many.losses(weights, asked, data))


UNROUNDED = [c for c in CASES if c.kind.precision == "int8-weights" or (c.kind.exact and c.name == "lenet-small")]


@pytest.mark.parametrize("case", UNROUNDED, ids=str)
@pytest.mark.parametrize("codes", [1, 8])
def test_on_the_lattice_nothing_is_rounded(case: Case, codes: int) -> None:
    runtime = case.runtime
    weights, asked = runtime.initial_weights(), passes(runtime, (SIGMA, -SIGMA), k=2, lattice=codes)
    exact = references(case.model, runtime, weights, asked, batch())
    assert np.abs(runtime.losses(weights, asked, batch()) - exact).max() < 1e-5
    off = references(case.model, runtime, weights, passes(runtime, (SIGMA, -SIGMA), k=2), batch())
    assert np.abs(off - exact).max() > 1e-4  # other weights, or this test would say nothing


MAKERS: dict[str, Callable[[int], Runtime]] = {
    "torch": lambda threads: TorchRuntime(model_of("mlp"), F.cross_entropy, threads),
    "ort": lambda threads: OrtRuntime(bundle_of("mlp"), threads),
    "openvino": lambda threads: OpenVinoRuntime(bundle_of("mlp"), threads),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("threads", [0, -1, 1025])
def test_a_number_of_threads_that_makes_no_sense_is_refused(make: Callable[[int], Runtime], threads: int) -> None:
    with pytest.raises(OptionError, match=f"threads = {threads}: expected an integer"):
        make(threads)


class TestPrecision:
    """Each runtime refuses what it cannot compute in, rather than compute in something else."""

    def test_unknown_names_come_with_the_nearest(self) -> None:
        with pytest.raises(OptionError, match=r"'bf-16': expected one of .* \(did you mean bf16\?\)"):
            TorchRuntime(linear(), F.cross_entropy, precision="bf-16")
        with pytest.raises(OptionError, match=r"'int-8': expected one of .* \(did you mean int8\?\)"):
            OpenVinoRuntime(bundle_of("mlp"), precision="int-8")
        with pytest.raises(OptionError, match=r"'int4': expected one of fp32, fp16, int8-weights, int8"):
            export(linear(), F.cross_entropy, batch(), precision="int4")  # type: ignore[arg-type]  # a user's mistake
