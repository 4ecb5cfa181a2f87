"""The server's rebuild: against regenerating normal numbers (R5), and its time against n and against K.

    python -m bench.performance.rebuild [--quick] [--json FILE] [--plot FILE]

R5 is what most forward-only federated code does: ``torch.randn`` again from a seed for each direction, times its
scalar, added in place in float32, with the thread count that is the faster one here. Every timed result is compared
with sums in int64, bit for bit: all of it where that takes seconds, else some entries of every tensor. Takes about
two minutes on two cores and less than 1 GB.
"""

from __future__ import annotations

import argparse
import json
import time
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress

from baffle.core.cores import cores
from baffle.core.directions import Directions
from baffle.core.rebuild import combine_slowly, scaled
from baffle.core.types import Family, Integers, Table, Weights, limit_of, make_table, table_size
from baffle.models import build
from bench.performance.results import in_turn

FACTOR = 2.0**-20
_COLOURS = {"rank1": "#0072B2", "rademacher": "#009E73", "gaussian": "#D55E00"}


def wrn() -> Table:
    """WRN-10-2 on grey images: n = 302,506."""
    return make_table({name: tuple(p.shape) for name, p in build("wrn-10-2", (1, 28, 28), 10, 0).named_parameters()})


def minilm() -> Table:
    """The shapes of a small BERT (MiniLM-L6, 6 layers, d = 384, 30,522 tokens): n = 22,713,216."""
    shapes: dict[str, tuple[int, ...]] = {"tokens": (30522, 384), "positions": (512, 384), "types": (2, 384)}
    shapes |= {"norm.weight": (384,), "norm.bias": (384,)}
    linear = {"query": (384, 384), "key": (384, 384), "value": (384, 384), "out": (384, 384)}
    linear |= {"up": (1536, 384), "down": (384, 1536)}
    for layer in range(6):
        for name, (out, rest) in linear.items():
            shapes |= {f"{layer}.{name}.weight": (out, rest), f"{layer}.{name}.bias": (out,)}
        shapes |= {f"{layer}.norm{i}.{part}": (384,) for i in (1, 2) for part in ("weight", "bias")}
    return make_table(shapes | {"pooler.weight": (384, 384), "pooler.bias": (384,)})


def matrices(size: int) -> Table:
    """About ``size`` entries: square matrices of at most 2048 x 2048, and a bias for each."""
    count = max(1, round(size / 2048**2))
    side = round((size / count) ** 0.5)
    return make_table({f"{i}.{part}": (side,) * dims for i in range(count) for part, dims in (("w", 2), ("b", 1))})


def regenerate(size: int, scalars: Sequence[float], seed: int = 0) -> torch.Tensor:
    """R5: sum_k scalars[k] * torch.randn(size) from seed + k, in place, float32."""
    total, generator = torch.zeros(size), torch.Generator()
    for k, scalar in enumerate(scalars):
        total.add_(torch.randn(size, generator=generator.manual_seed(seed + k)), alpha=scalar)
    return total


def exact(directions: Directions, scalars: Integers, found: Weights, per_tensor: int | None = None) -> bool:
    """Whether a rebuild has the bits of sums in int64: all of them, or those of ``per_tensor`` entries of each."""
    if per_tensor is None:
        return found.tobytes() == (combine_slowly(directions, scalars) * FACTOR).astype(np.float32).tobytes()
    rng, ks = np.random.default_rng(0), slice(0, len(scalars))
    for i, spec in enumerate(directions.table):
        start = int(rng.integers(max(1, spec.size - per_tensor)))
        stop = min(spec.size, start + per_tensor)
        total = scalars @ directions.entries(i, ks, start, stop).astype(np.int64)
        part = found[spec.slice][start:stop]
        if part.tobytes() != (total.astype(np.float64) * FACTOR).astype(np.float32).tobytes():
            return False
    return True


def peak(work: Callable[[], Weights]) -> int:
    """Bytes that are needed at once beyond the result."""
    tracemalloc.start()
    try:
        result = work()
        return tracemalloc.get_traced_memory()[1] - result.nbytes
    finally:
        tracemalloc.stop()


def case(
    table: Table,
    family: Family,
    count: int,
    title: str,
    repeat: int,
    progress: Progress,
    *,
    reference: bool = False,
    largest: int = limit_of(15),
) -> dict[str, Any]:
    """Measure one rebuild: seconds a turn, bits, memory; with R5 in turn if asked.

    Scalars are below ``largest``: one client's by default, so that products are exact in float32; sums of many
    clients' may be as large as 2**31, which takes float64.
    """
    directions = Directions(table, family, (7, 1))
    scalars = np.random.default_rng(0).integers(-largest, largest, count)
    size, floats = table_size(table), scalars.astype(float).tolist()
    found: list[Weights] = []

    def ours() -> float:
        started = time.perf_counter()
        found[:] = [scaled(table, [(directions, scalars)], FACTOR)]
        return time.perf_counter() - started

    def r5(count: int = count) -> float:
        started = time.perf_counter()
        regenerate(size, floats[:count])
        return time.perf_counter() - started

    works: dict[str, Callable[[], float]] = {"ours": ours}
    before = torch.get_num_threads()
    threads = before
    if reference:
        works["R5"] = r5
        trials = {}
        for threads in sorted({1, cores()}):
            torch.set_num_threads(threads)
            trials[threads] = min(r5(max(1, count // 20)) for _ in range(3))
        threads = min(trials, key=lambda t: trials[t])
        torch.set_num_threads(threads)
    try:
        samples = in_turn(works, repeat, progress, title)
    finally:
        torch.set_num_threads(before)
    whole = size * count <= 4e8
    result: dict[str, Any] = {"case": title, "family": family, "n": size, "K": count, "seconds": samples["ours"]}
    result["exact"] = exact(directions, scalars, found.pop(), None if whole else 1000)
    result["checked"] = "all" if whole else "1,000 entries a tensor"
    result["peak_bytes"] = peak(lambda: scaled(table, [(directions, scalars)], FACTOR))
    if reference:
        result |= {"r5_seconds": samples["R5"], "r5_threads": threads}
        result["ratios"] = [b / a for a, b in zip(samples["ours"], samples["R5"], strict=True)]
    return result


def measure(quick: bool, progress: Progress) -> list[dict[str, Any]]:
    """All cases; those with ``sweep`` are points of the plot."""
    grey, repeat = wrn(), 2 if quick else 7
    part = 20 if quick else 1
    found = [
        case(grey, family, count // part, "WRN-10-2, grey", repeat, progress, reference=True)
        for family, count in _FAMILIES
    ]
    title = "WRN-10-2, grey, 4-byte sums"
    found.insert(1, case(grey, "rank1", 1000 // part, title, repeat, progress, reference=True, largest=2**31))
    if not quick:
        found.append(case(minilm(), "rank1", 100, "22.7 million", 5, progress))
    largest: dict[Family, float] = {"rank1": 1e8, "rademacher": 1e7, "gaussian": 1e6}
    for family, most in largest.items():
        for size in (1e5, 3e5, 1e6, 3e6, 1e7, 3e7, 1e8):
            if size <= (min(most, 1e6) if quick else most):
                point = case(matrices(int(size)), family, 100, f"n = {size:.0e}", 2 if quick else 3, progress)
                found.append(point | {"sweep": "n"})
        for count in (30, 100, 300, 1000, 3000):
            if count <= (100 if quick else 3000 if family == "rank1" else 1000):
                point = case(grey, family, count, f"K = {count}", 2 if quick else 3, progress)
                found.append(point | {"sweep": "K"})
    return found


_FAMILIES: tuple[tuple[Family, int], ...] = (("rank1", 1000), ("rademacher", 1000), ("gaussian", 100))


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """Results as Markdown, a row each."""
    lines = [
        "| case | directions | n | K | ours, s | R5, s (threads) | times faster (least to most) "
        "| bit-exact (checked) | MB beyond the result |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in found:
        reference = ratio = ""
        if "ratios" in r:
            reference = f"{np.median(r['r5_seconds']):.3g} ({r['r5_threads']})"
            ratio = f"**{np.median(r['ratios']):.3g}** ({min(r['ratios']):.3g} to {max(r['ratios']):.3g})"
        lines.append(
            f"| {r['case']} | {r['family']} | {r['n']:,} | {r['K']:,} | {np.median(r['seconds']):.3g} | {reference} "
            f"| {ratio} | {'yes' if r['exact'] else 'NO'} ({r['checked']}) | {r['peak_bytes'] / 2**20:.1f} |"
        )
    return "\n".join(lines)


def plot(found: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Seconds against n (K = 100) and against K (n = 302,506), each beside a line a + b x."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rc("font", size=10)
        matplotlib.rc("axes.spines", top=False, right=False)
        matplotlib.rc("svg", hashsalt="baffle", fonttype="path")
        figure = Figure(figsize=(7.6, 3.6), layout="constrained")
        for ax, sweep, label in zip(
            figure.subplots(1, 2), ("n", "K"), ("parameters n, at K = 100", "directions K, at n = 302,506"), strict=True
        ):
            for family, colour in _COLOURS.items():
                points = [r for r in found if r.get("sweep") == sweep and r["family"] == family]
                x = np.array([r[sweep] for r in points], float)
                y = np.array([float(np.median(r["seconds"])) for r in points])
                per_unit, fixed = np.polyfit(x, y, 1, w=1 / y)  # all points count alike on a logarithmic axis
                line = np.geomspace(x[0], x[-1])
                ax.plot(line, fixed + per_unit * line, color=colour, linewidth=1, alpha=0.5)
                ax.plot(x, y, "o", color=colour, markersize=5, label=family)
            ax.set(xscale="log", yscale="log", xlabel=label)
            ax.grid(color="#dddddd", linewidth=0.6)
            ax.set_axisbelow(True)
        figure.axes[0].set_ylabel("seconds")
        figure.axes[0].legend(frameon=False)
        title = "Rebuild: time is linear in n and in K (lines: a + b x)"
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=11)
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata: dict[str, Any] = {"Date": None} if path.suffix == ".svg" else {"Software": None}
        figure.savefig(path, metadata=metadata, dpi=160)


def main() -> None:
    """Measure, print the table, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few turns and sizes, to see that it works")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    with Progress(console=Console(stderr=True)) as progress:
        found = measure(options.quick, progress)
    print(table(found))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    if options.plot:
        plot(found, options.plot)


if __name__ == "__main__":
    main()
