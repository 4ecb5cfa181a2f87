"""Clients without PyTorch: digits trained over pipes, and the memory of each client process.

    python -m bench.tables.edge [--rounds 200] [--clients 3] [--json FILE]

Every client is a process that cannot import PyTorch: ``python -m baffle.client.edge`` on its own part of digits.
Prints accuracy, bytes and peak resident memory by runtime and precision. Takes about five minutes on two cores.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import tempfile
from pathlib import Path

import torch.nn.functional as F
from rich.console import Console
from rich.progress import track

import baffle as bf
from baffle.engines.pipe import PipeEngine, write_clients
from baffle.models import build
from baffle.runtimes.onnx.bundle import Precision
from bench.process_memory import memory_mib

_CELLS: list[tuple[str, Precision, list[str]]] = [
    ("ort", "fp32", []),
    ("ort", "int8", []),
    ("openvino", "fp32", ["--runtime", "openvino"]),
]


def without_torch(folder: Path) -> None:
    """Put a package in front of PyTorch for all child processes: importing it fails."""
    (folder / "torch").mkdir()
    (folder / "torch" / "__init__.py").write_text("raise ImportError('no PyTorch on this machine')\n")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])


def train(precision: Precision, arguments: list[str], rounds: int, clients: int) -> dict[str, object]:
    """One run; accuracy, bytes a client and round, memory of the largest client."""
    train_set, test = bf.load("digits")
    model = build("lenet-small", (1, 8, 8), 10, 0)
    bundle = bf.export(model, F.cross_entropy, train_set, precision=precision)
    method = bf.Method(
        num_directions=100 if precision == "fp32" else 50,
        difference="forward" if precision == "fp32" else "central",
        batch_size=32,
        optimizer=bf.adam(0.01, schedule=bf.cosine(rounds)),
    )
    with tempfile.TemporaryDirectory() as name:
        commands = write_clients(bundle, bf.partition(train_set, clients, seed=0), Path(name))
        commands = [[*command, *arguments] for command in commands]
        with PipeEngine(bundle, commands, bf.OrtRuntime(bundle)) as engine:
            run = bf.train(method, engine, bundle.initial, rounds=rounds, test=test)
            peak = max(memory_mib(pid) for pid in engine.pids)
    up = sum(r.bytes_up or 0 for r in run.records) / (len(run.records) * clients)
    down = sum(r.bytes_down or 0 for r in run.records) / (len(run.records) * clients)
    return {
        "accuracy": run.accuracy,
        "bytes_up": round(up),
        "bytes_down": round(down),
        "peak_mib": round(peak, 1),
        "sigma": run.records[-1].sigma,
    }


def main() -> None:
    """Run every cell and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--clients", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as blocked:
        without_torch(Path(blocked))
        for runtime, precision, arguments in track(_CELLS, "training", console=Console(stderr=True)):
            if importlib.util.find_spec({"ort": "onnxruntime"}.get(runtime, runtime)) is None:
                continue
            found = train(precision, arguments, options.rounds, options.clients)
            results.append({"runtime": runtime, "precision": precision, **found})
    print("| runtime | precision | sigma | accuracy | bytes up | bytes down | peak RSS (MiB) |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for r in results:
        print(
            f"| {r['runtime']} | {r['precision']} | {r['sigma']:g} | {r['accuracy']:.3f} | {r['bytes_up']:,} | "
            f"{r['bytes_down']:,} | {r['peak_mib']:.0f} |"
        )
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
