"""Where the time of a perturbed pass goes, and how far it is from the matrix products that one core can do.

    python -m bench.performance profiles

The ceiling is a product of two large matrices in the same precision on one core, measured in turn with the passes.
Our fastest runtime evaluates a batch of 32 on one thread; its time in kernels is PyTorch's profiler's, or OpenVINO's
own clock of each operation. What no kernel took is ours: perturbing weights, losses, Python. A subgraph is what
OpenVINO fused of element-wise operations, those of the softmax among them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import matplotlib
import msgspec
import numpy as np
import torch
from matplotlib.figure import Figure
from rich.progress import Progress
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from baffle.runtimes import Runtime
from baffle.runtimes.onnx.bundle import Bundle
from bench.performance import graphs
from bench.performance.references import torch_threads
from bench.performance.results import in_turn
from bench.performance.workloads import WORKLOADS, Workload, asked, exported, precisions, runtimes, seconds, shortlist

BATCH, _PASSES, _SIZE = 32, 20, 2048
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
KINDS = (
    "convolution",
    "matrix product",
    "attention",
    "activation",
    "normalisation",
    "pooling",
    "other element-wise",
    "copies",
    "loss",
    "other",
)
_OWN = "perturbing and Python"
_WORDS = {  # parts of the names of operations, in PyTorch's or OpenVINO's spelling, lower case; the first kind counts
    "loss": ("log_softmax", "nll_loss", "cross_entropy"),
    "attention": ("attention", "softmax"),
    "convolution": ("conv",),
    "matrix product": ("mm", "matmul", "linear", "fullyconnected", "fully_connected"),
    "normalisation": ("norm", "mvn"),
    "pooling": ("pool", "mean", "reduce"),
    "activation": ("hardswish", "hswish", "relu", "gelu"),
    "copies": ("copy", "reorder", "convert", "transpose", "to_copy", "contiguous", "clone", "cat", "stack", "empty"),
    "other element-wise": ("add", "mul", "sub", "div", "eltwise"),
}
_COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#F0E442",
    "#8C6D31",
    "#6A3D9A",
    "#999999",
    "#333333",
)


class Profile(msgspec.Struct, frozen=True):
    """A model in a precision on one core."""

    model: str
    precision: str
    runtime: str
    multiply_adds: int
    """Of a pass over the batch."""
    ceiling: list[float]
    """Multiply-adds a second of a large matrix product, by turn."""
    milliseconds: list[float]
    """Of a perturbed pass, by turn."""
    shares: dict[str, float]
    """Of the pass, by kind of operation."""

    @property
    def percent(self) -> float:
        """How much of the ceiling a pass reaches."""
        reached = [self.multiply_adds / (t / 1000) / c for t, c in zip(self.milliseconds, self.ceiling, strict=True)]
        return 100 * float(np.median(reached))


def multiply_adds(model: nn.Module, x: torch.Tensor) -> int:
    """Of one forward pass: those of convolutions, matrix products and attention.

    Examples:
        >>> multiply_adds(nn.Linear(3, 5), torch.zeros(2, 3))
        30
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    return int(counter.get_total_flops()) // 2


def kind_of(operation: str) -> str:
    """The kind of an operation by its name.

    Examples:
        >>> kind_of("aten::mkldnn_convolution"), kind_of("FullyConnected"), kind_of("aten::add")
        ('convolution', 'matrix product', 'other element-wise')
    """
    name = operation.lower()
    return next((kind for kind, words in _WORDS.items() if any(w in name for w in words)), "other")


def product(precision: str) -> float:
    """Multiply-adds a second of a square matrix product on one core."""
    a, b = (torch.randn(_SIZE, _SIZE).to(_DTYPES[precision]) for _ in range(2))
    with torch_threads(1):
        started = time.perf_counter()
        torch.mm(a, b)
        return _SIZE**3 / (time.perf_counter() - started)


def torch_kinds(runtime: Runtime, workload: Workload, passes: int) -> dict[str, float]:
    """Seconds of a pass in PyTorch's kernels, by kind."""
    with profile(activities=[ProfilerActivity.CPU]) as measured:
        seconds(runtime, asked(runtime, passes), workload.examples(BATCH))
    found: dict[str, float] = {}
    for event in measured.key_averages():
        kind = kind_of(event.key)
        found[kind] = found.get(kind, 0.0) + event.self_cpu_time_total / 1e6 / passes
    return found


def openvino_kinds(bundle: Bundle, precision: str, workload: Workload) -> dict[str, float]:
    """Seconds of a pass in OpenVINO's kernels, by kind."""
    compiled = graphs.compiled(bundle, BATCH, precision, threads=1, constant=False, count=True)
    feeds = {spec.name: bundle.initial[spec.slice].reshape(spec.shape) for spec in bundle.manifest.table}
    request, found = compiled.create_infer_request(), dict[str, float]()
    inputs = {
        port: workload.examples(BATCH).inputs()
        if "x" in port.names
        else feeds[next(n for n in port.names if n in feeds)]
        for port in compiled.inputs
    }
    for turn in range(1 + _PASSES):
        request.infer(inputs)
        for node in request.get_profiling_info() if turn else ():
            kind = kind_of(node.node_type)
            found[kind] = found.get(kind, 0.0) + node.real_time.total_seconds() / _PASSES
    return found


def one(name: str, precision: str, quick: bool, progress: Progress) -> Profile:
    """Profile a model in a precision on one core."""
    workload = WORKLOADS[name]
    batch = workload.examples(BATCH)
    made = runtimes(workload, precision, threads=1)
    chosen, expected = next(iter(shortlist(made, asked, batch).items()))
    passes = max(8, min(1000, int(0.4 / expected)))
    works: dict[str, Callable[[], float]] = {
        "ceiling": partial(product, precision),
        "pass": lambda: 1000 * seconds(made[chosen], asked(made[chosen], passes), batch) / passes,
    }
    samples = in_turn(works, 2 if quick else 5, progress, f"profile of {workload.title}, {precision}")
    if chosen == "openvino":
        kinds = openvino_kinds(exported(workload), precision, workload)
    else:
        kinds = torch_kinds(made[chosen], workload, passes)
    whole = max(float(np.median(samples["pass"])) / 1000, sum(kinds.values()))
    shares = {kind: kinds[kind] / whole for kind in KINDS if kind in kinds}
    shares[_OWN] = 1 - sum(shares.values())
    return Profile(
        workload.title,
        precision,
        chosen,
        multiply_adds(workload.model(), torch.from_numpy(batch.inputs())),
        samples["ceiling"],
        samples["pass"],
        {kind: round(share, 4) for kind, share in shares.items()},
    )


def measure(quick: bool, progress: Progress) -> list[Profile]:
    """Profile every model in fp32, and in bf16 where the processor has it."""
    return [one(name, precision, quick, progress) for name in WORKLOADS for precision in precisions()[:2]]


def table(profiles: Sequence[Profile]) -> str:
    """Profiles as Markdown."""
    lines = [
        "| model | precision | runtime | multiply-adds (millions) | ceiling (10⁹ a second) | pass (ms) "
        "| of the ceiling | where the time goes |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for p in profiles:
        parts = sorted(p.shares.items(), key=lambda item: -item[1])
        told = ", ".join(f"{kind} {100 * share:.0f} %" for kind, share in parts if share >= 0.01)
        lines.append(
            f"| {p.model} | {p.precision} | {p.runtime} | {p.multiply_adds / 1e6:,.0f} "
            f"| {np.median(p.ceiling) / 1e9:,.0f} | {np.median(p.milliseconds):.3g} | **{p.percent:.0f} %** | {told} |"
        )
    return "\n".join(lines)


def plot(profiles: Sequence[Profile], path: Path) -> None:
    """Shares of a pass as stacked bars, with the percentage of the ceiling beside them."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rc("font", size=10)
        matplotlib.rc("axes.spines", top=False, right=False)
        figure = Figure(figsize=(7.6, 1.9 + 0.36 * len(profiles)), layout="constrained")
        ax = figure.subplots()
        left = np.zeros(len(profiles))
        for kind, colour in zip((*KINDS, _OWN), _COLOURS, strict=True):
            widths = np.array([100 * p.shares.get(kind, 0.0) for p in profiles])
            if widths.any():
                ax.barh(range(len(profiles)), widths, 0.62, left, color=colour, label=kind)
            left += widths
        for i, p in enumerate(profiles):
            ax.annotate(f"{p.percent:.0f} %", (102, i), va="center", fontsize=9, annotation_clip=False)
        ax.annotate("of ceiling", (102, -0.75), va="center", fontsize=9, annotation_clip=False)
        ax.set_yticks(range(len(profiles)), [f"{p.model}, {p.precision} ({p.runtime})" for p in profiles])
        ax.invert_yaxis()
        ax.set_xlim(0, 100)
        ax.set_xlabel("percent of a pass")
        title = "Where a perturbed pass spends its time, one core"
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=11)
        figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
        figure.savefig(path, metadata={"Software": None}, dpi=160)
