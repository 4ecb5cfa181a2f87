"""Many simulated clients: what a round costs besides its forward passes, and memory, by the number of clients.

    python -m bench.performance.simulation [--precision fp32 bf16] [--clients 100 1000 10000] [--rounds 5] [--json FILE]

LeNet on random pixels of MNIST's shape, 100 participants a round with 32 examples each, K = 100. There are 320,000
examples, so that each of 10,000 clients has a whole batch; of MNIST's 60,000 (``--examples 60000``) it has six. Every
number of clients has a fresh process.

A round, written to a run folder, is timed from one record to the next; the passes are the time inside the runtime's
``losses``. Part of that is perturbing: after the rounds some of the last one's passes are taken in turn perturbed and
not, and "not forward passes" is all but the unperturbed share. Shares are ratios within one turn, and the median of
them. Memory is what the clients took, and what the peak grew by, from the moment when data and runtime were there and
had evaluated one round's passes; a partition copies the examples once. The runtime is the fastest of those installed,
by a short measurement. With ``--sharing per-client`` or ``--local-steps 2`` clients are evaluated side by side, and the
passes are the lanes' mean. Linux only. Takes about 4 minutes in bf16 on two cores, 8 in fp32.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from torch.nn.functional import cross_entropy

import baffle as bf
from baffle.core.directions import Directions
from baffle.core.types import Losses, Sharing, Table, Weights
from baffle.data import Dataset, Scaling
from baffle.errors import MissingExtraError, OptionError
from baffle.models import build
from baffle.runtimes import Evaluation, Evaluator, Runtime
from baffle.runtimes.perturb import Perturbations
from baffle.runtimes.pytorch.runtime import TorchRuntime
from bench.process_memory import memory_mib

SHAPE = (1, 28, 28)


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """A simulation to measure."""

    clients: int
    precision: str = "fp32"
    participants: int = 100
    num_directions: int = 100
    batch_size: int = 32
    examples: int = 320_000
    rounds: int = 5
    turns: int = 3
    sharing: str = "shared"
    local_steps: int = 1


class TimedLane:
    """A lane that adds up the time inside ``losses``, and keeps the last call to repeat it."""

    def __init__(self, lane: Evaluator) -> None:
        self.lane, self.seconds = lane, 0.0
        self.last: tuple[Weights, Perturbations, Dataset] | None = None

    def losses(self, weights: Weights, perturbations: Perturbations, batch: Dataset) -> Losses:
        """The lane's, timed."""
        self.last = weights, perturbations, batch
        started = time.perf_counter()
        found = self.lane.losses(weights, perturbations, batch)
        self.seconds += time.perf_counter() - started
        return found


class Timed(TimedLane):
    """A runtime so, and its lanes."""

    def __init__(self, runtime: Runtime) -> None:
        super().__init__(runtime)
        self.runtime = runtime
        self.lanes = tuple(map(TimedLane, getattr(runtime, "lanes", ())))

    @property
    def table(self) -> Table:
        """The runtime's."""
        return self.runtime.table

    @property
    def plan(self) -> dict[str, str | int]:
        """The runtime's."""
        return self.runtime.plan

    def initial_weights(self) -> Weights:
        """The runtime's."""
        return self.runtime.initial_weights()

    def evaluate(self, weights: Weights, data: Dataset) -> Evaluation:
        """The runtime's."""
        return self.runtime.evaluate(weights, data)

    def spent(self) -> float:
        """Seconds in passes since it was last asked: of the whole runtime, and the mean of its lanes."""
        found = self.seconds + sum(lane.seconds for lane in self.lanes) / max(1, len(self.lanes))
        for timed in (self, *self.lanes):
            timed.seconds = 0.0
        return found

    def perturbing(self, turns: int) -> list[float]:
        """Seconds of a quarter of the last call's passes over those of as many unperturbed ones, in turn."""
        lane, last = next((timed.lane, timed.last) for timed in (*self.lanes, self) if timed.last is not None)
        assert last is not None
        weights, asked, batch = last
        asked = replace(asked, num_directions=-(-asked.num_directions // 4))
        plain = Perturbations(asked.directions, 0, (), len(asked))
        return [seconds(lane, asked, batch, weights) / seconds(lane, plain, batch, weights) for _ in range(turns)]


def pixels(count: int) -> Dataset:
    """Random examples: neither time nor memory depends on what they show."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (count, *SHAPE), dtype=np.uint8)
    return Dataset(x, rng.integers(0, 10, count), scaling=Scaling((0.1307,), (0.3081,)))


def fastest(precision: str, batch: Dataset) -> tuple[str, Runtime]:
    """The runtime with the shortest pass over a batch, and its name."""
    model = build("lenet", SHAPE, 10)
    made: dict[str, Runtime] = {"torch": TorchRuntime(model, cross_entropy, precision=precision)}
    try:
        bundle = bf.export(model, cross_entropy, batch)
        made["openvino"] = bf.OpenVinoRuntime(bundle, precision=precision)
    except (MissingExtraError, OptionError):
        pass
    found = {
        name: min(seconds(runtime, passes(runtime, 8), batch, runtime.initial_weights()) for _ in range(3))
        for name, runtime in made.items()
    }
    name = min(found, key=lambda name: found[name])
    return name, made[name]


def passes(runtime: Runtime, num_directions: int, baseline: int = 0) -> Perturbations:
    """So many unperturbed passes, then so many perturbed ones."""
    return Perturbations(Directions(runtime.table, "rank1", (0, 1)), num_directions, (1e-3,), baseline)


def seconds(runtime: Evaluator, perturbations: Perturbations, batch: Dataset, weights: Weights) -> float:
    """How long one call takes."""
    started = time.perf_counter()
    runtime.losses(weights, perturbations, batch)
    return time.perf_counter() - started


def child(job: Job) -> dict[str, Any]:
    """One simulation, in this process."""
    train = pixels(job.examples)
    name, runtime = fastest(job.precision, train.view(0, 320))
    timed, initial = Timed(runtime), runtime.initial_weights()
    whole = train.view(0, job.batch_size * job.participants)
    seconds(runtime, passes(runtime, job.num_directions, 1), whole, initial)  # memory that any round needs
    before = clear_peak()
    engine = bf.LocalEngine(timed, bf.partition(train, job.clients))
    made = memory_mib(name="VmRSS") - before
    method = bf.Method(
        num_directions=job.num_directions,
        batch_size=job.batch_size,
        participation=job.participants / job.clients,
        sharing=msgspec.convert(job.sharing, Sharing),
        local_steps=job.local_steps,
        optimizer=bf.sgd(0.1) if job.local_steps > 1 else bf.adam(0.01),
        sigma=1e-3,
    )
    times: list[tuple[float, float]] = []

    def note(_: object) -> None:
        times.append((time.perf_counter(), timed.spent()))

    with tempfile.TemporaryDirectory() as folder:
        bf.train(method, engine, initial, rounds=job.rounds, out=Path(folder, "run"), progress=note)
    peak = memory_mib(name="VmHWM") - before
    return {
        "clients": job.clients,
        "batch": min(job.batch_size, job.examples // job.clients),
        "precision": job.precision,
        "runtime": name,
        "rounds": [end - start for (start, _), (end, _) in itertools.pairwise(times)],
        "passes": [spent for _, spent in times[1:]],
        "perturbing": timed.perturbing(job.turns),
        "clients_mib": made,
        "peak_mib": peak,
    }


def clear_peak() -> float:
    """Forget the peak of this process's memory; what it holds now, in MiB."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory_mib(name="VmRSS")


def measure(
    clients: Sequence[int] = (100, 1_000, 10_000), precision: str = "fp32", **options: int | str
) -> list[dict[str, Any]]:
    """Every number of clients in a process of its own; ``options`` are those of :class:`Job`.

    Per number: seconds of each round and of the passes in it, seconds of perturbed over those of unperturbed passes,
    MiB that the clients took, and that the peak grew by. ``outside`` is the share of a round outside the passes,
    ``rest`` the share that is not forward passes, perturbing among it: medians.
    """
    found = []
    for count in clients:
        job = msgspec.convert({"clients": count, "precision": precision} | options, Job)
        command = [sys.executable, "-m", __spec__.name, "--child", msgspec.json.encode(job).decode()]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        inside = float(np.median(np.divide(result["passes"], result["rounds"])))
        perturbing = float(np.median(result["perturbing"]))
        result |= {"outside": 1 - inside, "rest": 1 - inside / max(1.0, perturbing)}
        found.append(result)
    return found


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """One row per number of clients, in Markdown."""
    columns: dict[str, Callable[[Mapping[str, Any]], object]] = {
        "clients": lambda r: f"{r['clients']:,}",
        "batch": lambda r: r["batch"],
        "precision": lambda r: r["precision"],
        "runtime": lambda r: r["runtime"],
        "round (s)": lambda r: f"{np.median(r['rounds']):.2f}",
        "outside passes (ms)": lambda r: f"{1000 * np.median(np.subtract(r['rounds'], r['passes'])):.0f}",
        "outside passes": lambda r: f"{r['outside']:.1%}",
        "not forward passes": lambda r: f"{r['rest']:.1%}",
        "clients (MiB)": lambda r: f"{r['clients_mib']:.0f}",
        "peak grew by (MiB)": lambda r: f"{r['peak_mib']:.0f}",
    }
    rows = [list(columns), ["---"] * len(columns), *([str(cell(r)) for cell in columns.values()] for r in results)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", nargs="+", type=int, default=[100, 1_000, 10_000])
    parser.add_argument("--precision", nargs="+", choices=["fp32", "bf16"], default=["fp32"])
    parser.add_argument("--examples", type=int, default=320_000, help="of all clients")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sharing", choices=["shared", "per-client"], default="shared")
    parser.add_argument("--local-steps", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(msgspec.json.decode(options.child, type=Job))))
        return
    varied = {name: vars(options)[name] for name in ("examples", "rounds", "sharing", "local_steps")}
    results = [r for precision in options.precision for r in measure(options.clients, precision, **varied)]
    print(table(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
