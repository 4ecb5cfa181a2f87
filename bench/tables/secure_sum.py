"""What a round of the secure sum costs: bytes and CPU of a client by stage, CPU of the server.

    python -m bench.tables.secure_sum [--clients 10 100 1000] [--scalars 100 1000] [--sample 20] [--json FILE]

All clients run here, one after another, and every letter is made. A client's CPU is the mean over ``--sample`` of
them, spread over the cohort; bytes are of all. Each case runs with nobody lost and with 10 % lost before their vector.
Takes three minutes of CPU on one core, nearly all of it that of the 1,000 clients.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ParamSpec, TypeVar

import msgspec
import numpy as np
from rich.console import Console
from rich.progress import track

from baffle.core.types import limit_of
from baffle.secure.client import SecureClient
from baffle.secure.graph import MOST_NEIGHBOURS
from baffle.secure.masks import Identity
from baffle.secure.server import SecureRound

P = ParamSpec("P")
Result = TypeVar("Result")
_KEY, _ROUND, _WEIGHT = 7, 3, 20


@dataclass
class Clock:
    """CPU seconds by name."""

    spent: dict[str, float] = field(default_factory=dict)

    def time(self, name: str, call: Callable[P, Result], *args: P.args, **kwargs: P.kwargs) -> Result:
        """Do it, and count its CPU."""
        start = time.process_time()
        result = call(*args, **kwargs)
        self.spent[name] = self.spent.get(name, 0.0) + time.process_time() - start
        return result


def measure(count: int, scalars: int, lost: int, sample: int) -> dict[str, int | float]:
    """One round; means a client, totals of the server. Raises RuntimeError if the sum is wrong."""
    server_clock, client_clock, unsampled = Clock(), Clock(), Clock()
    clients = {c: SecureClient(Identity.make(), c, _KEY) for c in range(count)}
    cards = {c: client.card for c, client in clients.items()}
    cohort, dropped = sorted(clients), set(range(0, count, count // lost)) if lost else set[int]()
    alive = [c for c in cohort if c not in dropped]
    chosen = set(alive[:: max(1, len(alive) // sample)])
    values = np.random.default_rng(0).integers(-limit_of(15), limit_of(15), (count, scalars)) * _WEIGHT
    server = SecureRound(_KEY, _ROUND, cohort, cards, scalars)
    up = down = 0

    def clock(client: int) -> Clock:
        return client_clock if client in chosen else unsampled

    for c in cohort:
        advert = clock(c).time("advertise", clients[c].advertise, _ROUND, cohort, cards)
        up += len(msgspec.msgpack.encode(advert))
        server_clock.time("adverts", server.advertise, advert)
    for c in cohort:
        introduced = server_clock.time("adverts", server.introduce, c)
        down += len(msgspec.msgpack.encode(introduced))
        if c not in dropped:
            masked = clock(c).time("mask", clients[c].mask, _ROUND, introduced, values[c], (_WEIGHT, 0, 0))
            up += len(msgspec.msgpack.encode(masked))
            server.add(masked)
    server.survive()
    for _ in ("of survivors", "of the lost"):
        for c in sorted(server.missing):
            told = server_clock.time("shares", server.survivors_for, c)
            down += len(msgspec.msgpack.encode(told))
            unmasked = clock(c).time("unmask", clients[c].unmask, told)
            up += len(msgspec.msgpack.encode(unmasked))
            server_clock.time("shares", server.unmask, unmasked)
    total, _ = server_clock.time("sum", server.total)
    if not np.array_equal(total, values[alive].sum(axis=0)):
        raise RuntimeError(f"{count} clients: the secure sum is not the plain sum")
    stages = {f"client_{name}_ms": 1000 * s / len(chosen) for name, s in client_clock.spent.items()}
    return {
        "clients": count,
        "scalars": scalars,
        "lost": len(dropped),
        "bytes_up": round(up / count),
        "bytes_down": round(down / count),
        **{name: round(spent, 2) for name, spent in stages.items()},
        "client_ms": round(sum(stages.values()), 2),
        **{f"server_{name}_ms": round(1000 * s, 1) for name, s in server_clock.spent.items()},
        "server_ms": round(1000 * sum(server_clock.spent.values()), 1),
        "sampled": len(chosen),
    }


def main() -> None:
    """Run every case and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--scalars", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--sample", type=int, default=20)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    cases = [(c, k, share * c // 10) for c in options.clients for k in options.scalars for share in (0, 1)]
    results = [measure(*case, options.sample) for case in track(cases, "rounds", console=Console(stderr=True))]
    print(f"At most {MOST_NEIGHBOURS} neighbours. Bytes and CPU ms: a client and round; server: the round.\n")
    print("| K | clients | lost | bytes up | bytes down | client ms | advert | mask | unmask | server ms | sum alone |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for r in sorted(results, key=lambda r: (r["scalars"], r["clients"], r["lost"])):
        print(
            f"| {r['scalars']:,} | {r['clients']:,} | {r['lost']} | {r['bytes_up']:,} | {r['bytes_down']:,} | "
            f"{r['client_ms']:.1f} | {r['client_advertise_ms']:.1f} | {r['client_mask_ms']:.1f} | "
            f"{r['client_unmask_ms']:.2f} | {r['server_ms']:,.0f} | {r['server_sum_ms']:,.0f} |"
        )
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
