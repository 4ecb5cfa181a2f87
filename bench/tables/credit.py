"""Training in few passes: credit by rows beside the published method and backpropagation, on MNIST and CIFAR-10.

    python -m bench.tables.credit [mnist] [bits] [cifar10] [wrn] [transformer] [passes] [ablation] [losses] \
        --data DIR [--seeds 0 1 2] [--write]

Ten clients with 32 examples each per round, Adam on a cosine. Every cell is one run; cells that are done are kept in
docs/credit.json, from which ``--write`` makes the tables and the picture of docs/credit.md (``credit_page``); without
names it does nothing else. All of it takes many hours on one core: ``mnist`` and ``bits`` about one.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Literal

import msgspec
import torch
import torch.nn.functional as F
from torch import nn

import baffle as bf
from baffle.models import build
from baffle.models.parts import norm_of
from baffle.models.transformer import transformer
from baffle.runtimes.pytorch.credit import CreditRuntime
from baffle.training.backprop import train_backprop
from bench.tables import credit_page
from bench.tables.credit_page import BACKWARD, Cell, Result, Way
from bench.tables.local_losses import LocalLosses, local_loss

DOCS = Path(__file__).parents[2] / "docs"
CLIENTS, BATCH, SIGMA = 10, 32, 1e-3
Data = Literal["mnist", "cifar10"]


def convolutions(shape: tuple[int, ...], classes: int) -> nn.Sequential:
    """Four convolutions of 32, 64, 128 and 128 channels with GroupNorm, three max-poolings, a 2 x 2 average pool."""
    layers: list[nn.Module] = []
    inputs = shape[0]
    for index, width in enumerate((32, 64, 128, 128)):
        layers += [nn.Conv2d(inputs, width, 3, padding=1), norm_of("group", width), nn.Hardswish()]
        layers += [nn.MaxPool2d(2)] if index < 3 else []
        inputs = width
    for layer in layers:
        if isinstance(layer, nn.Conv2d) and layer.bias is not None:
            nn.init.kaiming_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * inputs, classes))


def patches(shape: tuple[int, ...], classes: int) -> nn.Module:
    """The package's transformer with four layers of width 96 on patches of 4 x 4 pixels."""
    return transformer(shape, classes, width=96, depth=4)


MODELS = {
    "lenet": "lenet",
    "convolutions": "bench.tables.credit:convolutions",
    "wrn-10-2": "wrn-10-2",
    "transformer": "bench.tables.credit:patches",
}


def backprop(like: Cell, *rates: float) -> list[Cell]:
    """FedSGD with the same clients, batches and rounds, for each learning rate."""
    plain = msgspec.structs.replace(like, way="backprop", num_directions=1, slices=1, bits=32)
    return [msgspec.structs.replace(plain, lr=lr) for lr in rates]


def mnist(seed: int) -> Iterator[Cell]:
    """The paper's LeNet in 6 and 11 passes."""
    six = Cell("mnist", "lenet", "local", 5, 8, 8, 0.03, 172, seed)
    eleven = msgspec.structs.replace(six, num_directions=10)
    longer = msgspec.structs.replace(eleven, rounds=344)
    yield from (six, *backprop(six, 0.01, 0.03), eleven, longer, *backprop(longer, 0.03))


def bits(seed: int) -> Iterator[Cell]:
    """Fewer bits a number."""
    for count in (8, 4, 1, 32):
        yield Cell("mnist", "lenet", "local", 5, 8, count, 0.03, 172, seed)


def cifar10(seed: int) -> Iterator[Cell]:
    """Four convolutions with GroupNorm."""
    short = Cell("cifar10", "convolutions", "local", 5, 8, 8, 0.01, 250, seed)
    long = msgspec.structs.replace(short, rounds=1000)
    yield from (short, *backprop(short, 0.0025, 0.005, 0.01), long, *backprop(long, 0.005))


def wrn(seed: int) -> Iterator[Cell]:
    """The paper's residual network."""
    for lr in (0.01, 0.005, 0.02):
        cell = Cell("cifar10", "wrn-10-2", "local", 5, 8, 8, lr, 200, seed)
        yield from (cell, *backprop(cell, lr))


def attention(seed: int) -> Iterator[Cell]:
    """A transformer on patches."""
    for lr, rate in ((0.003, 0.002), (0.01, 0.001), (0.001, 0.004)):
        cell = Cell("cifar10", "transformer", "local", 5, 8, 8, lr, 250, seed)
        yield from (cell, *backprop(cell, rate))


def passes(seed: int) -> Iterator[Cell]:
    """Accuracy by passes over each example, for each way."""
    for k in (5, 10, 2, 1, 20, 50):
        yield Cell("mnist", "lenet", "local", k, 8, 8, 0.03, 172, seed)
    for k in (10, 20, 50, 100):
        yield Cell("mnist", "lenet", "published", k, 1, 15, 0.03, 172, seed)
        if k < 100:
            yield Cell("mnist", "lenet", "exact", k, 8, 15, 0.03, 172, seed)
    yield from backprop(Cell("mnist", "lenet", "local", 5, 8, 8, 0.03, 172, seed), 0.03)


def ablation(seed: int) -> Iterator[Cell]:
    """What each part brings: whose number, slices, K, an exact head; in half an epoch and 100 rounds of CIFAR-10."""
    ways: tuple[Way, ...] = ("published", "exact", "feature", "local")
    for data, rounds in (("mnist", 86), ("cifar10", 100)):
        for k, way, slices in product((5, 10, 2, 20), ways, (8, 1, 32)):
            yield Cell(data, "lenet", way, k, slices, 15, 0.03, rounds, seed)


def losses(seed: int) -> Iterator[Cell]:
    """Local losses by backpropagation: what K could reach at most."""
    for data, model, lr, rounds in (
        ("mnist", "lenet", 0.03, 172),
        ("cifar10", "convolutions", 0.01, 250),
        ("cifar10", "convolutions", 0.005, 250),
        ("cifar10", "wrn-10-2", 0.005, 200),
        ("cifar10", "transformer", 0.002, 250),
    ):
        yield Cell(data, model, "local-backprop", 1, 1, 32, lr, rounds, seed)


SECTIONS: dict[str, Callable[[int], Iterator[Cell]]] = {
    "mnist": mnist,
    "bits": bits,
    "cifar10": cifar10,
    "wrn": wrn,
    "transformer": attention,
    "passes": passes,
    "ablation": ablation,
    "losses": losses,
}


@lru_cache(maxsize=2)
def read(data: str, folder: Path) -> tuple[bf.Dataset, bf.Dataset]:
    """An official data set, once a process."""
    return bf.load(data, folder)


def train(cell: Cell, folder: Path) -> Result:
    """One run."""
    train_set, test = read(cell.data, folder)
    model = build(MODELS[cell.model], train_set.x.shape[1:], 10, cell.seed)
    clients = bf.partition(train_set, clients=CLIENTS, seed=cell.seed)
    method = bf.Method(
        num_directions=cell.num_directions,
        slices=cell.slices,
        bits=cell.bits,
        sigma=SIGMA,
        batch_size=BATCH,
        optimizer=bf.adam(cell.lr, schedule=bf.cosine(rounds=cell.rounds)),
    )
    if "backprop" in cell.way:
        run, accuracy = by_backprop(cell, model, method, clients, test)
    else:
        runtime = runtime_of(cell, model, train_set)
        run = bf.train(
            method,
            bf.LocalEngine(runtime, clients),
            runtime.initial_weights(),
            rounds=cell.rounds,
            test=test,
            seed=cell.seed,
            evaluate_every=cell.rounds,
        )
        accuracy = run.accuracy
    if accuracy is None or run.loss is None:
        raise SystemExit(f"{cell}: no accuracy: expected one on {len(test)} test images")
    own, records = sum(p.numel() for p in model.parameters()), run.records
    return Result(
        cell=cell,
        accuracy=round(accuracy, 4),
        loss=round(run.loss, 4),
        passes=BACKWARD if "backprop" in cell.way else (records[-1].forward_passes or 0) // CLIENTS,
        weights=own,
        heads=run.state.weights.size - own,
        bytes_up=round(sum(r.bytes_up or 0 for r in records) / len(records) / CLIENTS),
        bytes_down=round(sum(r.bytes_down or 0 for r in records) / len(records) / CLIENTS),
        clipped=sum(r.clipped or 0 for r in records),
        seconds=round(sum(r.seconds or 0 for r in records)),
    )


def runtime_of(cell: Cell, model: nn.Module, sample: bf.Dataset) -> bf.TorchRuntime | CreditRuntime:
    """What evaluates a cell's passes, on one thread."""
    if cell.way == "published":
        return bf.TorchRuntime(model, F.cross_entropy, threads=1)
    credit = "global" if cell.way == "exact" else cell.way
    return CreditRuntime(model, F.cross_entropy, sample, credit=credit, threads=1)


def by_backprop(
    cell: Cell, model: nn.Module, method: bf.Method, clients: Sequence[bf.Dataset], test: bf.Dataset
) -> tuple[bf.Run, float | None]:
    """FedSGD on the loss, or on local losses, and its accuracy."""
    local = LocalLosses(model, test) if cell.way == "local-backprop" else None
    net, loss = (model, F.cross_entropy) if local is None else (local, local_loss)
    run = train_backprop(
        "fedsgd",
        method,
        bf.LocalEngine(bf.TorchRuntime(net, loss, threads=1), clients),
        net,
        loss,
        rounds=cell.rounds,
        test=test,
        seed=cell.seed,
        evaluate_every=cell.rounds,
    )
    if local is None:
        return run, run.accuracy
    run.load_into(local)
    return run, local.accuracy(test)


def results(file: Path) -> list[Result]:
    """What is done so far."""
    return msgspec.json.decode(file.read_bytes(), type=list[Result]) if file.exists() else []


def keep(file: Path, result: Result) -> None:
    """Add a result to those in the file, which another process may have written to meanwhile."""
    found = [r for r in results(file) if r.cell != result.cell] + [result]
    text = ",\n".join(msgspec.json.encode(r).decode() for r in sorted(found, key=lambda r: r.cell.order))
    beside = file.with_suffix(f".{os.getpid()}")
    beside.write_text(f"[\n{text}\n]\n")
    beside.replace(file)


def run_all(names: Sequence[str], folder: Path, seeds: Sequence[int], docs: Path) -> None:
    """Run the cells of some sections that are not done yet, seed by seed."""
    file = docs / "credit.json"
    for seed, name in product(seeds, names):
        for cell in SECTIONS[name](seed):
            if all(r.cell != cell for r in results(file)):
                result = train(cell, folder)
                keep(file, result)
                print(f"{cell.title}, seed {seed}: {result.accuracy:.4f}, {result.seconds} s", flush=True)


def main() -> None:
    """Run what is missing; write the page if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *SECTIONS], metavar="NAME", help=", ".join(SECTIONS))
    parser.add_argument("--data", type=Path, help="folder of the official files of MNIST and CIFAR-10")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--write", action="store_true", help="write the page from the results")
    parser.add_argument("--docs", type=Path, default=DOCS)
    options = parser.parse_args()
    if options.names and options.data is None:
        parser.error("--data: expected the folder of the official files")
    torch.set_num_threads(1)
    run_all(options.names, options.data, options.seeds, options.docs)
    if options.write:
        credit_page.write(results(options.docs / "credit.json"), options.docs)


if __name__ == "__main__":
    main()
