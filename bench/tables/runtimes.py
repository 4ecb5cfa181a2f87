"""Forward passes by runtime and precision: how long one takes, and how much memory a client needs.

    python -m bench.tables.runtimes [--models lenet wrn-10-2 transformer] [--batches 32 320] [--repeat 7] [--json FILE]

Speed: one perturbed pass on one thread, the median of repetitions that go around all runtimes, so that whatever else
the machine does slows all alike. Memory: the peak of a fresh process that does one client's work on one batch, by
backpropagation or by forward passes, above what it had right after its imports, and above the same work on one
example; the median of three processes, each with a pass more, since where free memory lies depends on that. Clients
of exported graphs do not import PyTorch. Linux only. Prints the Markdown tables of docs/inference.md.
Takes about 20 minutes on two cores: --speed-only half of it, --memory-only the other.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

# a process of the memory table imports what its runtime needs, nothing more: the rest is imported where it is used
import msgspec
import numpy as np

from baffle.data import Dataset
from baffle.errors import MissingExtraError, OptionError
from baffle.runtimes import Runtime
from baffle.runtimes.choose import seconds_of
from baffle.runtimes.onnx.bundle import Bundle, Precision
from bench.process_memory import memory_mib

if TYPE_CHECKING:
    from rich.progress import Progress
    from torch import nn

SHAPES = {"lenet": (1, 28, 28), "wrn-10-2": (3, 32, 32), "transformer": (1, 28, 28)}
MEMORY = {"lenet": (320,), "wrn-10-2": (32, 320), "transformer": (32,)}
"""Batches of the memory table."""
_PROCESSES = 3  # of each cell of the memory table
_MICRO = 32  # examples of a part, where backpropagation goes through a batch in parts


@dataclass(frozen=True)
class Engine:
    """What evaluates a model."""

    runtime: Literal["torch", "ort", "openvino"]
    precision: str
    branches: bool = False

    @property
    def name(self) -> str:
        """As the tables have it."""
        return f"{self.runtime} {self.precision}{', rank-1 branches' if self.branches else ''}"

    @property
    def graph(self) -> Precision:
        """The precision of its bundle: bf16 is a setting of the engine."""
        return "fp32" if self.precision == "bf16" else msgspec.convert(self.precision, Precision)


ENGINES = (
    Engine("torch", "fp32"),  # the one to compare with
    Engine("torch", "bf16"),
    Engine("ort", "fp32"),
    Engine("ort", "fp32", branches=True),
    Engine("ort", "fp16"),
    Engine("ort", "int8-weights"),
    Engine("ort", "int8"),
    Engine("ort", "int8", branches=True),
    Engine("openvino", "fp32"),
    Engine("openvino", "bf16"),
    Engine("openvino", "bf16", branches=True),
    Engine("openvino", "int8"),
)


class Job(msgspec.Struct, frozen=True):
    """One client's work on one batch, done by a process of its own."""

    work: Literal["backprop", "checkpointed", "micro", "forward"]
    engine: Engine
    model: str
    data: str
    bundle: str | None = None


WORKS: tuple[tuple[str, Literal["backprop", "checkpointed", "micro", "forward"], Engine], ...] = (
    ("backpropagation, torch", "backprop", ENGINES[0]),
    ("backpropagation with checkpoints, torch", "checkpointed", ENGINES[0]),
    (f"backpropagation, {_MICRO} examples at a time, torch", "micro", ENGINES[0]),
    ("forward, torch fp32", "forward", ENGINES[0]),
    ("forward, ort fp32", "forward", Engine("ort", "fp32")),
    ("forward, ort int8", "forward", Engine("ort", "int8")),
    ("forward, openvino fp32", "forward", Engine("openvino", "fp32")),
    ("forward, openvino bf16", "forward", Engine("openvino", "bf16")),
)


def examples(model: str, count: int) -> Dataset:
    """Random examples: neither time nor memory depends on what they show."""
    rng = np.random.default_rng(0)
    return Dataset(rng.standard_normal((count, *SHAPES[model]), np.float32), rng.integers(0, 10, count))


class Bundles:
    """A model's bundles, each exported once."""

    def __init__(self, model: str) -> None:
        from baffle.models import build

        self._module, self._data = build(model, SHAPES[model], 10), examples(model, 8)
        self._made: dict[tuple[Precision, bool], Bundle] = {}

    def of(self, engine: Engine) -> Bundle:
        """The bundle that an engine runs."""
        from torch.nn.functional import cross_entropy

        from baffle.exporter import export

        key = engine.graph, engine.branches
        if key not in self._made:
            self._made[key] = export(self._module, cross_entropy, self._data, precision=key[0], branches=key[1])
        return self._made[key]

    def runtime(self, engine: Engine) -> Runtime | None:
        """The engine with the model, on one thread; None if it or its precision is missing here."""
        try:
            if engine.runtime != "torch":
                return graph_runtime(engine, self.of(engine))
            from torch.nn.functional import cross_entropy

            from baffle.runtimes.pytorch.runtime import TorchRuntime

            return TorchRuntime(self._module, cross_entropy, threads=1, precision=engine.precision)
        except (MissingExtraError, OptionError):
            return None


def graph_runtime(engine: Engine, bundle: Bundle) -> Runtime:
    """An engine that needs no PyTorch. OptionError if the processor lacks the precision."""
    if engine.runtime == "ort":
        from baffle.runtimes.onnx.ort import OrtRuntime

        return OrtRuntime(bundle, threads=1)
    from baffle.runtimes.onnx.openvino import OpenVinoRuntime

    return OpenVinoRuntime(bundle, threads=1, precision=engine.precision)


def milliseconds(
    runtimes: dict[Engine, Runtime], batch: Dataset, repeat: int, seconds: float, progress: Progress, title: str
) -> dict[Engine, list[float]]:
    """Of one pass, by engine and repetition.

    One pass is what ``1 + passes`` take longer than one, divided: without what a call does once (cutting the batch,
    measuring ranges of activations), which a round shares among all of its passes.
    """
    line = progress.add_task(title, total=len(runtimes) * (1 + repeat))
    passes: dict[Engine, int] = {}
    for engine, runtime in runtimes.items():
        seconds_of(runtime, batch, 1)  # memory and kernels are prepared
        passes[engine] = max(4, min(256, math.ceil(seconds / seconds_of(runtime, batch, 1))))
        progress.advance(line)
    found: dict[Engine, list[float]] = {engine: [] for engine in runtimes}
    for _ in range(repeat):
        for engine, runtime in runtimes.items():
            once = seconds_of(runtime, batch, 1)
            more = seconds_of(runtime, batch, 1 + passes[engine])
            found[engine].append(1000 * (more - once) / passes[engine])
            progress.advance(line)
    return found


def speed(models: list[str], batches: list[int], repeat: int, seconds: float, progress: Progress) -> list[Any]:
    """Every engine on every model and batch: the median in milliseconds, and its ratio to the first engine's."""
    results = []
    for model in models:
        bundles = Bundles(model)
        made = {engine: bundles.runtime(engine) for engine in ENGINES}
        runtimes = {engine: runtime for engine, runtime in made.items() if runtime is not None}
        for batch in batches:
            title = f"{model}, batch {batch}"
            found = milliseconds(runtimes, examples(model, batch), repeat, seconds, progress, title)
            base = float(np.median(found[ENGINES[0]]))
            for engine in ENGINES:
                median = float(np.median(found[engine])) if engine in found else None
                results.append(
                    {
                        "model": model,
                        "batch": batch,
                        "engine": engine.name,
                        "ms": median,
                        "ratio": None if median is None else median / base,
                        "samples": [round(s, 4) for s in found.get(engine, [])],
                    }
                )
    return results


def print_speed(results: list[Any], batches: list[int]) -> None:
    """One row per model and engine, two columns per batch."""
    heads = [head for batch in batches for head in (f"batch {batch} (ms)", "to torch fp32")]
    print(f"| model | runtime | {' | '.join(heads)} |")
    print("| --- " * (2 + len(heads)) + "|")
    rows: dict[tuple[str, str], list[str]] = {}
    for r in results:
        shown = ["-", "-"] if r["ms"] is None else [f"{r['ms']:.3g}", f"{r['ratio']:.2f}"]
        rows.setdefault((r["model"], r["engine"]), []).extend(shown)
    for (model, engine), cells in rows.items():
        print(f"| {model} | {engine} | {' | '.join(cells)} |")


def checkpointed(model: nn.Module) -> tuple[nn.Module, list[nn.Module]]:
    """The model that keeps the inputs of its parts only and computes the parts again going back; and the parts.

    Units of the residual network, blocks of the transformer, halves of anything else.
    """
    from torch import nn
    from torch.utils.checkpoint import checkpoint

    from baffle.models.transformer import Block
    from baffle.models.wrn import Unit

    parts: list[nn.Module] = [m for m in model.modules() if isinstance(m, (Unit, Block))]
    if not parts:
        layers = list(model.children())
        middle = len(layers) // 2 - 1  # behind LeNet's pooling, whose output is small
        model = nn.Sequential(nn.Sequential(*layers[:middle]), nn.Sequential(*layers[middle:]))
        parts = list(model.children())
    for part in parts:
        part.forward = partial(checkpoint, part.forward, use_reentrant=False)
    return model, parts


def check_checkpoints(name: str) -> None:
    """Gradients are those without checkpoints, and every part is computed twice."""
    import torch

    from baffle.models import build

    plain = build(name, SHAPES[name], 10)
    other, parts = checkpointed(build(name, SHAPES[name], 10))
    calls: list[nn.Module] = []
    for part in parts:
        first = next(m for m in part.modules() if not list(m.children()))
        first.register_forward_pre_hook(lambda module, inputs: calls.append(module))
    batch = examples(name, 4)
    for model in (plain, other):
        backpropagate(model, batch, len(batch))
    for p, q in zip(plain.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    assert len(calls) == 2 * len(parts), f"{name}: parts of it were not computed again"


def backpropagate(model: nn.Module, batch: Dataset, size: int) -> None:
    """Gradients of the mean loss of a batch, ``size`` examples at a time; left with the parameters."""
    import torch
    from torch.nn.functional import cross_entropy

    x, y = torch.from_numpy(batch.inputs()), torch.from_numpy(batch.y)
    x = x.contiguous(memory_format=torch.channels_last)
    for a, b in zip(torch.split(x, size), torch.split(y, size), strict=True):
        (cross_entropy(model(a), b, reduction="sum") / len(x)).backward()  # type: ignore[no-untyped-call]


def child(job: Job, passes: int) -> dict[str, float] | None:
    """Do the work of a client; memory after the imports and at the peak, in MiB. None: not on this processor."""
    if job.engine.runtime == "torch":
        import torch
        import torch.utils.checkpoint

        from baffle.models import build
        from baffle.runtimes.pytorch.runtime import TorchRuntime

        torch.set_num_threads(1)
        if job.work == "checkpointed":  # the first call imports what is not needed otherwise
            torch.utils.checkpoint.checkpoint(torch.neg, torch.zeros(1), use_reentrant=False)
        imports, batch = memory_mib(), stored(job.data)
        model = build(job.model, SHAPES[job.model], 10)
        if job.work == "forward":
            seconds_of(TorchRuntime(model, torch.nn.functional.cross_entropy, threads=1), batch, passes)
        else:
            model = checkpointed(model)[0] if job.work == "checkpointed" else model
            backpropagate(model, batch, _MICRO if job.work == "micro" else len(batch))
    else:
        try:
            if job.engine.runtime == "ort":
                import baffle.runtimes.onnx.ort
            else:
                import baffle.runtimes.onnx.openvino  # noqa: F401  # to know what the import takes
            imports, batch = memory_mib(), stored(job.data)
            seconds_of(graph_runtime(job.engine, Bundle.load(str(job.bundle))), batch, passes)
        except (MissingExtraError, OptionError):
            return None
        assert "torch" not in sys.modules
    return {"imports": imports, "peak": memory_mib()}


def stored(path: str) -> Dataset:
    """The batch in a file."""
    with np.load(path) as file:
        return Dataset(file["x"], file["y"])


def in_child(job: Job, passes: int) -> dict[str, float] | None:
    """The same in a fresh process."""
    command = [
        sys.executable,
        "-m",
        __spec__.name,
        "--passes",
        str(passes),
        "--child",
        msgspec.json.encode(job).decode(),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    found: dict[str, float] | None = json.loads(done.stdout.splitlines()[-1])
    return found


def jobs(model: str, batch: int, folder: Path) -> Iterator[tuple[str, Job]]:
    """What is measured for a model and a batch; writes the batch and the bundles that it takes."""
    bundles, data = Bundles(model), folder / f"{model}-{batch}.npz"
    drawn = examples(model, batch)
    np.savez(data, x=drawn.x, y=drawn.y)
    for name, work, engine in WORKS:
        file = None
        if engine.runtime != "torch":
            file = folder / f"{model}-{engine.graph}.zip"
            if not file.exists():
                bundles.of(engine).save(file)
        yield name, Job(work, engine, model, str(data), None if file is None else str(file))


def memory(models: list[str], passes: int, progress: Progress) -> list[Any]:
    """Every kind of work on every model and batch, and on one example: MiB by process, None where there is none."""
    results = []
    with tempfile.TemporaryDirectory() as name:
        for model in models:
            check_checkpoints(model)
            batches = (1, *MEMORY[model])
            line = progress.add_task(f"{model}, memory", total=len(WORKS) * len(batches) * _PROCESSES)
            for batch in batches:
                for work, job in jobs(model, batch, Path(name)):
                    found = []
                    for i in range(_PROCESSES):
                        found.append(in_child(job, passes + i))
                        progress.advance(line)
                    known = [f for f in found if f is not None]
                    imports, peaks = ([round(f[field], 1) for f in known] for field in ("imports", "peak"))
                    results.append({"model": model, "batch": batch, "work": work, "imports": imports, "peaks": peaks})
    return results


def print_memory(results: list[Any]) -> None:
    """One row per kind of work; batches of one example are what the others are compared with."""
    print(
        "| model | batch | client's work | after imports (MiB) | peak RSS (MiB) | least to most | above imports "
        "| above one example |"
    )
    print("| --- " * 8 + "|")
    one = {(r["model"], r["work"]): r["peaks"] for r in results if r["batch"] == 1}
    for r in results:
        in_parts = r["batch"] > _MICRO or "at a time" not in r["work"]  # else the same as plain backpropagation
        if r["batch"] == 1 or not in_parts:
            continue
        shown = ["-"] * 5
        if r["peaks"]:
            imports, peak, single = (np.median(v) for v in (r["imports"], r["peaks"], one[r["model"], r["work"]]))
            span = f"{min(r['peaks']):.0f} to {max(r['peaks']):.0f}"
            shown = [f"{imports:.0f}", f"{peak:.0f}", span, f"{peak - imports:.0f}", f"{max(0.0, peak - single):.0f}"]
        print(f"| {r['model']} | {r['batch']} | {r['work']} | {' | '.join(shown)} |")


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--batches", nargs="+", type=int, default=[32, 320], help="of the speed table")
    parser.add_argument("--repeat", type=int, default=7, help="of the speed table")
    parser.add_argument("--seconds", type=float, default=0.5, help="least length of a repetition (four passes if more)")
    parser.add_argument("--passes", type=int, default=4, help="of a client in the memory table, at least")
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--speed-only", action="store_true")
    part.add_argument("--memory-only", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(msgspec.json.decode(options.child, type=Job), options.passes)))
        return
    from rich.console import Console
    from rich.progress import Progress

    found: dict[str, list[Any]] = {}
    with Progress(console=Console(stderr=True)) as progress:
        if not options.memory_only:
            found["speed"] = speed(options.models, options.batches, options.repeat, options.seconds, progress)
        if not options.speed_only:
            found["memory"] = memory(options.models, options.passes, progress)
    if "speed" in found:
        print_speed(found["speed"], options.batches)
    if "memory" in found:
        print() if "speed" in found else None
        print_memory(found["memory"])
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
