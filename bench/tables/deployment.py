"""Deployment measured with real processes on this machine: SuperLink, SuperExec and clients on loopback, with TLS.

    python -m bench.tables.deployment trip       [--rounds 60] [--stock-rounds 8]   seconds of a round with trivial work
    python -m bench.tables.deployment downlink   [--rounds 200]                     bytes down: rows against weights
    python -m bench.tables.deployment many       [--clients 50] [--rounds 20]       many warm clients: errors, memory
    python -m bench.tables.deployment simulation [--clients 100] [--rounds 10]      the same app in Flower with Ray

Each prints a table and, with --json FILE, writes its numbers. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

import baffle as bf
from baffle.deploy.federation import Federation
from baffle.deploy.flower.app_bundle import app_folder
from baffle.runfolder.clients import read_rounds
from baffle.training.options import TrainConfig
from bench.process_memory import memory_mib

Found = dict[str, object]

_TRIVIAL: dict[str, str | int | float] = {
    "model": "mlp",
    "batch-size": 1,
    "num-directions": 1,
    "sigma": 1e-3,
    "evaluate-every": 1000,
}
_PATIENCE = 1800.0  # seconds for a run


def main() -> None:
    """Run one benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, function, defaults in (
        ("trip", trip, {"rounds": 60, "stock_rounds": 8}),
        ("downlink", downlink, {"rounds": 200}),
        ("many", many, {"clients": 50, "rounds": 20}),
        ("simulation", simulation, {"clients": 100, "rounds": 10}),
    ):
        command = commands.add_parser(name)
        command.set_defaults(function=function)
        for option, value in defaults.items():
            command.add_argument(f"--{option.replace('_', '-')}", type=int, default=value)
        command.add_argument("--json", type=Path)
    options = vars(parser.parse_args())
    function, file = options.pop("function"), options.pop("json")
    found = function(**options)
    print_table(found)
    if file:
        file.write_text(json.dumps(found, indent=2) + "\n")


def trip(rounds: int, stock_rounds: int) -> list[Found]:
    """Three clients that evaluate one direction on one example: what is left is the transport."""
    found: list[Found] = []
    with tempfile.TemporaryDirectory() as folder, Federation(Path(folder)) as federation:
        parts = write_parts(federation, TrainConfig(clients=3))
        federation.start()
        for name, file in parts.items():
            federation.start_node(name, file)
        run = train(federation, {**_TRIVIAL, "rounds": rounds}, clients=3)
        found.append(round_times("warm clients (baffle node)", run))
    with tempfile.TemporaryDirectory() as folder, Federation(Path(folder)) as federation:
        parts = write_parts(federation, TrainConfig(clients=3))
        federation.start()
        for name, file in parts.items():
            start_stock_node(federation, name, file)
        run = train(federation, {**_TRIVIAL, "rounds": stock_rounds}, clients=3)
        found.append(round_times("stock clients (flower-supernode)", run))
    return found


def downlink(rounds: int) -> list[Found]:
    """Digits with three clients: bytes down by rows, and by weights each round; state hashes agree or it would end."""
    found: list[Found] = []
    for kind in ("replay", "weights"):
        with tempfile.TemporaryDirectory() as folder, Federation(Path(folder)) as federation:
            parts = write_parts(federation, TrainConfig(clients=3))
            federation.start()
            for name, file in parts.items():
                federation.start_node(name, file)
            run = train(federation, {"rounds": rounds, "batch-size": 16}, clients=3, downlink=kind)
            summary = json.loads((run / "summary.json").read_text())
            plain = 4 * summary["parameters"] * 3 * (rounds + 1)
            found.append(
                {
                    "downlink": kind,
                    "accuracy": round(summary["accuracy"], 3),
                    "bytes down": summary["bytes_down"],
                    "of sending float32 weights": f"{summary['bytes_down'] / plain:.2%}",
                    "bytes up": summary["bytes_up"],
                    "sha256": summary["weights_sha256"][:12],
                    "seconds": summary["seconds"],
                }
            )
    return found


def many(clients: int, rounds: int) -> list[Found]:
    """Many warm clients on this machine: how rounds went, and what a client takes."""
    with tempfile.TemporaryDirectory() as folder, Federation(Path(folder)) as federation:
        parts = write_parts(federation, TrainConfig(clients=clients))
        federation.start()
        for number, (name, file) in enumerate(parts.items()):
            federation.start_node(name, file)
            if number % 2:  # each imports PyTorch: not all at once
                time.sleep(1.0)
        run = train(federation, {"rounds": rounds, "batch-size": 16}, clients=clients, deadline=300.0, quorum=1.0)
        memory = [memory_mib(process.pid) for process in federation.nodes.values()]
        own = [own_mib(process.pid) for process in federation.nodes.values()]
        logs = read_rounds(run)
        outcomes = Counter(visit.outcome for log in logs for visit in log.visits)
        summary = json.loads((run / "summary.json").read_text())
        return [
            {
                "clients": clients,
                "rounds": summary["rounds"],
                "answers": outcomes["ok"],
                "late, refused, failed, offline": sum(outcomes.values()) - outcomes["ok"],
                "accuracy": round(summary["accuracy"], 3),
                "median round (s)": round(statistics.median(log.seconds for log in logs), 2),
                "peak RSS a client (MiB)": round(statistics.median(memory)),
                "of it not shared (MiB)": round(statistics.median(own)),
            }
        ]


def simulation(clients: int, rounds: int) -> list[Found]:
    """The same app, run by Flower's simulation: virtual clients in a few Ray actors."""
    with tempfile.TemporaryDirectory() as folder:
        home, out = Path(folder) / "flwr", Path(folder) / "run"
        home.mkdir()
        (home / "config.toml").write_text(
            '[superlink]\ndefault = "sim"\n\n[superlink.sim]\naddress = ":local:"\n'
            f"options.num-supernodes = {clients}\noptions.backend.client-resources.num-cpus = 1\n"
        )
        options = write_options(Path(folder), {"rounds": rounds, "batch-size": 8, "num-directions": 20, "model": "mlp"})
        environment = {
            **Federation(Path(folder) / "unused", secure=False).environment,
            "FLWR_HOME": str(home),
            "RAY_USAGE_STATS_ENABLED": "0",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        }
        values = [f"clients={clients}", f'config="{options}"', f'out="{out}"']
        command = ["flwr", "run", str(app_folder()), "sim", *(part for value in values for part in ("-c", value))]
        started = time.monotonic()
        try:
            subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
            wait_for(lambda: (out / "summary.json").exists())
            seconds = time.monotonic() - started
        finally:
            stop_local_superlink(home)
        logs = read_rounds(out)
        outcomes = Counter(visit.outcome for log in logs for visit in log.visits)
        return [
            {
                "virtual clients": clients,
                "rounds": rounds,
                "answers": outcomes["ok"],
                "late, refused, failed, offline": sum(outcomes.values()) - outcomes["ok"],
                "median round (s)": round(statistics.median(log.seconds for log in logs[1:]), 2),
                "seconds with start": round(seconds, 1),
            }
        ]


def write_parts(federation: Federation, options: TrainConfig) -> dict[str, Path]:
    """Digits in parts, one file per client."""
    train_set, _ = bf.load("digits")
    files = {}
    for number, part in enumerate(options.split(train_set)):
        name = f"client-{number:04d}"
        files[name] = federation.folder / f"{name}.npz"
        np.savez(files[name], x=part.x, y=part.y)
    return files


def write_options(folder: Path, options: dict[str, str | int | float]) -> Path:
    """A configuration file."""
    file = folder / "train.toml"
    file.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in options.items()))
    return file


def start_stock_node(federation: Federation, name: str, data: Path) -> None:
    """Flower's own client, which starts a process for each message."""
    key = federation.make_key(name)
    port = 20000 + int(name.rpartition("-")[2])
    federation.nodes[name] = federation.start_process(
        name,
        [
            "flower-supernode",
            *("--superlink", federation.address, "--root-certificates", federation.folder / "ca.crt"),
            *("--auth-supernode-private-key", key, "--port", str(port)),
            *("--node-config", f'data="{data}" name="{name}"'),
        ],
    )


def train(federation: Federation, options: dict[str, str | int | float], **config: str | int | float | bool) -> Path:
    """Submit a run and wait for its end; its folder."""
    out = federation.folder / "run"
    run = federation.submit(app_folder(), config=str(write_options(federation.folder, options)), out=str(out), **config)
    next_look = time.monotonic() + 30

    def done() -> bool:
        nonlocal next_look
        if (out / "summary.json").exists():
            return True
        if time.monotonic() > next_look:
            next_look = time.monotonic() + 30
            status = federation.status(run)
            if status == "finished:failed":
                raise SystemExit(f"the run failed: {federation.flwr('log', str(run), 'local', '--show')[-2000:]}")
        return False

    wait_for(done)
    return out


def round_times(name: str, run: Path) -> Found:
    """Seconds of the rounds, without the first, which sets clients up."""
    seconds = [log.seconds for log in read_rounds(run)[1:]]
    return {
        "clients": name,
        "rounds": len(seconds),
        "median (s)": round(statistics.median(seconds), 3),
        "90 % (s)": round(float(np.quantile(seconds, 0.9)), 3),
        "longest (s)": round(max(seconds), 3),
    }


def wait_for(condition: Callable[[], bool]) -> None:
    """Look every half second."""
    give_up = time.monotonic() + _PATIENCE
    while not condition():
        if time.monotonic() > give_up:
            raise SystemExit("the run did not end in time")
        time.sleep(0.5)


def own_mib(pid: int) -> float:
    """Resident memory that no other process shares."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private")) / 1024


def stop_local_superlink(home: Path) -> None:
    """End the SuperLink that ``flwr run`` started for a simulation, known by the database it was given."""
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(home / "local-superlink").encode() in entry.read_bytes():
                os.kill(int(entry.parent.name), 15)
        except (OSError, ProcessLookupError):
            continue


def print_table(rows: list[Found]) -> None:
    """As Markdown."""
    print("| " + " | ".join(rows[0]) + " |")
    print("| " + " | ".join("---" for _ in rows[0]) + " |")
    for row in rows:
        print("| " + " | ".join(f"{v:,}" if type(v) is int else str(v) for v in row.values()) + " |")


if __name__ == "__main__":
    main()
