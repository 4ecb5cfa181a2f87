"""The paper's setting on the official data: LeNet and WRN-10-2, ten IID clients x 32 examples, K = 100.

    python -m bench.tables.paper --mnist DIR --cifar10 DIR [--out runs/paper]

An epoch of MNIST (172 rounds) and 20 rounds of CIFAR-10, by forward passes with shared and with per-client directions
and by backpropagation (FedSGD), over learning rates. Each cell is one ``baffle train`` command; cells that are done
are kept. Prints the Markdown table of docs/experiments.md. Takes about two hours on two cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import track

GRADIENTS = ("shared", "per-client", "fedsgd")


@dataclass(frozen=True)
class Cell:
    """One run: data and model, where the gradient comes from, the learning rate."""

    dataset: str
    model: str
    gradients: str
    lr: float
    rounds: int
    schedule: str = "cosine"

    @property
    def name(self) -> str:
        """Name of its run folder."""
        model = "" if self.dataset == "mnist" else f"-{self.model}"
        schedule = "" if self.schedule == "cosine" else f"-{self.schedule}"
        return f"{self.dataset.removesuffix('10')}{model}-{self.gradients}-{self.lr:g}{schedule}"

    def command(self, data: Path, out: Path) -> list[str]:
        """What to type."""
        forward = ["--sharing", self.gradients, "--sigma", "0.001"]
        how = ["--backprop", "fedsgd"] if self.gradients == "fedsgd" else forward
        often = 10 if self.dataset == "mnist" else 5
        options = f"--dataset {self.dataset} --model {self.model} --clients 10 --batch-size 32 --num-directions 100"
        options += (
            f" --rounds {self.rounds} --lr {self.lr:g} --schedule {self.schedule} --evaluate-every {often} --json"
        )
        return ["train", *options.split(), *how, "--data", str(data), "--out", str(out / self.name)]


def cells(dataset: str) -> Iterator[Cell]:
    """All runs on a data set."""
    models = ["lenet"] if dataset == "mnist" else ["lenet", "wrn-10-2"]
    rates, rounds = ([0.01, 0.03, 0.1], 172) if dataset == "mnist" else ([0.01, 0.03], 20)
    for model in models:
        for gradients in GRADIENTS:
            slow = model == "wrn-10-2" and gradients != "fedsgd"  # ten minutes each
            for lr in [0.03] if slow else rates:
                yield Cell(dataset, model, gradients, lr, rounds)
            if dataset == "mnist" and gradients != "fedsgd":
                yield Cell(dataset, model, gradients, 0.03, rounds, "constant")


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mnist", type=Path, help="folder of the idx files")
    parser.add_argument("--cifar10", type=Path, help="folder of the binary batches")
    parser.add_argument("--out", type=Path, default=Path("runs/paper"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    folders = {"mnist": options.mnist, "cifar10": options.cifar10}
    todo = [(cell, folder) for name, folder in folders.items() if folder is not None for cell in cells(name)]
    found = []
    for cell, folder in track(todo, "training", console=Console(stderr=True)):
        file = options.out / f"{cell.name}.json"
        if not file.exists():
            command = [sys.executable, "-m", "baffle", *cell.command(folder, options.out)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            file.write_text(done.stdout.splitlines()[-1])
        found.append((cell, json.loads(file.read_text())))
    print("| data | model | gradient | lr | schedule | accuracy | loss | client passes | MB up | seconds |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for cell, run in found:
        how = cell.gradients if cell.gradients == "fedsgd" else f"forward, {cell.gradients}"
        print(
            f"| {cell.dataset} | {cell.model} | {how} | {cell.lr:g} | {cell.schedule} "
            f"| {run['accuracy']:.3f} | {run['loss']:.3f} "
            f"| {run['forward_passes']:,} | {run['bytes_up'] / 1e6:.2f} | {run['seconds']:.0f} |"
        )


if __name__ == "__main__":
    main()
