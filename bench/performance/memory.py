"""A client's peak memory, by what it does with one batch: each time in a fresh process, above its imports.

    python -m bench.performance memory

The peak is the kernel's count of a process (VmHWM), less what it was after the imports, which are the same for all.
Whoever follows a run by its rows keeps the replay state, weights and Adam's two slots: all but backpropagation hold it
here. Linux only.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Literal, get_args

import msgspec
import numpy as np
import torch
from rich.progress import Progress
from torch.nn.functional import cross_entropy

from baffle.core.directions import Directions
from baffle.runtimes.perturb import Perturbations
from baffle.runtimes.pytorch.runtime import TorchRuntime
from bench.performance.references import gradient, torch_threads
from bench.performance.workloads import SIGMA, WORKLOADS
from bench.process_memory import memory_mib

Work = Literal["inference", "inference and state", "streaming", "default", "backprop"]
WORKS: tuple[Work, ...] = get_args(Work)
_BATCH, _PASSES = 32, 8


class Job(msgspec.Struct, frozen=True):
    """What one process does."""

    work: Work
    model: str
    threads: int
    passes: int


def child(job: Job) -> float:
    """Do the work of a client; MiB at the peak above those after the imports."""
    imports = memory_mib()
    workload = WORKLOADS[job.model]
    model, batch = workload.model(), workload.examples(_BATCH)
    x, y = torch.from_numpy(batch.inputs()), torch.from_numpy(batch.y)
    size = sum(p.numel() for p in model.parameters())
    state = np.ones((0 if job.work in ("inference", "backprop") else 3, size), np.float32)
    with torch_threads(job.threads):
        if job.work in ("inference", "inference and state"):
            with torch.inference_mode():
                cross_entropy(model(x), y)
        elif job.work == "backprop":
            gradient(model, (x, y))
        else:
            strategy = "copies" if job.work == "default" else "streaming"
            runtime = TorchRuntime(model, cross_entropy, job.threads, strategy=strategy)
            directions = Directions(runtime.table, "rank1", (0, 1))
            runtime.losses(state[0], Perturbations(directions, job.passes, (SIGMA,), 1), batch)
    return memory_mib() - imports


def in_child(job: Job) -> float:
    """The same in a fresh process."""
    command = [sys.executable, "-m", __spec__.name, msgspec.json.encode(job).decode()]
    environment = os.environ | {"OMP_NUM_THREADS": str(job.threads)}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return float(json.loads(done.stdout.splitlines()[-1]))


def peaks(model: str, threads: int, turns: int, progress: Progress) -> dict[str, list[float]]:
    """MiB by work and turn. Each turn has a pass more, since where free memory lies depends on it."""
    line = progress.add_task(f"memory, {model}, {threads} threads", total=turns * len(WORKS))
    found: dict[str, list[float]] = {work: [] for work in WORKS}
    for turn in range(turns):
        for work in WORKS:
            found[work].append(in_child(Job(work, model, threads, _PASSES + turn)))
            progress.advance(line)
    progress.remove_task(line)
    return found


if __name__ == "__main__":
    assert Path("/proc/self/status").exists(), "the kernel's count of a process is Linux only"
    print(json.dumps(child(msgspec.json.decode(sys.argv[1], type=Job))))
