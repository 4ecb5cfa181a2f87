"""Credited models that the tests of every engine evaluate: a small model, its bundles, and their numbers."""

from __future__ import annotations

from functools import cache

import msgspec
import numpy as np
import torch.nn.functional as F
from torch import nn

from baffle.core.directions import Directions
from baffle.data import Dataset
from baffle.exporter import export
from baffle.models import build
from baffle.runtimes import CreditEvaluator, Runtime
from baffle.runtimes.credit import Float64
from baffle.runtimes.onnx.bundle import Bundle, Precision
from baffle.runtimes.onnx.openvino import OpenVinoRuntime
from baffle.runtimes.onnx.ort import OrtRuntime
from baffle.runtimes.perturb import Perturbations
from baffle.runtimes.pytorch.credit import CreditRuntime

SIGMA, K, BOUNDS = 3e-3, 3, (0, 7, 12, 20)


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
