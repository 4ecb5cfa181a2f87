"""Speed of the clients' work: a round against the reference loops, the floor, the perceptron.

All three are sections of bench/performance/__main__.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from rich.progress import Progress

from baffle.core.cores import cores
from baffle.core.state import State
from baffle.core.types import Sharing, Task
from baffle.data import Dataset, partition
from baffle.engines.local import LocalEngine
from baffle.runtimes import Runtime
from bench.performance import references
from bench.performance.references import torch_threads
from bench.performance.results import Result, compare, in_turn
from bench.performance.workloads import (
    SIGMA,
    WORKLOADS,
    asked,
    exported,
    precisions,
    runtimes,
    seconds,
    shortlist,
    unperturbed,
)

if TYPE_CHECKING:
    from bench.performance import graphs

_SHARING: tuple[Sharing, ...] = ("shared", "per-client")


def pair(batch: Dataset) -> references.Batch:
    """Inputs and targets as tensors."""
    return torch.from_numpy(batch.inputs()), torch.from_numpy(batch.y)


def rate(work: Callable[[], object], samples: int, threads: int = 1) -> float:
    """Samples a second of a piece of work, with so many threads in PyTorch's own kernels."""
    with torch_threads(threads):
        started = time.perf_counter()
        work()
        return samples / (time.perf_counter() - started)


def best(samples: dict[str, list[float]], prefix: str) -> str:
    """Of the names that start so, the one with the highest median."""
    return max((n for n in samples if n.startswith(prefix)), key=lambda n: float(np.median(samples[n])))


def loops(work: Callable[[], object], samples: int, name: str) -> dict[str, Callable[[], float]]:
    """A reference with one thread and with one a core, of which the better one counts."""
    return {f"{name}, {t} thread{'s' if t > 1 else ''}": partial(rate, work, samples, t) for t in sorted({1, cores()})}


def task(num_directions: int, sharing: Sharing) -> Task:
    """What a server asks of its clients, as the paper has it: K + 1 passes over a mini-batch of 32."""
    return Task(
        round=1,
        key=1,
        family="rank1",
        sharing=sharing,
        difference="forward",
        num_directions=num_directions,
        sigma=SIGMA,
        lattice=0,
        exponents=(-12,),
        clip=None,
        batch_size=32,
        local_steps=1,
        local_lr=0.0,
        quantum=1,
        state_sha256=b"",
    )


def whole_round(runtime: Runtime, data: Dataset, clients: int, asks: Task) -> float:
    """Samples forwarded a second by the local engine: draw, evaluate, encode, for every client."""
    engine = LocalEngine(runtime, partition(data, clients))
    weights = runtime.initial_weights()
    state = State(0, 0, weights, {}, weights)
    started = time.perf_counter()
    done = engine.exchange(asks, range(clients), state, [])
    return done.samples_forwarded / (time.perf_counter() - started)


def round_(quick: bool, progress: Progress) -> list[Result]:
    """LeNet, 10 clients x batch 32, K = 100, in fp32 and bf16, against R1, R2 and R4, in samples a second.

    R1 and R2 go through one client after another, so one client stands for ten: their samples a second are the same.
    """
    workload, turns, num_directions = WORKLOADS["lenet"], 2 if quick else 5, 10 if quick else 100
    data, one, whole = workload.examples(640), pair(workload.examples(32)), pair(workload.examples(320))
    model = workload.model()
    generator = torch.Generator().manual_seed(0)

    def r1() -> object:
        return references.published(model, [one], num_directions, SIGMA, generator)

    def r2() -> object:
        return references.vmapped(model, one, num_directions, SIGMA, generator, chunk=10)

    works = loops(r1, 32 * (num_directions + 1), "R1") | loops(r2, 32 * (num_directions + 1), "R2")
    works |= loops(lambda: references.gradient(model, whole), 320, "R4")
    plans: dict[str, str] = {}
    for precision in precisions()[:2]:
        made = runtimes(workload, precision)
        chosen = next(iter(shortlist(made, asked, workload.examples(320))))
        for sharing in _SHARING:
            name = f"{precision}, {sharing} directions"
            plans[name] = chosen
            works[name] = partial(whole_round, made[chosen], data, 10, task(num_directions, sharing))
    samples = in_turn(works, turns, progress, "round")
    results = []
    targets = {"fp32, shared directions": 1.8, "bf16, shared directions": 4.0}
    for name, plan in plans.items():
        for reference in ("R1", "R2", "R4"):
            of, target = f"to {reference}", targets.get(name) if reference == "R1" else None
            measured = {"ours": samples[name], reference: samples[best(samples, reference)]}
            note = f"{plan}; {best(samples, reference)}"
            results.append(
                compare(name, measured, "ours", reference, of=of, unit="samples/s", target=target, note=note)
            )
    return results


def floor(quick: bool, progress: Progress) -> list[Result]:
    """K perturbed passes against R3: K unperturbed ones on our fastest runtime; and against constant weights."""
    turns, budget = (2, 0.05) if quick else (5, 0.4)
    results = []
    for name in ("lenet", "wrn-10-2", "transformer"):
        for precision in precisions():
            made = runtimes(WORKLOADS[name], precision)
            small = WORKLOADS[name].examples(32)
            chosen = next(iter(shortlist(made, asked, small)))
            lowest, expected = next(iter(shortlist(made, unperturbed, small).items()))
            for size in (32, 320):
                passes = max(4, min(100, int(budget / (expected * size / 32))))
                passes += -passes % cores()  # as many on every core
                found = Floor(name, precision, size, chosen, lowest, passes)
                results += found.measure(made, turns, progress)
    return results


@dataclass(frozen=True)
class Floor:
    """One comparison with R3: which model, of our runtimes which perturbs and which does not, and K."""

    name: str
    precision: str
    size: int
    chosen: str
    lowest: str
    passes: int

    def measure(self, made: dict[str, Runtime], turns: int, progress: Progress) -> list[Result]:
        """The figure, and beside it the one with constant weights where OpenVINO is installed."""
        workload, ours = WORKLOADS[self.name], made[self.chosen]
        batch, case = workload.examples(self.size), f"{workload.title}, {self.precision}, batch {self.size}"
        works: dict[str, Callable[[], float]] = {
            "ours": lambda: 1000 * seconds(ours, asked(ours, self.passes), batch) / self.passes
        }
        for name in sorted({self.lowest, self.chosen}):
            works[f"R3, {name}"] = partial(self._plain, made[name], batch)
        if "openvino" in made:
            from bench.performance import graphs

            folded = graphs.ConstantFolded(exported(workload), batch, self.precision)
            works["constants"] = lambda: 1000 * _passes(folded, self.passes) / self.passes
        samples, k = in_turn(works, turns, progress, case), f"K = {self.passes}"
        lowest = min((n for n in samples if n.startswith("R3")), key=lambda n: float(np.median(samples[n])))
        samples["R3"] = samples[lowest]
        note, of = f"{self.chosen}; {lowest}; {k}", "to R3"
        found = [compare(case, samples, "ours", "R3", of=of, unit="ms", target=1.15, wanted="at most", note=note)]
        if "constants" in samples:
            of = "to constant weights"
            found.append(compare(case, samples, "ours", "constants", of=of, unit="ms", note=f"{self.chosen}, {k}"))
        return found

    def _plain(self, runtime: Runtime, batch: Dataset) -> float:
        return 1000 * seconds(runtime, unperturbed(runtime, self.passes), batch) / self.passes


def _passes(folded: graphs.ConstantFolded, passes: int) -> float:
    """Seconds of unperturbed passes with constant weights."""
    started = time.perf_counter()
    folded.outputs(passes)
    return time.perf_counter() - started


def mlp(quick: bool, progress: Progress) -> list[Result]:
    """MLP 784-256-10, one batch of 32, K = 1,000: against R1 with one client, and with one copy per direction."""
    workload, turns, num_directions = WORKLOADS["mlp"], 2 if quick else 5, 100 if quick else 1000
    batch = workload.examples(32)
    model, generator = workload.model(), torch.Generator().manual_seed(0)
    passes = num_directions + 1

    def ours(runtime: Runtime) -> float:
        return passes / seconds(runtime, asked(runtime, num_directions, baseline=1), batch)

    works = loops(lambda: references.published(model, [pair(batch)], num_directions, SIGMA, generator), passes, "loop")
    chosen: dict[str, str] = {}
    for precision in precisions()[:2]:
        made = runtimes(workload, precision)
        chosen[precision] = next(iter(shortlist(made, asked, batch, passes=100)))
        works[precision] = partial(ours, made[chosen[precision]])
        works[f"{precision} copies"] = partial(ours, made["torch, copies"])
    samples = in_turn(works, turns, progress, "mlp")
    loop, results = best(samples, "loop"), []
    for precision, name in chosen.items():
        measured = {"ours": samples[precision], "loop": samples[loop], "copies": samples[f"{precision} copies"]}
        target = 12.0 if precision == "fp32" else None
        note = f"{name}; {loop}"
        results.append(
            compare(precision, measured, "ours", "loop", of="to the loop", unit="passes/s", target=target, note=note)
        )
        results.append(compare(precision, measured, "ours", "copies", of="to our copies", unit="passes/s", note=name))
    return results
