"""``make deploy-demo``: a federation of processes on this machine, in which a client and the server are killed.

SuperLink (TLS, node authentication), SuperExec and three ``baffle node`` on the loopback interface train digits. During
the run one client and then the ServerApp get ``kill -9``, and are started again. At the end it is checked that nothing
was lost: the journal replays to the same weights, all clients answered from the server's state, and the bytes sent down
are at most 5 % of what sending the weights each round takes. Exit code 1 if not.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import numpy as np

import baffle as bf
from baffle.deploy.federation import Federation
from baffle.deploy.flower.app_bundle import app_folder
from baffle.errors import BaffleError, FederationError
from baffle.runfolder.clients import Outcome, read_rounds

ROUNDS, CLIENTS, BATCH = 200, 3, 16
KILLED = 1  # the client
AT = 20  # the round
PATIENCE = 240.0  # seconds for the next thing to happen
MOST = 0.05  # bytes down, of those of the weights each round


def main() -> int:
    """Train, kill, check; 0 if all is well."""
    parser = argparse.ArgumentParser(description="Train digits with processes that are killed during the run.")
    parser.add_argument("--folder", type=Path, help="for keys, data, logs and the run; by default a temporary one")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"{ROUNDS} by default; at least {5 * AT}")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, _interrupt)
    with tempfile.TemporaryDirectory(prefix="baffle-demo-") as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with Federation(folder) as federation:
                run = _train(federation, options.rounds)
            return _check(run, options.rounds)
        except KeyboardInterrupt:
            print("interrupted: all processes have ended")
            return 130
        except (BaffleError, OSError) as error:
            print(f"error: {error}")
            log = federation.folder / "superexec.log"
            print(log.read_text(errors="replace")[-2000:] if log.exists() else "")
            return 1


def _train(federation: Federation, rounds: int) -> Path:
    """The run folder of a run in which a client and the server were killed."""
    out = federation.folder / "run"
    if out.exists():
        raise FederationError(f"{out} is there already: expected a new folder")
    federation.start()
    _say("SuperLink and SuperExec are up: TLS, node authentication, one port of the loopback interface")
    train, _ = bf.load("digits")
    for n, part in enumerate(bf.partition(train, clients=CLIENTS)):
        data = federation.folder / f"client-{n}.npz"
        np.savez(data, x=part.x, y=part.y)
        federation.start_node(f"client-{n}", data)
        _say(f"client-{n}: key registered, started with {len(part)} examples")
    options = federation.folder / "train.toml"
    options.write_text(f"rounds = {rounds}\nbatch-size = {BATCH}\n")

    def submit() -> None:
        federation.submit(app_folder(), config=str(options), out=str(out), clients=CLIENTS, deadline=5.0)

    submit()
    _say(f"submitted: digits, {rounds} rounds")
    _wait(lambda: _rounds(out) > AT, f"round {AT}")
    name = f"client-{KILLED}"
    _end(federation.nodes[name])
    without = _rounds(out)
    _say(f"round {without}: kill -9 of {name}")
    _wait(lambda: "late" in _outcomes(out, without), "a round without it")
    _say("a round closed at its deadline without it; those that follow do not wait")
    federation.restart_node(name)
    _say(f"{name}: started again with the same key; it is let in when its last heartbeat has lapsed")
    back = _rounds(out)
    _wait(lambda: "ok" in _outcomes(out, back), f"an answer of {name}")
    _say(f"round {_rounds(out) - 1}: {name} has caught up and answers")
    [server] = federation.server_apps()
    os.kill(server, signal.SIGKILL)
    _wait(lambda: server not in federation.server_apps(), "the end of the ServerApp")
    done = _rounds(out)
    _say(f"round {done}: kill -9 of the ServerApp")
    submit()
    _say("submitted again with the same run folder")
    _wait(lambda: _rounds(out) > done, "that it continues")
    _say(f"it continues at round {done}")
    _wait((out / "summary.json").exists, "the end of the run", 4 * PATIENCE)
    return out


def _check(run: Path, rounds: int) -> int:
    """Print the result of the run; return 1 if something was lost."""
    summary = json.loads((run / "summary.json").read_text())
    records = bf.Journal.open(run).records
    complete = [record.round for record in records] == list(range(rounds + 1))
    _say(f"{'all' if complete else 'NOT all'} {rounds} rounds are in the journal")
    command = [sys.executable, "-m", "baffle", "replay", str(run)]
    replayed = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    same = replayed == summary["weights_sha256"]
    _say(f"'baffle replay' rebuilds {'the same weights' if same else f'OTHER weights: {replayed}'}")
    logs = read_rounds(run)
    agree = {v.client for v in logs[-1].visits if v.outcome == "ok"} == set(range(CLIENTS))
    agree = agree and not any(log.refused for log in logs)
    _say(f"{'every client' if agree else 'NOT every client'} answered the last round, from the server's state")
    down, whole = sum(record.bytes_down or 0 for record in records), 4 * summary["parameters"] * CLIENTS * rounds
    _say(f"bytes down: {down:,}, {100 * down / whole:.1f} % of {whole:,} for the weights each round")
    print(f"accuracy {summary['accuracy']:.3f}")
    print(f"sha256 {summary['weights_sha256']}")
    return 0 if complete and same and agree and down <= MOST * whole else 1


def _rounds(run: Path) -> int:
    """How many rounds are done."""
    file = run / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def _outcomes(run: Path, since: int) -> list[Outcome]:
    """How the killed client took part in the rounds from ``since`` on."""
    return [v.outcome for log in read_rounds(run) if log.round >= since for v in log.visits if v.client == KILLED]


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def _wait(condition: Callable[[], bool], what: str, seconds: float = PATIENCE) -> None:
    give_up = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > give_up:
            raise FederationError(f"waited {seconds:g} s in vain for {what}")
        time.sleep(0.1)


def _say(text: str) -> None:
    print(f"{time.monotonic() - _BEGAN:6.1f} s  {text}", flush=True)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


_BEGAN = time.monotonic()

if __name__ == "__main__":
    sys.exit(main())
