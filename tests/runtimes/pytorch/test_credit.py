"""Numbers of credited models, against derivatives by autograd and plain loops."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import baffle as bf
from baffle.client.respond import numbers_of, perturbations
from baffle.core.credit import part_of, sizes_of, units_of
from baffle.core.directions import Directions
from baffle.core.rebuild import gradient
from baffle.core.types import Task
from baffle.data import Dataset
from baffle.runtimes.credit import Float64
from baffle.runtimes.pytorch.credit import CreditRuntime
from baffle.runtimes.pytorch.runtime import TorchRuntime
from helpers import TASK

SIGMA = 1e-3


def model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.Hardswish(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 2), nn.Hardswish(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
        )  # fmt: skip


def data(count: int = 24) -> Dataset:
    rng = np.random.default_rng(1)
    return Dataset(rng.standard_normal((count, 1, 8, 8)).astype(np.float32), rng.integers(0, 3, count))


def derivatives(net: nn.Module, batch: Dataset) -> dict[str, Float64]:
    """The gradient of the mean loss by autograd, tensor by tensor."""
    names, parameters = zip(*net.named_parameters(), strict=True)
    loss = F.cross_entropy(net(torch.from_numpy(batch.x)), torch.from_numpy(batch.y))
    slopes = torch.autograd.grad(loss, parameters)
    return {name: slope.reshape(-1).double().numpy() for name, slope in zip(names, slopes, strict=True)}


def task_for(runtime: CreditRuntime, directions: int, slices: int = 1, **changes: object) -> Task:
    sizes = sizes_of(runtime.table, directions * slices)
    return msgspec.structs.replace(
        TASK, num_directions=directions, slices=slices, sigma=SIGMA, unit_sizes=sizes,
        exponents=(-20,) * len(sizes), **changes,
    )  # fmt: skip


def by_unit(runtime: CreditRuntime, task: Task, numbers: Float64) -> dict[str, Float64]:
    names = [runtime.table[unit.tensors[0]].name for unit in units_of(runtime.table)]
    return {name: numbers[part] for name, part in zip(names, part_of(task.sizes), strict=True)}


def test_an_exact_head_has_the_gradient_of_autograd() -> None:
    net, batch = model(), data()
    runtime = CreditRuntime(net, F.cross_entropy, batch, threads=2)
    task = task_for(runtime, 1)
    [numbers] = numbers_of(task, runtime.table, runtime, runtime.initial_weights(), [batch])
    slopes = derivatives(net, batch)
    expected = np.concatenate([slopes["7.weight"], slopes["7.bias"]])
    assert np.allclose(by_unit(runtime, task, numbers)["7.weight"], expected, atol=2e-5)


def test_rows_before_the_last_layer_have_its_gradient_on_average() -> None:
    """The last convolution is credited through the model's own head: with many directions its rows' numbers rebuild
    the exact gradient of the loss."""
    net, batch = model(), data()
    runtime = CreditRuntime(net, F.cross_entropy, batch)
    task = task_for(runtime, 3000)
    [numbers] = numbers_of(task, runtime.table, runtime, runtime.initial_weights(), [batch])
    integers = np.rint(np.ldexp(numbers, 20)).astype(np.int64)
    found = gradient([(Directions.of(task, runtime.table, 0), integers)], task, 1)
    slopes = derivatives(net, batch)
    for name in ("3.weight", "3.bias"):
        spec, expected = next(spec for spec in runtime.table if spec.name == name), slopes[name]
        error = np.linalg.norm(found[spec.slice] - expected) / np.linalg.norm(expected)
        assert error < 0.12, (name, error)  # rows of 16 weights and a bias: about sqrt(17 / 3000) = 0.075


def test_one_scalar_per_direction_beside_an_exact_head_is_that_of_the_whole_loss() -> None:
    net, batch = model(), data()
    runtime = CreditRuntime(net, F.cross_entropy, batch, credit="global")
    task = task_for(runtime, 4)
    weights = runtime.initial_weights()
    [numbers] = numbers_of(task, runtime.table, runtime, weights, [batch])
    plain = TorchRuntime(net, F.cross_entropy)
    base = plain.evaluate(weights, batch).losses.astype(np.float64).mean()
    directions = perturbations(task, runtime.table, 0).directions
    for k in range(4):
        moved = weights.copy()
        for i, spec in enumerate(runtime.table):
            if spec.credit.kind == "loss":
                moved[spec.slice] += np.float32(SIGMA) * directions.entries(i, slice(k, k + 1))[0]
        slope = (plain.evaluate(moved, batch).losses.astype(np.float64).mean() - base) / SIGMA
        assert numbers[k] == pytest.approx(slope, rel=1e-2, abs=1e-3)


@pytest.mark.parametrize("credit", ["local", "feature", "global"])
@pytest.mark.parametrize("difference", ["forward", "central"])
def test_clients_together_threads_and_micro_batches_change_nothing(credit: str, difference: str) -> None:
    net = model()
    clients = [data(20), data(150), data(9)]
    runtimes = [CreditRuntime(net, F.cross_entropy, clients[0], credit=credit, threads=n) for n in (1, 2)]
    weights = runtimes[0].initial_weights()
    task = task_for(runtimes[0], 2, 4, difference=difference)
    together = [numbers_of(task, r.table, r, weights, clients) for r in runtimes]
    for one, two, alone in zip(*together, clients, strict=True):
        assert one.tobytes() == two.tobytes()
        [own] = numbers_of(task, runtimes[0].table, runtimes[0], weights, [alone])
        assert np.allclose(own, one, rtol=1e-2, atol=2e-3)


def test_pruned_entries_get_no_gradient() -> None:
    net = model()
    mask = np.random.default_rng(0).random((6, 4, 2, 2)) > 0.5
    runtime = CreditRuntime(net, F.cross_entropy, data(), masks={"3.weight": mask})
    task = task_for(runtime, 3)
    [numbers] = numbers_of(task, runtime.table, runtime, runtime.initial_weights(), [data()])
    integers = np.rint(np.ldexp(numbers, 20)).astype(np.int64)
    found = gradient([(Directions.of(task, runtime.table, 0), integers)], task, 1)
    spec = next(spec for spec in runtime.table if spec.name == "3.weight")
    assert not found[spec.slice][~mask.reshape(-1)].any()
    assert found[spec.slice][mask.reshape(-1)].any()


@pytest.mark.parametrize("bits", [4, 1])
def test_digits_are_learned_in_few_passes_and_a_secure_sum_has_the_same_bits(bits: int) -> None:
    train, test = bf.load("digits")
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Hardswish(), nn.Linear(32, 10))
    hashes = []
    for aggregate in (bf.weighted_sum(), bf.secure_sum()):
        runtime = CreditRuntime(net, F.cross_entropy, train, threads=1)
        method = bf.Method(
            num_directions=5, slices=4, bits=bits, batch_size=16, sigma=SIGMA, aggregate=aggregate,
            optimizer=bf.adam(0.03, schedule=bf.cosine(rounds=40)),
        )  # fmt: skip
        engine = bf.LocalEngine(runtime, bf.partition(train, clients=5))
        run = bf.train(method, engine, runtime.initial_weights(), rounds=40, test=test)
        assert run.accuracy is not None
        assert run.accuracy > 0.88
        hashes.append(run.weights_sha256)
    assert hashes[0] == hashes[1]
    assert run.summary()["forward_passes"] == 41 * 5 * 6
