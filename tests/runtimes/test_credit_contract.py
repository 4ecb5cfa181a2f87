"""Every engine gives the numbers of a credited model that PyTorch gives in float32, which tests/runtimes/pytorch holds
against derivatives by autograd."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import msgspec
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from baffle.core.credit import part_of, sizes_of, units_of
from baffle.core.directions import Directions
from baffle.data import Dataset
from baffle.errors import BundleError, PlanError
from baffle.exporter import export
from baffle.models import build
from baffle.runtimes import CreditEvaluator, Runtime
from baffle.runtimes.credit import Float64, map_of
from baffle.runtimes.onnx.bundle import Bundle, Precision
from baffle.runtimes.onnx.openvino import OpenVinoRuntime
from baffle.runtimes.onnx.ort import OrtRuntime
from baffle.runtimes.perturb import Perturbations
from baffle.runtimes.pytorch.credit import CreditRuntime
from contract import HAS_BF16

SIGMA, K, BOUNDS = 3e-3, 3, (0, 7, 12, 20)

# engine, precision, credit, lattice, largest relative error of a unit's numbers
KINDS = [
    ("torch", "fp32", "local", 0, 1e-9),
    ("torch", "bf16", "local", 0, 0.5),
    ("ort", "fp32", "local", 0, 2e-4),
    ("openvino", "fp32", "local", 0, 2e-4),
    ("ort", "fp32", "feature", 0, 2e-4),
    ("openvino", "fp32", "feature", 0, 2e-4),
    ("ort", "fp32", "global", 0, 2e-4),
    ("openvino", "fp32", "global", 0, 2e-4),
    ("ort", "fp16", "local", 0, 0.03),
    ("openvino", "fp16", "local", 0, 0.03),
    ("openvino", "bf16", "local", 0, 0.5),
    ("ort", "int8-weights", "local", 8, 1e-3),
    ("openvino", "int8-weights", "local", 8, 1e-3),
    ("ort", "int8", "local", 8, 0.15),
    ("openvino", "int8", "local", 8, 0.15),
]
HERE = [kind for kind in KINDS if HAS_BF16 or kind[:2] != ("openvino", "bf16")]


def data(count: int = 20) -> Dataset:
    rng = np.random.default_rng(4)
    return Dataset(rng.standard_normal((count, 1, 8, 8)).astype(np.float32), rng.integers(0, 10, count))


@cache
def model() -> nn.Module:
    return build("lenet-small", (1, 8, 8), 10, seed=1)


@cache
def bundle(credit: str, precision: str = "fp32") -> Bundle:
    return export(model(), F.cross_entropy, data(), credit=credit, precision=msgspec.convert(precision, Precision))


def runtime(engine: str, precision: str, credit: str, threads: int = 1) -> CreditRuntime | OrtRuntime | OpenVinoRuntime:
    if engine == "torch":
        return CreditRuntime(model(), F.cross_entropy, data(), credit=credit, threads=threads, precision=precision)
    if precision == "bf16":
        return OpenVinoRuntime(bundle(credit), threads, "bf16")
    own = bundle(credit, precision)
    return OrtRuntime(own, threads) if engine == "ort" else OpenVinoRuntime(own, threads)


def numbers(of: CreditEvaluator, like: Runtime, lattice: int = 0, batch: Dataset | None = None) -> Float64:
    groups = np.arange(BOUNDS[-1]) % 2
    asked = Perturbations(Directions(like.table, "rank1", (3, 1)), K, (SIGMA, -SIGMA), baseline=0, lattice=lattice)
    return of.credits(like.initial_weights(), asked, batch or data(), groups, BOUNDS)


@cache
def expected(credit: str, lattice: int) -> Float64:
    reference = CreditRuntime(model(), F.cross_entropy, data(), credit=credit, threads=1)
    return numbers(reference, reference, lattice)


@pytest.mark.parametrize(("engine", "precision", "credit", "lattice", "error"), HERE)
def test_each_unit_has_the_numbers_of_pytorch(
    engine: str, precision: str, credit: str, lattice: int, error: float
) -> None:
    made = runtime(engine, precision, credit)
    found, wanted = numbers(made, made, lattice), expected(credit, lattice)
    sizes = sizes_of(made.table, K * (len(BOUNDS) - 1))
    for unit, part in zip(units_of(made.table), part_of(sizes), strict=True):
        off = np.linalg.norm(found[:, part] - wanted[:, part]) / np.linalg.norm(wanted[:, part])
        assert off <= error, (unit, off)


@pytest.mark.parametrize("engine", ["ort", "openvino"])
def test_threads_change_no_bit(engine: str) -> None:
    one, two = (runtime(engine, "fp32", "local", threads) for threads in (1, 2))
    assert numbers(one, one).tobytes() == numbers(two, two).tobytes()


@pytest.mark.parametrize("engine", ["ort", "openvino"])
def test_weights_that_are_not_finite_give_numbers_that_are_not(engine: str) -> None:
    made = runtime(engine, "fp32", "local")
    weights = made.initial_weights()
    weights[0] = np.nan
    asked = Perturbations(Directions(made.table, "rank1", (3, 1)), 1, (SIGMA,), baseline=0)
    assert np.isnan(made.credits(weights, asked, data(), np.zeros(20, np.int64), (0, 20))).all()


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


def test_blocks_survive_the_archive_and_do_not_fit_another_table() -> None:
    made = bundle("local")
    assert Bundle.decode(made.encode()).sha256 == made.sha256
    assert made.manifest.blocks is not None
    blocks = made.manifest.blocks
    one, rows, heads = msgspec.structs.replace, blocks.rows, blocks.heads
    for changed, expected in (
        (one(blocks, heads=heads[:-1]), "files|blocks of units"),
        (one(blocks, rows=rows[:-1]), "files|blocks of units"),
        (one(blocks, rows=(one(rows[0], reads=("y",)), *rows[1:])), "rows 0 read y"),
        (one(blocks, rows=(one(rows[0], owners=(9999,)), *rows[1:])), "owners"),
        (one(blocks, heads=(one(heads[0], weight="no"), *heads[1:])), "head 0: weight no"),
    ):
        edited = Bundle(msgspec.structs.replace(made.manifest, blocks=changed), made.files)
        with pytest.raises(BundleError, match=expected):
            Bundle.decode(edited.encode())


def test_a_number_without_features_adds_all_of_them_up() -> None:
    assert map_of(np.array([1, 0, 1]), 2).tolist() == [[0, 1], [1, 0], [0, 1]]
    assert map_of(np.array([-1, -1]), 1).tolist() == [[1], [1]]
