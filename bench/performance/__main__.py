"""The performance suite: every figure a ratio of two things measured in turn in one run.

    python -m bench.performance [round] [floor] [mlp] [rebuild] [memory] [simulation] [profiles] [--quick]

Without names it runs every section, about 15 minutes on two cores, and writes performance.json, one picture per section
into images/, and the tables of performance.md, all in docs/ or the folder that ``--docs`` names. A section that is
left out keeps what it had. ``--quick`` takes few turns and directions, to see that all of it works.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from rich.console import Console
from rich.progress import Progress

from baffle.core.cores import cores
from bench.performance import memory as client_memory
from bench.performance import profiles, rebuild, simulation, speed
from bench.performance.results import Result, bars, compare, insert, machine, table, where
from bench.performance.workloads import WORKLOADS, precisions

DOCS = Path(__file__).parents[2] / "docs"


def memory(quick: bool, progress: Progress) -> list[Result]:
    """Streaming, the default and backpropagation (R4) against plain inference with the replay state.

    The default has its target with one thread, as a client runs: each further one has buffers of its own.
    """
    results, state = [], "inference and state"
    targets = {"streaming": 1.2, "default": 1.5, "inference": None, "backprop": None}
    for model in ("wrn-10-2", "transformer"):
        for threads in sorted({1, cores()}):
            peaks = client_memory.peaks(model, threads, 1 if quick else 3, progress)
            for work, target in targets.items():
                case = f"{WORKLOADS[model].title}, {threads} thread{'s' if threads > 1 else ''}, {work}"
                of = f"peak memory, to {state}"
                wanted = None if work == "default" and threads > 1 else target
                results.append(compare(case, peaks, work, state, of=of, unit="MiB", target=wanted, wanted="at most"))
    return results


def simulate(quick: bool, progress: Progress) -> list[dict[str, Any]]:
    """A round with 100 of many simulated clients, in bf16 where it is fast: the faster passes are, the more is left."""
    counts, found, precision = ((100,) if quick else (100, 1_000, 10_000)), [], precisions()[:2][-1]
    options = {"rounds": 3, "turns": 2, "num_directions": 10} if quick else {}
    line = progress.add_task("simulation", total=len(counts))
    for count in counts:
        found += simulation.measure([count], precision, **options)
        progress.advance(line)
    progress.remove_task(line)
    return found


def simulated(found: Sequence[Mapping[str, Any]]) -> list[Result]:
    """The shares of a round that are not forward passes, as figures."""
    results = []
    for r in found:
        perturbing = max(1.0, float(np.median(r["perturbing"])))
        shares = [1 - inside / perturbing / whole for inside, whole in zip(r["passes"], r["rounds"], strict=True)]
        results.append(
            Result(
                case=f"{r['clients']:,} clients, {r['precision']}",
                of="share of a round that is not forward passes",
                ratios=shares,
                samples={"round": r["rounds"], "passes": r["passes"]},
                unit="s",
                target=0.1,
                wanted="at most",
                note=r["runtime"],
            )
        )
    return results


@dataclass(frozen=True)
class Part:
    """A section: how it is measured, and how what it found is shown."""

    measure: Callable[[bool, Progress], Any]
    table: Callable[[Any], str]
    plot: Callable[[Any, Path], None]


def ratios(measure: Callable[[bool, Progress], list[Result]], title: str, *, targets_only: bool = False) -> Part:
    """A section of ratios; its picture shows all of them, or those that have a target."""

    def plot(results: list[Result], path: Path) -> None:
        bars([r for r in results if r.target is not None or not targets_only], title, path)

    return Part(measure, table, plot)


PARTS = {
    "round": ratios(speed.round_, "A round of clients: samples a second, ours over the reference loops"),
    "floor": ratios(speed.floor, "Time of K perturbed passes over K unperturbed ones", targets_only=True),
    "mlp": ratios(speed.mlp, "A perceptron: passes a second, ours over the loop"),
    "rebuild": Part(rebuild.measure, rebuild.table, rebuild.plot),
    "memory": ratios(memory, "A client's peak memory over inference with the replay state"),
    "simulation": Part(
        simulate,
        simulation.table,
        lambda found, path: bars(simulated(found), "A simulated round: the share that is not forward passes", path),
    ),
    "profiles": Part(profiles.measure, profiles.table, profiles.plot),
}


def main() -> None:
    """Measure, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="section", help=", ".join(PARTS))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--docs", type=Path, default=DOCS)
    parser.add_argument("--json", type=Path, help="by default performance.json in the folder of the documents")
    options = parser.parse_args()
    for name in set(options.sections) - PARTS.keys():
        parser.error(f"section {name!r}: expected one of {', '.join(PARTS)}")
    page = options.docs / "performance.md"
    if not page.exists():
        parser.error(f"--docs {options.docs}: expected a copy of the documentation with its performance.md")
    file: Path = options.json or options.docs / "performance.json"
    known: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    with Progress(console=Console(stderr=True)) as progress:
        line = progress.add_task("sections", total=len(options.sections or PARTS))
        for name in options.sections or PARTS:
            part, here = PARTS[name], machine()
            found = part.measure(options.quick, progress)
            known[name] = {"machine": here, "quick": options.quick, "results": msgspec.to_builtins(found)}
            file.write_text(json.dumps(known, indent=1) + "\n")
            (options.docs / "images").mkdir(exist_ok=True)
            part.plot(found, options.docs / "images" / f"performance-{name}.png")
            text = f"{part.table(found)}\n\n{where(here, options.quick)}"
            page.write_text(insert(page.read_text(), name, text))
            progress.console.print(text, markup=False, soft_wrap=True)
            progress.advance(line)


if __name__ == "__main__":
    main()
