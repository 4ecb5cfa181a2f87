"""Training with clients that can only infer: float32, bf16, int8, the int8 lattice, pruned, at one budget.

    python -m bench.tables.inference digits|mnist [--data FOLDER] [--seeds 3] [--plot FILE.png] [--json FILE]

Takes about 5 minutes (digits) and 20 (mnist) on two idle cores, a run on each. Runs that are in the JSON file are
not repeated, so that it can be interrupted.

digits: the 8 x 8 images enlarged to 16 x 16, shared directions; mnist: the official files, reduced to 14 x 14 (so
that it takes minutes), directions of each client's own. LeNet with two poolings (``lenet-small``), for mnist with
GroupNorm; ten IID clients, K = 100 rank-1 directions, forward differences, so 101 passes a client and round in every
row; Adam 1e-2 on a cosine, sigma measured by the clients. The accuracy is that of the averaged weights on the test
data, evaluated by the runtime that trained them and by PyTorch in float32. Prints the tables of docs/inference.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import nn

import baffle as bf
from baffle.core.cores import cores
from baffle.core.types import Masks, Sharing
from baffle.data import Dataset
from baffle.errors import OptionError
from baffle.models import build
from baffle.report.charts import Chart, Line, Panel, draw
from baffle.runtimes import Runtime
from baffle.runtimes.onnx.bundle import Precision


@dataclass(frozen=True)
class Cell:
    """One way to train."""

    name: str
    runtime: str = "torch"
    precision: Precision = "fp32"
    bf16: bool = False
    lattice: int = 0
    branches: bool = False
    pruned: float = 0.0


CELLS = (
    Cell("float32, torch"),
    Cell("bf16, openvino", "openvino", bf16=True),
    Cell("int8 weights and activations, ort", "ort", "int8"),
    Cell("int8 lattice (4 codes), ort", "ort", "int8", lattice=4),
    Cell("int8 with float rank-1 branches, ort", "ort", "int8", branches=True),
    Cell("80 % pruned, torch", pruned=0.8),
)
_SETTINGS: dict[str, tuple[int, int, Sharing, str]] = {  # rounds, examples of a client's batch, normalisation
    "digits": (100, 8, "shared", "none"),
    "mnist": (180, 8, "per-client", "group"),
}


def load(name: str, folder: str | None) -> tuple[Dataset, Dataset]:
    """The data set, of another size: digits with 2 x 2 pixels for one, mnist with one for 2 x 2 (their mean)."""
    train, test = bf.load(name, folder)
    resize = enlarged if name == "digits" else reduced
    return resize(train), resize(test)


def enlarged(data: Dataset) -> Dataset:
    """Every pixel becomes 2 x 2."""
    return replace(data, x=np.repeat(np.repeat(data.x, 2, axis=2), 2, axis=3))


def reduced(data: Dataset) -> Dataset:
    """Every 2 x 2 pixels become one."""
    x = data.inputs().astype(np.float32)
    n, c, height, width = x.shape
    return replace(data, x=x.reshape(n, c, height // 2, 2, width // 2, 2).mean(axis=(3, 5)), scaling=None)


def runtime_of(cell: Cell, model: nn.Module, data: Dataset, masks: Masks | None) -> Runtime:
    """The cell's runtime; OptionError if the processor lacks the precision."""
    if cell.runtime == "torch":
        return bf.TorchRuntime(model, F.cross_entropy, threads=1, masks=masks)
    bundle = bf.export(model, F.cross_entropy, data, precision=cell.precision, branches=cell.branches)
    if cell.runtime == "openvino":
        return bf.OpenVinoRuntime(bundle, threads=1, precision="bf16" if cell.bf16 else None)
    return bf.OrtRuntime(bundle, threads=1)


def train(cell: Cell, name: str, folder: str | None, rounds: int, seed: int) -> dict[str, object] | None:
    """One run of a cell, its curve of (round, accuracy) with it; None if this processor cannot do it."""
    _, batch, sharing, norm = _SETTINGS[name]
    train_set, test = load(name, folder)
    clients = bf.partition(train_set, clients=10, seed=seed)
    model = build("lenet-small", train_set.x.shape[1:], 10, seed, norm=norm)
    masks = bf.prune(model, cell.pruned) if cell.pruned else None
    try:
        runtime = runtime_of(cell, model, train_set, masks)
    except OptionError as error:
        print(f"{cell.name}: {error}", file=sys.stderr)
        return None
    method = bf.Method(
        num_directions=100,
        sharing=sharing,
        difference="forward",
        lattice=cell.lattice,
        batch_size=batch,
        optimizer=bf.adam(0.01, schedule=bf.cosine(rounds)),
    )
    run = bf.train(
        method,
        bf.LocalEngine(runtime, clients),
        runtime.initial_weights(),
        rounds=rounds,
        test=test,
        seed=seed,
        evaluate_every=max(1, rounds // 10),
    )
    reference = bf.TorchRuntime(model, F.cross_entropy, masks=masks).evaluate(run.average, test)
    assert reference.correct is not None
    kept = None if masks is None else int(np.count_nonzero(run.weights))
    return {
        "cell": cell.name,
        "seed": seed,
        "sigma": run.records[-1].sigma,
        "accuracy": run.accuracy,
        "accuracy_float32": float(reference.correct.mean()),
        "loss": run.loss,
        "passes": sum(r.forward_passes or 0 for r in run.records),
        "seconds": round(sum(r.seconds or 0 for r in run.records), 1),
        "nonzero": kept,
        "curve": [(r.round, r.accuracy) for r in run.records if r.accuracy is not None],
    }


def plot(results: list[dict[str, object]], cells: Sequence[Cell], title: str, file: Path) -> None:
    """Accuracy against rounds, one curve per cell: the mean of the seeds."""
    lines = []
    for index, cell in enumerate(cells):
        curves = [np.array(r["curve"], np.float64) for r in results if r["cell"] == cell.name]
        if curves:
            mean = np.mean(curves, axis=0)
            lines.append(Line(cell.name, mean[:, 0], mean[:, 1], colour=index))
    caption = "Accuracy of the averaged weights on the test data, as the runtime that trained them evaluates it."
    chart = Chart("inference", title, caption, "round", (Panel("accuracy", tuple(lines), low=0.0, high=1.0),))
    file.write_bytes(draw(chart))


def main() -> None:
    """Run all cells and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=sorted(_SETTINGS))
    parser.add_argument("--data")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rounds = options.rounds or _SETTINGS[options.dataset][0]
    results: list[dict[str, object]] = []
    if options.json and options.json.exists():
        results = json.loads(options.json.read_text())
    known = {(r["seed"], r["cell"]) for r in results}
    cells = [cell for cell in CELLS if options.dataset == "digits" or not cell.branches]  # the slowest
    jobs = [job for job in itertools.product(range(options.seeds), cells) if (job[0], job[1].name) not in known]
    with ProcessPoolExecutor(cores(), get_context("spawn")) as pool:
        asked = [pool.submit(train, cell, options.dataset, options.data, rounds, seed) for seed, cell in jobs]
        for done in track(as_completed(asked), "training", total=len(asked), console=Console(stderr=True)):
            found = done.result()
            results += [found] if found is not None else []
            if options.json:
                options.json.write_text(json.dumps(results, indent=2) + "\n")
    results.sort(key=lambda r: int(str(r["seed"])))
    print(
        "| client | sigma | accuracy (seeds) | mean | against float32 | weights in float32 | client passes | seconds |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    base = None
    for cell in cells:
        of_cell = [r for r in results if r["cell"] == cell.name]
        if not of_cell:
            print(f"| {cell.name} | | not on this processor | | | | | |")
            continue
        accuracies, floats, sigmas, seconds = (
            [float(str(r[field])) for r in of_cell] for field in ("accuracy", "accuracy_float32", "sigma", "seconds")
        )
        mean = float(np.mean(accuracies))
        base = mean if base is None else base
        shown = " ".join(f"{a:.3f}" for a in accuracies)
        chosen = " ".join(sorted({f"{s:.2g}" for s in sigmas}))
        print(
            f"| {cell.name} | {chosen} | {shown} | {mean:.3f} | {100 * (mean - base):+.1f} points | "
            f"{np.mean(floats):.3f} | {of_cell[0]['passes']:,} | {np.mean(seconds):.0f} |"
        )
    if options.plot:
        plot(results, cells, f"{options.dataset}: clients that only infer", options.plot)


if __name__ == "__main__":
    main()
