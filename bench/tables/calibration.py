"""Which sigma gives a derivative: correlation with float64 by sigma, model and precision, before and after training.

    python -m bench.tables.calibration [--models lenet ...] [--dataset mnist --data FOLDER] [--plot FOLDER]

Trained weights are those of a few hundred steps of Adam by backpropagation. Each cell is one ``baffle calibrate``
command, by central differences but for one row. Prints the Markdown tables of docs/inference.md, and with --plot
draws one picture per model. Takes about 15 minutes on two cores; with MNIST 40.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from torch import nn

import baffle as bf
from baffle.data import Dataset
from baffle.errors import MissingExtraError, OptionError
from baffle.models import build
from baffle.report.charts import Chart, Line, Panel, draw, drawable

STATES = ("initial", "trained")
_GOOD = 0.97  # correlation of a sigma that is good enough


@dataclass(frozen=True)
class Cell:
    """One way to take differences, and the options of ``baffle calibrate`` for it."""

    name: str
    options: str
    lattice: bool = False


def cells(bf16: str) -> tuple[Cell, ...]:
    """All ways; ``bf16`` is the runtime that computes in it."""
    return (
        Cell("torch fp32, forward", "--runtime torch --difference forward"),
        Cell("torch fp32", "--runtime torch --difference central"),
        Cell(f"{bf16} bf16", f"--runtime {bf16} --precision bf16 --difference central"),
        Cell("ort int8-weights", "--runtime ort --precision int8-weights --difference central"),
        Cell("ort int8", "--runtime ort --precision int8 --difference central"),
        Cell("ort int8, rank-1 branches", "--runtime ort --precision int8 --branches --difference central"),
        Cell("ort int8, lattice", "--runtime ort --precision int8 --lattice 1 --difference central", lattice=True),
    )


def runtime_of_bf16() -> str:
    """OpenVINO where it can compute in bf16, else torch."""
    data = Dataset(np.zeros((1, 4), np.float32), np.zeros(1, np.int64))
    bundle = bf.export(nn.Linear(4, 2), F.cross_entropy, data)
    try:
        bf.OpenVinoRuntime(bundle, threads=1, precision="bf16")
    except (MissingExtraError, OptionError):
        return "torch"
    return "openvino"


def train(name: str, train_set: Dataset, test: Dataset, steps: int, seed: int, file: Path) -> float:
    """Backpropagation with Adam on batches of 64; weights by name go to a file. The accuracy on the test data."""
    model = build(name, train_set.x.shape[1:], int(train_set.y.max()) + 1, seed)
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        batch = train_set.take(rng.choice(len(train_set), 64, replace=False))
        optimizer.zero_grad()
        F.cross_entropy(model(torch.from_numpy(batch.inputs())), torch.from_numpy(batch.y)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    safetensors.numpy.save_file({n: p.detach().numpy() for n, p in model.named_parameters()}, file)
    runtime = bf.TorchRuntime(model, F.cross_entropy)
    correct = runtime.evaluate(runtime.initial_weights(), test).correct
    assert correct is not None
    return float(correct.mean())


def measure(cell: Cell, common: list[str]) -> dict[str, Any]:
    """What ``baffle calibrate`` says."""
    command = [sys.executable, "-m", "baffle", "calibrate", *common, *cell.options.split(), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)  # its progress bar would get into this one's way
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure_model(name: str, options: argparse.Namespace, ways: tuple[Cell, ...], progress: Progress) -> dict[str, Any]:
    """Every cell at initial and at trained weights."""
    line = progress.add_task(name, total=len(STATES) * len(ways))
    given = f"--model {name} --dataset {options.dataset} --seed {options.seed} --batch-size {options.batch_size}"
    given += f" --num-directions {options.num_directions}"
    common = [*given.split(), *([] if options.data is None else ["--data", options.data])]
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trained.safetensors"
        train_set, test = bf.load(options.dataset, options.data)
        accuracy = train(name, train_set, test, options.steps, options.seed, file)
        for state in STATES:
            start = ["--start", str(file)] if state == "trained" else []
            for cell in ways:
                found.append({"state": state, "cell": cell.name, **measure(cell, [*common, *start])})
                progress.advance(line)
    return {"model": name, "dataset": options.dataset, "steps": options.steps, "accuracy": accuracy, "cells": found}


def number(value: float | None, form: str = ".3f") -> str:
    """For a table; nothing where it is infinite."""
    return "-" if value is None or not np.isfinite(value) else format(value, form)


def print_model(result: dict[str, Any]) -> None:
    """Three tables: correlation by sigma, what is chosen, and the lattice by codes."""
    on_ladder = [c for c in result["cells"] if c["points"][0]["lattice"] == 0]
    on_lattice = [c for c in result["cells"] if c["points"][0]["lattice"] > 0]
    print(f"{result['model']} on {result['dataset']}; trained: {result['steps']} steps, ", end="")
    print(f"test accuracy {result['accuracy']:.3f}. Correlation by sigma, the chosen one in bold:\n")
    sigmas = [f"{p['sigma']:g}" for p in on_ladder[0]["points"]]
    print(f"| weights | client | {' | '.join(sigmas)} |")
    print("| --- " * (2 + len(sigmas)) + "|")
    for c in on_ladder:
        shown = [number(p["correlation"]) for p in c["points"]]
        bold = [f"**{s}**" if p["sigma"] == c["sigma"] else s for s, p in zip(shown, c["points"], strict=True)]
        print(f"| {c['state']} | {c['cell']} | {' | '.join(bold)} |")
    print(f"\n| weights | client | chosen sigma | correlation | at least {_GOOD} | slope | noise | best |")
    print("| --- " * 8 + "|")
    for c in on_ladder:
        chosen = next(p for p in c["points"] if p["sigma"] == c["sigma"])
        best = max(c["points"], key=lambda p: float(p["correlation"]))
        good = "yes" if chosen["correlation"] >= _GOOD else "no"
        shown = [f"{c['sigma']:g}", number(chosen["correlation"]), good, number(chosen["slope"])]
        shown += [number(chosen["noise"]), f"{number(best['correlation'])} at {best['sigma']:g}"]
        print(f"| {c['state']} | {c['cell']} | {' | '.join(shown)} |")
    print("\n| weights | client | codes | median step | correlation | slope | noise |")
    print("| --- " * 7 + "|")
    for c in on_lattice:
        for p in c["points"]:
            shown = [str(p["lattice"]), f"{p['sigma']:.2g}", *(number(p[f]) for f in ("correlation", "slope", "noise"))]
            print(f"| {c['state']} | {c['cell']} | {' | '.join(shown)} |")
    print()


def plot(result: dict[str, Any], file: Path) -> None:
    """Correlation against sigma, one curve per precision, one panel for each state of the weights."""
    panels = []
    for state in STATES:
        lines = []
        for index, c in enumerate(c for c in result["cells"] if c["state"] == state):
            x, y = (np.array([p[field] for p in c["points"]], np.float64) for field in ("sigma", "correlation"))
            codes = [p["lattice"] for p in c["points"]]
            label = f"{c['cell']} of {codes[0]} to {codes[-1]} codes" if codes[0] else c["cell"]
            lines.append(Line(label, x, y, colour=index))
        panels.append(Panel(f"{state} weights", tuple(lines), low=0.0, high=1.02))
    title = drawable(f"{result['model']} on {result['dataset']}: correlation by sigma", 60)
    caption = (
        "Correlation of finite differences with derivatives in float64 along the same directions (1 is best). On the "
        "lattice sigma is the median step of the weights."
    )
    file.write_bytes(draw(Chart("calibration", title, caption, "sigma", tuple(panels), log_x=True)))


def main() -> None:
    """Measure all models, print the tables, draw the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["lenet", "wrn-10-2", "transformer"])
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--data")
    parser.add_argument("--steps", type=int, default=400, help="of Adam, before the trained weights are measured")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--num-directions", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, metavar="FOLDER")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    ways = cells(runtime_of_bf16())
    results: list[dict[str, Any]] = []
    with Progress(console=Console(stderr=True)) as progress:
        for name in options.models:
            results.append(measure_model(name, options, ways, progress))
            if options.json:
                options.json.write_text(json.dumps(results, indent=2) + "\n")
    for result in results:
        print_model(result)
        if options.plot:
            options.plot.mkdir(parents=True, exist_ok=True)
            plot(result, options.plot / f"calibration-{result['model']}-{result['dataset']}.png")


if __name__ == "__main__":
    main()
