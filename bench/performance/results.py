"""Figures of the performance suite: ratios of things measured in turn, as JSON, as tables, as bars.

A figure is the median over turns of the ratio within a turn, so that whatever else the machine does from one turn to
the next slows both sides alike.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import matplotlib
import msgspec
import numpy as np
from matplotlib.figure import Figure
from rich.progress import Progress

from baffle.core.cores import cores

Wanted = Literal["at least", "at most"]

_GOOD, _MISSED, _PLAIN, _TARGET = "#0072B2", "#D55E00", "#777777", "#000000"


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """One figure: the median of ``ratios``, each of two things measured in one turn."""

    case: str
    of: str
    """What is divided by what."""
    ratios: list[float]
    samples: dict[str, list[float]]
    """What was measured, by name, one value per turn: first ours, then the reference."""
    unit: str
    target: float | None = None
    wanted: Wanted = "at least"
    note: str = ""
    """The plan that ours used."""

    @property
    def ratio(self) -> float:
        """The figure."""
        return float(np.median(self.ratios))

    @property
    def met(self) -> bool | None:
        """Whether the figure reaches its target; None without one."""
        if self.target is None:
            return None
        return self.ratio >= self.target if self.wanted == "at least" else self.ratio <= self.target


def compare(
    case: str,
    samples: Mapping[str, Sequence[float]],
    ours: str,
    reference: str,
    *,
    of: str,
    unit: str,
    target: float | None = None,
    wanted: Wanted = "at least",
    note: str = "",
) -> Result:
    """The figure ours / reference.

    Examples:
        >>> samples = {"ours": [8.0, 6.0, 9.0], "loop": [2.0, 2.0, 3.0]}
        >>> compare("mlp", samples, "ours", "loop", of="speed", unit="1/s", target=4).ratio
        3.0
    """
    ratios = [a / b for a, b in zip(samples[ours], samples[reference], strict=True)]
    kept = {name: [float(f"{v:.5g}") for v in samples[name]] for name in (ours, reference)}
    ratios = [float(f"{r:.5g}") for r in ratios]
    return Result(case=case, of=of, ratios=ratios, samples=kept, unit=unit, target=target, wanted=wanted, note=note)


def in_turn(
    works: Mapping[str, Callable[[], float]], repeat: int, progress: Progress, title: str
) -> dict[str, list[float]]:
    """Measure A, B, ..., A, B, ...: what each call gives, by name and turn; a first turn only warms up."""
    line = progress.add_task(title, total=len(works) * (1 + repeat))
    found: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(1 + repeat):
        for name, work in works.items():
            value = work()
            if turn:
                found[name].append(value)
            progress.advance(line)
    progress.remove_task(line)
    medians = ", ".join(f"{name} {_number(values)}" for name, values in found.items())
    progress.console.print(f"{title}: {medians}", markup=False, soft_wrap=True)
    return found


def machine() -> dict[str, str | int]:
    """What the figures depend on: processor, cores, versions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    found = next((line for line in lines if line.startswith("flags")), "").split()
    flags = [f for f in ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16") if f in found]
    return {
        "processor": f"{names[0] if names else platform.processor()} ({', '.join(flags)})",
        "cores": cores(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "numpy", "openvino") if find_spec(name)},
        "load": f"{os.getloadavg()[0]:.1f} over the last minute when it began",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def table(results: Sequence[Result]) -> str:
    """Figures as Markdown, a row each."""
    lines = [
        "| case | what is compared | ours | reference | ratio (least to most) | target | met | plan |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in results:
        (ours, a), (reference, b) = r.samples.items()
        target = "" if r.target is None else f"{r.wanted} {r.target:g}"
        met = {None: "", True: "yes", False: "no"}[r.met]
        lines.append(
            f"| {r.case} | {r.of} | {ours}: {_number(a)} {r.unit} | {reference}: {_number(b)} {r.unit} "
            f"| **{r.ratio:.3g}** ({min(r.ratios):.3g} to {max(r.ratios):.3g}) | {target} | {met} | {r.note} |"
        )
    return "\n".join(lines)


def where(machine: Mapping[str, str | int], quick: bool) -> str:
    """On what it was measured, in a sentence."""
    versions = ", ".join(f"{n} {machine[n]}" for n in ("torch", "numpy", "openvino") if n in machine)
    told = f"{machine['processor']}, {machine['cores']} cores; {versions}; load {machine['load']}; {machine['date']}."
    return f"{told} A quick run, which only shows that it works." if quick else told


def _number(values: Sequence[float]) -> str:
    value = float(np.median(values))
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def insert(document: str, name: str, text: str) -> str:
    """Replace what is between ``<!-- name -->`` and ``<!-- /name -->``. ValueError if there is no such place.

    Examples:
        >>> insert("a <!-- x -->old<!-- /x --> b", "x", "new").split()
        ['a', '<!--', 'x', '-->', 'new', '<!--', '/x', '-->', 'b']
    """
    found, count = re.subn(
        rf"(<!-- {name} -->).*?(<!-- /{name} -->)", lambda m: f"{m[1]}\n\n{text}\n\n{m[2]}", document, flags=re.DOTALL
    )
    if count != 1:
        raise ValueError(f"document: {count} places between <!-- {name} --> and <!-- /{name} -->: expected one")
    return found


def bars(results: Sequence[Result], title: str, path: Path) -> None:
    """A bar a figure, its least and most as a line, and its target as a mark; a logarithmic axis for speed-ups."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rc("font", size=10)
        matplotlib.rc("axes.spines", top=False, right=False)
        matplotlib.rc("svg", hashsalt="baffle", fonttype="path")
        figure = Figure(figsize=(7.6, 1.3 + 0.36 * len(results)), layout="constrained")
        ax = figure.subplots()
        largest = max(max(*r.ratios, r.target or 0.0) for r in results)
        log = largest > 8
        for i, r in enumerate(results):
            colour = {None: _PLAIN, True: _GOOD, False: _MISSED}[r.met]
            ax.barh(i, r.ratio, height=0.62, color=colour)
            ax.hlines(i, min(r.ratios), max(r.ratios), color="#222222", linewidth=1.2)
            right = max(max(r.ratios), r.target or 0.0)
            ax.annotate(
                f"{r.ratio:.3g}", (right, i), xytext=(6, 0), textcoords="offset points", va="center", fontsize=9
            )
            if r.target is not None:
                ax.vlines(r.target, i - 0.42, i + 0.42, color=_TARGET, linewidth=2)
        labels = [r.case if len({q.of for q in results}) == 1 else f"{r.case}: {r.of}" for r in results]
        ax.set_yticks(range(len(results)), labels)
        ax.set_ylim(len(results) - 0.4, -0.6)
        if log:
            ax.set_xscale("log")
            ax.set_xlim(0.9 * min(1.0, *(min(r.ratios) for r in results)), 1.7 * largest)
            ticks = [m * 10.0**e for e in range(-2, 4) for m in (1, 2, 5)]
            low, high = ax.get_xlim()
            ax.set_xticks([t for t in ticks if low <= t <= high])
            ax.set_xticks([], minor=True)
            ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        else:
            ax.set_xlim(0, 1.15 * largest)
        wanted = {r.wanted for r in results if r.target is not None}
        told = f"; black mark: the target, {wanted.pop()}" if len(wanted) == 1 else ""
        ax.set_xlabel(f"ratio, median of turns{told}")
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=11)
        ax.grid(axis="x", color="#dddddd", linewidth=0.6)
        ax.set_axisbelow(True)
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata: dict[str, Any] = {"Date": None} if path.suffix == ".svg" else {"Software": None}
        figure.savefig(path, metadata=metadata, dpi=160)
