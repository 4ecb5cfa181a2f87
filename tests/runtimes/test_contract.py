"""The contract that every runtime keeps, what all of exported graphs do, and what is particular to each engine."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import openvino
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baffle.client.respond import finite_differences
from baffle.core.directions import Directions
from baffle.core.quantize import on_lattice, row_scales
from baffle.core.types import Array, Family, Task, Weights, make_table
from baffle.data import Dataset, Scaling, load
from baffle.errors import DataError, ModelError, OptionError, PlanError
from baffle.exporter import export
from baffle.models import MODELS, build
from baffle.runtimes import Runtime
from baffle.runtimes.lanes import Lane
from baffle.runtimes.onnx.bundle import Bundle, Example, Feed, Manifest, Precision, make_bundle
from baffle.runtimes.onnx.openvino import OpenVinoRuntime
from baffle.runtimes.onnx.ort import OrtRuntime
from baffle.runtimes.onnx.runtime import Buffers, GraphRuntime
from baffle.runtimes.perturb import Perturbations
from baffle.runtimes.pytorch.runtime import TorchRuntime, load_into
from helpers import TASK

SHAPE, CLASSES, SIGMA = (1, 8, 8), 10, 3e-3
ALL = " ".join(sorted(MODELS))
SOME = "mlp lenet-small transformer wrn-10-2"
HAS_BF16 = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")

Float64 = npt.NDArray[np.float64]
Fed = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Kind:
    """A way to compute, and how far it may be from float64: losses (absolute), scalars of sigma 3e-3 (relative)."""

    engine: str
    precision: str
    branches: bool
    losses: float
    forward: float
    central: float
    models: str
    strategy: str = "copies"
    """Of engine torch."""

    def __str__(self) -> str:
        which = [self.strategy] * (self.strategy != "copies") + ["branches"] * self.branches
        return "-".join([self.engine, self.precision, *which])

    @property
    def exact(self) -> bool:
        return self.precision == "fp32"


# fmt: off
KINDS = (
    #    engine      precision       branches  losses  forward  central  models
    Kind("torch",    "fp32",         False,    5e-6,   0.002,   0.002,   ALL),
    Kind("torch",    "fp32",         False,    5e-6,   0.002,   0.002,   SOME, "stacked"),
    Kind("torch",    "fp32",         False,    5e-6,   0.002,   0.002,   "lenet-small", "streaming"),
    Kind("ort",      "fp32",         False,    5e-6,   0.002,   0.002,   ALL),
    Kind("openvino", "fp32",         False,    5e-6,   0.002,   0.002,   ALL),
    Kind("ort",      "fp32",         True,     5e-6,   0.002,   0.002,   "lenet-small transformer"),
    Kind("openvino", "fp32",         True,     5e-6,   0.002,   0.002,   "lenet-small"),
    Kind("torch",    "fp16",         False,    1e-3,   0.02,    0.01,    "mlp"),
    Kind("torch",    "fp16",         False,    1e-3,   0.02,    0.01,    "mlp", "stacked"),
    Kind("torch",    "fp16",         False,    1e-3,   0.02,    0.01,    "mlp", "streaming"),
    Kind("ort",      "fp16",         False,    1e-3,   0.02,    0.01,    "mlp lenet-small"),
    Kind("openvino", "fp16",         False,    1e-3,   0.02,    0.01,    "mlp"),
    Kind("torch",    "bf16",         False,    0.02,   0.2,     0.08,    "mlp lenet-small transformer"),
    Kind("torch",    "bf16",         False,    0.02,   0.2,     0.08,    "mlp", "stacked"),
    Kind("torch",    "bf16",         False,    0.02,   0.2,     0.08,    "mlp", "streaming"),
    Kind("openvino", "bf16",         False,    0.02,   0.2,     0.08,    "mlp lenet-small transformer"),
    Kind("openvino", "bf16",         True,     0.02,   0.2,     0.08,    "lenet-small"),
    Kind("ort",      "int8-weights", False,    0.03,   0.1,     0.09,    "mlp transformer"),
    Kind("openvino", "int8-weights", False,    0.03,   0.1,     0.09,    "mlp"),
    Kind("ort",      "int8-weights", True,     0.03,   0.015,   0.015,   "mlp wrn-10-2"),
    Kind("openvino", "int8-weights", True,     0.03,   0.015,   0.015,   "mlp"),
    Kind("ort",      "int8",         False,    0.05,   0.25,    0.12,    "mlp lenet-small transformer"),
    Kind("openvino", "int8",         False,    0.05,   0.25,    0.12,    "mlp lenet-small"),
    Kind("ort",      "int8",         True,     0.05,   0.25,    0.12,    "mlp lenet-small"),
    Kind("openvino", "int8",         True,     0.05,   0.25,    0.12,    "mlp"),
    Kind("ort",      "int8",         False,    0.1,    0.4,     0.3,     "wrn-10-2"),
)
# fmt: on
HERE = tuple(k for k in KINDS if HAS_BF16 or (k.engine, k.precision) != ("openvino", "bf16"))


def batch(examples: int = 40, seed: int = 0) -> Dataset:
    rng = np.random.default_rng(seed)
    return Dataset(rng.normal(size=(examples, *SHAPE)), rng.integers(0, CLASSES, examples))


@cache
def model_of(name: str) -> nn.Module:
    return build(name, SHAPE, CLASSES, seed=1)


@cache
def bundle_of(name: str, precision: Precision = "fp32", branches: bool = False) -> Bundle:
    """Exporting takes a second or more: once a kind of bundle."""
    return export(model_of(name), F.cross_entropy, batch(), precision=precision, branches=branches)


@cache
def runtime_of(kind: Kind, name: str, threads: int = 1) -> TorchRuntime | GraphRuntime:
    if kind.engine == "torch":
        how: dict[str, Any] = {"precision": kind.precision, "strategy": kind.strategy}
        return TorchRuntime(model_of(name), F.cross_entropy, threads, **how)
    if kind.precision == "bf16":
        return OpenVinoRuntime(bundle_of(name, "fp32", kind.branches), threads, "bf16")
    bundle = bundle_of(name, msgspec.convert(kind.precision, Precision), kind.branches)
    return OrtRuntime(bundle, threads) if kind.engine == "ort" else OpenVinoRuntime(bundle, threads)


def passes(
    runtime: Runtime,
    steps: tuple[float, ...] = (SIGMA,),
    baseline: bool = True,
    k: int = 6,
    lattice: int = 0,
    family: Family = "rank1",
) -> Perturbations:
    return Perturbations(Directions(runtime.table, family, (3, 1)), k, steps, baseline, lattice=lattice)


def task(difference: str = "forward", k: int = 6) -> Task:
    return msgspec.structs.replace(
        TASK, round=1, key=3, difference=difference, num_directions=k, sigma=SIGMA, exponent=-10
    )


def reference(model: nn.Module, runtime: Runtime, weights: Weights, data: Dataset) -> Float64:
    """Losses in float64 under flat weights, by PyTorch's own functional call: float64[examples]."""
    double = copy.deepcopy(model).double()
    flat = torch.from_numpy(weights.astype(np.float64))
    parameters = {s.name: flat[s.slice].view(s.shape) for s in runtime.table}
    x = torch.from_numpy(np.array(data.inputs()))
    with torch.inference_mode():
        output = torch.func.functional_call(double, parameters, (x.double() if x.is_floating_point() else x,))
        return F.cross_entropy(output, torch.from_numpy(data.y.copy()), reduction="none").numpy()


def references(model: nn.Module, runtime: Runtime, weights: Weights, asked: Perturbations, data: Dataset) -> Float64:
    """Losses in float64 of every pass: float64[passes, examples]."""
    return np.stack([reference(model, runtime, w, data) for w in asked.weights(weights, weights.copy())])


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


LANED = [k for k in HERE if not k.branches and k.precision in ("fp32", "bf16", "int8") and k.models != "wrn-10-2"]


@pytest.mark.parametrize("kind", LANED, ids=str)
def test_a_lane_gives_the_losses_of_all_together(kind: Kind) -> None:
    """One lane after another, and all at once, whatever was evaluated before; a stack of one lane is larger."""
    runtime = runtime_of(kind, kind.models.split()[0], 3)
    weights, asked, data = runtime.initial_weights(), passes(runtime, (SIGMA, -SIGMA), k=5), batch(300)
    others = [passes(runtime, (SIGMA, -SIGMA), baseline=False, k=i + 1) for i in range(3)]
    together = runtime.losses(weights, asked, data)
    lanes: Sequence[Lane[Any]] = runtime.lanes
    assert len(lanes) == 3
    expected, *rest = [lane.losses(weights, asked, data) for lane in lanes]
    assert all(np.array_equal(losses, expected) for losses in rest)
    assert np.array_equal(expected, together) or kind.strategy == "stacked"
    assert np.abs(expected - together).max() < kind.losses
    small = [lane.losses(weights * 2, other, batch(7)) for lane, other in zip(lanes, others, strict=True)]

    def work(i: int) -> bool:
        lane = lanes[i]
        found = [lane.losses(weights, asked, data), lane.losses(weights * 2, others[i], batch(7))]
        found.append(lane.losses(weights, asked, data))
        return all(np.array_equal(a, b) for a, b in zip(found, (expected, small[i], expected), strict=True))

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(work, range(3))) == [True] * 3


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


GRAPHS: dict[str, Callable[[Bundle], Runtime]] = {
    "ort": lambda bundle: OrtRuntime(bundle, threads=1),
    "openvino": lambda bundle: OpenVinoRuntime(bundle, threads=1),
}


@pytest.fixture(params=sorted(GRAPHS))
def engine(request: pytest.FixtureRequest) -> Callable[[Bundle], Runtime]:
    return GRAPHS[request.param]


Engine = Callable[[Bundle], Runtime]


class TestExportedGraphs:
    """What runtimes of client bundles do besides."""

    @pytest.mark.parametrize("family", ["rademacher", "gaussian"])
    def test_other_families_agree_with_float64(self, engine: Engine, family: Family) -> None:
        runtime = engine(bundle_of("mlp"))
        weights, asked = runtime.initial_weights(), passes(runtime, k=3, family=family)
        exact = references(model_of("mlp"), runtime, weights, asked, batch())
        assert np.abs(runtime.losses(weights, asked, batch()) - exact).max() < 5e-6

    @pytest.mark.parametrize("precision", ["fp32", "int8-weights"])
    def test_branches_take_rank1_directions_only(self, engine: Engine, precision: Precision) -> None:
        runtime = engine(bundle_of("mlp", precision, True))
        for family in ("rademacher", "gaussian"):
            with pytest.raises(PlanError, match=f"family '{family}'.*branches: expected rank1"):
                runtime.losses(runtime.initial_weights(), passes(runtime, family=family), batch())

    @pytest.mark.parametrize("precision", ["fp32", "int8-weights", "int8"])
    def test_an_unperturbed_branch_adds_nothing(self, engine: Engine, precision: Precision) -> None:
        plain, branched = (engine(bundle_of("mlp", precision, branches)) for branches in (False, True))
        weights = plain.initial_weights()
        losses = plain.evaluate(weights, batch()).losses
        assert np.abs(losses - branched.evaluate(weights, batch()).losses).max() < 2e-6

    def test_pruned_weights_stay_zero(self, engine: Engine) -> None:
        model, rng = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), np.random.default_rng(0)
        masks = {"1.weight": rng.random((10, 64)) < 0.3}
        torch_runtime = TorchRuntime(model, F.cross_entropy, threads=1, masks=masks)
        runtime = engine(export(model, F.cross_entropy, batch(), masks=masks))
        weights = runtime.initial_weights()
        assert runtime.table == torch_runtime.table
        assert np.array_equal(weights, torch_runtime.initial_weights())
        assert not weights[:640][~masks["1.weight"].reshape(-1)].any()
        expected = torch_runtime.losses(weights, passes(runtime), batch())
        assert np.allclose(runtime.losses(weights, passes(runtime), batch()), expected, atol=5e-6)

    def test_tokens_are_int64(self, engine: Engine) -> None:
        rng = np.random.default_rng(0)
        model = build("transformer", (12,), 2, vocabulary=50)
        data = Dataset(rng.integers(0, 50, (40, 12)), rng.integers(0, 2, 40))
        bundle = token_bundle()
        runtime = engine(bundle)
        weights, asked = runtime.initial_weights(), passes(runtime, k=2)
        exact = references(model, runtime, weights, asked, data)
        assert np.abs(runtime.losses(weights, asked, data) - exact).max() < 5e-6
        with pytest.raises(DataError, match=r"data.x: float32\[40, 12\]: expected int64 \[examples, 12\]"):
            runtime.evaluate(weights, Dataset(data.x.astype(np.float32), data.y))

    def test_bytes_of_pixels_are_scaled(self, engine: Engine) -> None:
        rng = np.random.default_rng(0)
        pixels = Dataset(
            rng.integers(0, 256, (40, 2, 4, 4), np.uint8),
            rng.integers(0, 3, 40),
            "photos",
            Scaling((0.4, 0.5), (0.2, 0.3)),
        )
        model = nn.Sequential(nn.Flatten(), nn.Linear(32, 3))
        bundle = export(model, F.cross_entropy, pixels)
        assert bundle.scaling == pixels.scaling
        runtime = engine(bundle)
        weights, asked = runtime.initial_weights(), passes(runtime, k=2)
        losses = runtime.losses(weights, asked, pixels)
        assert np.abs(losses - references(model, runtime, weights, asked, pixels)).max() < 5e-6
        assert np.array_equal(losses, runtime.losses(weights, asked, Dataset(pixels.inputs(), pixels.y)))
        with pytest.raises(DataError, match=r"photos.x: int64\[40, 2, 4, 4\]: expected float32 \[examples, 2, 4, 4\]"):
            runtime.evaluate(weights, Dataset(pixels.x.astype(np.int64), pixels.y, "photos"))

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (Dataset(batch().x, np.full(40, 12), "d"), r"d.y\[0\] = 12: expected a label in 0..9"),
            (Dataset(batch().x, np.r_[np.zeros(39, int), -1], "d"), r"d.y\[39\] = -1: expected a label in 0..9"),
            (
                Dataset(batch().x[:, :, 1:], batch().y, "d"),
                r"d.x: float32\[40, 1, 7, 8\]: expected float32 \[examples, 1, 8",
            ),
            (
                Dataset(batch().x[:, 0], batch().y, "d"),
                r"d.x: float32\[40, 8, 8\]: expected float32 \[examples, 1, 8, 8\]",
            ),
            (
                Dataset(batch().x.astype(int), batch().y, "d"),
                r"d.x: int64\[40, 1, 8, 8\]: expected float32 \[examples, 1",
            ),
            (Dataset(batch().x, batch().y.astype(np.float32), "d"), r"d.y: float32\[40\]: expected int64 \[examples\]"),
            (Dataset(batch().x, batch().y[:, None], "d"), r"d.y: int64\[40, 1\]: expected int64 \[examples\]"),
        ],
    )
    def test_data_of_another_kind_is_refused(self, engine: Engine, data: Dataset, message: str) -> None:
        runtime = engine(bundle_of("mlp"))
        with pytest.raises(DataError, match=message):
            runtime.losses(runtime.initial_weights(), passes(runtime), data)
        with pytest.raises(DataError, match=message):
            runtime.evaluate(runtime.initial_weights(), data)

    def test_a_graph_that_cannot_be_read_is_told_in_one_line(self, engine: Engine) -> None:
        good = bundle_of("mlp")
        broken = make_bundle(good.manifest, {"model.onnx": b"no graph"}, good.initial)
        with pytest.raises(ModelError, match=r"model.onnx failed: .") as caught:
            engine(broken).evaluate(good.initial, batch())
        assert "\n" not in str(caught.value)

    def test_a_graph_with_inputs_that_the_manifest_does_not_have_is_told(self, engine: Engine) -> None:
        good = bundle_of("mlp")
        first, *rest = good.manifest.table
        renamed = msgspec.structs.replace(good.manifest, table=(msgspec.structs.replace(first, name="other"), *rest))
        with pytest.raises(ModelError, match=first.name):
            engine(Bundle(renamed, good.files)).evaluate(good.initial, batch())


@cache
def token_bundle() -> Bundle:
    rng = np.random.default_rng(0)
    data = Dataset(rng.integers(0, 50, (40, 12)), rng.integers(0, 2, 40))
    return export(build("transformer", (12,), 2, vocabulary=50), F.cross_entropy, data)


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

    def test_torch_has_no_int8(self) -> None:
        for precision in ("int8", "int8-weights"):
            with pytest.raises(OptionError, match=f"runtime torch.*'{precision}': expected one of fp32, bf16, fp16"):
                TorchRuntime(linear(), F.cross_entropy, precision=precision)

    def test_unknown_names_come_with_the_nearest(self) -> None:
        with pytest.raises(OptionError, match=r"'bf-16': expected one of .* \(did you mean bf16\?\)"):
            TorchRuntime(linear(), F.cross_entropy, precision="bf-16")
        with pytest.raises(OptionError, match=r"'int-8': expected one of .* \(did you mean int8\?\)"):
            OpenVinoRuntime(bundle_of("mlp"), precision="int-8")
        with pytest.raises(OptionError, match=r"'int4': expected one of fp32, fp16, int8-weights, int8"):
            export(linear(), F.cross_entropy, batch(), precision="int4")  # type: ignore[arg-type]  # a user's mistake

    def test_ort_has_no_bf16(self) -> None:
        with pytest.raises(OptionError, match=r"runtime ort.*'bf16': expected one of fp32, fp16, int8-weights, int8"):
            export(linear(), F.cross_entropy, batch(), precision="bf16")  # type: ignore[arg-type]  # a user's mistake
        good = bundle_of("mlp")
        manifest = msgspec.structs.replace(good.manifest, precision="bf16")
        with pytest.raises(OptionError, match=r"runtime ort.*'bf16'"):
            OrtRuntime(Bundle(manifest, good.files))

    @pytest.mark.parametrize(("own", "asked"), [("int8", "bf16"), ("int8-weights", "fp32"), ("fp32", "int8")])
    def test_openvino_computes_another_precision_for_fp32_bundles_only(self, own: Precision, asked: str) -> None:
        with pytest.raises(OptionError, match=f"precision = '{asked}': expected {own}, which the bundle"):
            OpenVinoRuntime(bundle_of("mlp", own), precision=asked)

    @pytest.mark.parametrize(("precision", "capability"), [("bf16", "BF16"), ("fp16", "FP16")])
    def test_openvino_refuses_what_the_processor_does_not_have(self, precision: str, capability: str) -> None:
        has = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if capability in has:
            runtime = OpenVinoRuntime(bundle_of("mlp"), 1, precision)
            assert runtime.plan["precision"] == precision
            return
        with pytest.raises(
            OptionError, match=f"precision = '{precision}': expected one that this processor has: .*FP32"
        ):
            OpenVinoRuntime(bundle_of("mlp"), 1, precision)

    @pytest.mark.parametrize("precision", ["bf16", "fp16"])
    def test_openvino_asks_the_processor(self, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
        class Old:
            def get_property(self, device: str, name: str) -> list[str]:
                return ["FP32", "INT8"]

        monkeypatch.setattr(openvino, "Core", Old)
        with pytest.raises(
            OptionError, match=f"precision = '{precision}': expected one that this processor has: FP32, INT8"
        ):
            OpenVinoRuntime(bundle_of("mlp"), 1, precision)

    @pytest.mark.skipif(not HAS_BF16, reason="a processor without bf16")
    def test_bf16_with_a_loss_in_the_graph_is_refused(self) -> None:
        loss = nn.CrossEntropyLoss(label_smoothing=0.1)
        with pytest.raises(PlanError, match=r"bf16 with a loss in the graph.*cross_entropy or mse_loss"):
            OpenVinoRuntime(export(linear(), loss, batch()), 1, "bf16")


@pytest.mark.skipif(not HAS_BF16, reason="a processor without bf16")
@pytest.mark.parametrize("family", ["rank1", "gaussian"])
def test_openvino_takes_matrices_as_bf16(family: Family) -> None:
    """Of weights 1, whose neighbours are 1 - 2**-8 and 1 + 2**-7: less than half way there is nothing."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10, bias=False))
    runtime = OpenVinoRuntime(export(model, F.cross_entropy, batch()), 1, "bf16")
    memory, weights = runtime.lanes[0].replica.buffers["1.weight"], np.ones(640, np.float32)
    directions = Directions(runtime.table, family, (3, 1))
    largest = np.abs(directions.entries(0, slice(0, 1))).max() * directions.unit
    base, small = runtime.losses(weights, Perturbations(directions, 1, (0.99 * 2**-9 / largest,), 1), batch())
    assert memory.dtype == np.uint16
    assert memory.shape == (10, 64)
    assert np.all(memory == 0x3F80)
    assert np.array_equal(base, small)
    step = 2**-7 / largest
    base, large = runtime.losses(weights, Perturbations(directions, 1, (step,), 1), batch())
    assert not np.array_equal(base, large)
    entries = directions.entries(0, slice(0, 1))[0] * np.float32(directions.unit)
    expected = torch.from_numpy(weights + np.float32(step) * entries).to(torch.bfloat16)
    assert np.array_equal(memory.reshape(-1), expected.view(torch.int16).numpy().view(np.uint16))


class TestFeeding:
    """What an engine is fed, by an engine that only takes it down."""

    def test_codes_on_the_lattice_are_the_codes_of_the_weights_plus_or_minus_m(self) -> None:
        for m in (1, 8):
            bundle, weights = toy(("codes", "float32"))
            runtime, fed = recorded(bundle)
            asked = passes(runtime, (SIGMA, -SIGMA), k=5, lattice=m)
            runtime.losses(weights, asked, toy_batch())
            scales = row_scales(bundle.manifest.table[0], weights)
            base = np.rint(weights[:30].reshape(6, 5) / scales[:, None])
            a, b = asked.directions.factors(slice(0, 5))[0]
            expected = [base]
            for k in range(5):
                step = m * a[k][:, None].astype(float) * b[k]
                expected += [base + step, base - step]
            assert len(fed) == 11
            for buffers, codes in zip(fed, expected, strict=True):
                assert np.array_equal(buffers["0.weight.codes"], codes)
                assert np.array_equal(buffers["0.weight.scale"], scales)

    def test_codes_are_the_nearest_to_the_perturbed_weights_on_the_scales_of_the_unperturbed(self) -> None:
        bundle, weights = toy(("codes", "float32"))
        runtime, fed = recorded(bundle)
        asked = passes(runtime, (SIGMA, -SIGMA), k=3)
        runtime.losses(weights, asked, toy_batch())
        scales = row_scales(bundle.manifest.table[0], weights)
        for buffers, perturbed in zip(fed, asked.weights(weights, weights.copy()), strict=True):
            assert np.array_equal(buffers["0.weight.scale"], scales)
            units = perturbed[:30].reshape(6, 5) / scales[:, None]
            assert np.abs(buffers["0.weight.codes"] - units).max() <= 0.5
            assert np.array_equal(buffers["0.bias"], perturbed[30:])

    @pytest.mark.parametrize("feed", ["branch", "codes+branch"])
    @pytest.mark.parametrize("lattice", [0, 2])
    def test_beside_a_branch_the_weight_never_moves(self, feed: Feed, lattice: int) -> None:
        bundle, weights = toy((feed, "float32"))
        runtime, fed = recorded(bundle)
        asked = passes(runtime, (SIGMA, -SIGMA), k=3, lattice=lattice)
        runtime.losses(weights, asked, toy_batch())
        table = bundle.manifest.table
        kept = on_lattice(table, weights) if lattice else weights
        for buffers, perturbed in zip(fed, asked.weights(weights, weights.copy()), strict=True):
            if feed == "branch":
                assert np.array_equal(buffers["0.weight"].reshape(-1), kept[:30])
            else:
                units = kept[:30].reshape(6, 5) / row_scales(table[0], weights)[:, None]
                assert np.array_equal(buffers["0.weight.codes"], np.rint(units))
            product = np.outer(buffers["0.weight.left"], buffers["0.weight.right"])
            assert np.allclose(kept[:30].reshape(6, 5) + product, perturbed[:30].reshape(6, 5), atol=1e-7)
            assert np.array_equal(buffers["0.bias"], perturbed[30:])
        assert not fed[0]["0.weight.left"].any()

    def test_half_precision_weights_are_the_perturbed_ones_rounded(self) -> None:
        bundle, weights = toy(("float16", "float16"))
        weights[0] = 1e6  # more than float16 has: infinite, without a warning
        runtime, fed = recorded(bundle)
        asked = passes(runtime, k=2)
        runtime.losses(weights, asked, toy_batch())
        for buffers, perturbed in zip(fed, asked.weights(weights, weights.copy()), strict=True):
            with np.errstate(over="ignore"):
                half = perturbed.astype(np.float16)
            assert np.array_equal(buffers["0.weight"].reshape(-1), half[:30])
            assert np.array_equal(buffers["0.bias"], half[30:])

    def test_chunks_are_of_one_size_and_the_last_is_padded_with_an_example_of_its_own(self) -> None:
        bundle, weights = toy(("float32", "float32"))
        runtime, fed = recorded(bundle)
        data = toy_batch(300)
        losses = runtime.losses(weights, passes(runtime, k=0), data)
        assert losses.shape == (1, 300)
        assert [buffers["x"].shape for buffers in fed] == [(128, 5)] * 3
        assert np.array_equal(np.concatenate([buffers["x"] for buffers in fed])[:300], data.x)
        assert np.array_equal(np.concatenate([buffers["y"] for buffers in fed])[:300], data.y)
        assert np.array_equal(fed[2]["x"][44:], np.repeat(data.x[256:257], 84, axis=0))

    @pytest.mark.parametrize(
        ("low", "high", "zero"), [(-2.0, 1.0, 170), (2.0, 5.0, 0), (-5.0, -2.0, 255), (-1.0, 3.0, 64), (0.0, 0.0, 0)]
    )
    def test_activation_codes_hold_the_measured_range_and_zero_for_all_passes(
        self, low: float, high: float, zero: int
    ) -> None:
        bundle, weights = toy(("codes", "float32"), activations=("x",))
        runtime, fed = recorded(bundle, {"x.min": low, "x.max": high})
        runtime.losses(weights, passes(runtime, k=3), toy_batch(300))
        assert len(fed) == 3 * 4
        width = max(high, 0) - min(low, 0)
        for buffers in fed:
            assert buffers["x.zero"] == zero
            assert buffers["x.scale"] == pytest.approx(max(width / 255, 1e-12))

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_activations_that_are_not_finite_have_such_losses(self, value: float) -> None:
        bundle, weights = toy(("codes", "float32"), activations=("x",))
        runtime, _ = recorded(bundle, {"x.min": 0.0, "x.max": value})
        assert np.isnan(runtime.losses(weights, passes(runtime), toy_batch())).all()
        assert np.isnan(runtime.evaluate(weights, toy_batch()).losses).all()


def toy(feeds: tuple[Feed, ...], activations: tuple[str, ...] = ()) -> tuple[Bundle, Weights]:
    """A bundle of a linear layer 5 -> 6 without a graph."""
    table = make_table({"0.weight": (6, 5), "0.bias": (6,)})
    weights = np.random.default_rng(0).normal(size=36).astype(np.float32)
    manifest = Manifest(
        table=table,
        feeds=feeds,
        precision="fp32",
        loss="cross-entropy",
        x=Example((5,), "float32"),
        y=Example((), "int64"),
        pixels=None,
        activations=activations,
        files={},
    )
    return make_bundle(manifest, {"model.onnx": b""}, weights), weights


def toy_batch(examples: int = 8) -> Dataset:
    rng = np.random.default_rng(1)
    return Dataset(rng.normal(size=(examples, 5)), rng.integers(0, 6, examples))


def recorded(bundle: Bundle, ranges: Mapping[str, float] | None = None) -> tuple[GraphRuntime, list[Fed]]:
    """A runtime whose outputs are 0, and what it was fed, run by run of the model on more than one example."""
    fed: list[Fed] = []

    @dataclass
    class Program:
        file: str
        buffers: Buffers

        def run(self) -> Mapping[str, Array]:
            if self.file == "ranges.onnx":
                return {name: np.float32(value) for name, value in (ranges or {}).items()}  # type: ignore[misc]
            if len(self.buffers["x"]) > 1:
                fed.append({name: array.copy() for name, array in self.buffers.items()})
            return {"outputs": np.zeros((len(self.buffers["x"]), 6), np.float32)}

    return GraphRuntime(bundle, Program, {}, threads=1), fed


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
    with pytest.raises(ModelError, match=r"shape \(\) for 40 examples: expected one number per example"):
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
