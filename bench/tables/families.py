"""Every family x difference x sharing learns digits: accuracy, passes and seconds, at equal passes a round.

    python -m bench.tables.families [--rounds 160] [--seeds 1] [--json FILE]

Prints the Markdown table of docs/design.md. Takes about 20 minutes on two cores.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import get_args

import numpy as np
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track

import baffle as bf
from baffle.core.types import Difference, Family, Sharing
from baffle.models import build


def train(family: Family, difference: Difference, sharing: Sharing, rounds: int, seed: int) -> bf.Run:
    """One run of the default model on ten clients, about a hundred passes a client and round."""
    train_set, test = bf.load("digits")
    return bf.fit(
        build("lenet-small", (1, 8, 8), 10, seed),
        bf.partition(train_set, clients=10, seed=seed),
        loss=F.cross_entropy,
        test=test,
        rounds=rounds,
        seed=seed,
        method=bf.Method(
            num_directions=100 if difference == "forward" else 50,
            family=family,
            difference=difference,
            sharing=sharing,
            sigma=1e-3,
            batch_size=16,
            optimizer=bf.adam(0.01, schedule=bf.cosine(rounds)),
        ),
    )


def main() -> None:
    """Run all twelve and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=160)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    cells = list(itertools.product(get_args(Family), get_args(Difference), get_args(Sharing)))
    results = []
    for family, difference, sharing in track(cells, "training", console=Console(stderr=True)):
        runs = [train(family, difference, sharing, options.rounds, seed).summary() for seed in range(options.seeds)]
        results.append(
            {
                "family": family,
                "difference": difference,
                "sharing": sharing,
                "K": runs[0]["num_directions"],
                "accuracy": float(np.mean([float(r["accuracy"] or 0) for r in runs])),
                "passes": int(runs[0]["forward_passes"] or 0),
                "seconds": float(np.mean([float(r["seconds"] or 0) for r in runs])),
            }
        )
    print("| family | difference | sharing | K | accuracy | client passes | seconds |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for r in results:
        print(
            f"| {r['family']} | {r['difference']} | {r['sharing']} | {r['K']} | {r['accuracy']:.3f} "
            f"| {r['passes']:,} | {r['seconds']:.0f} |"
        )
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
