"""What the tests of reports share: a small run, a baseline, rows made by hand, and a parser of pages."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

import baffle as bf
from baffle.core.directions import Directions
from baffle.core.method import examples_per_weight
from baffle.core.scalars import weight_of
from baffle.core.types import Family, Row, Sharing, Table, bits_of, make_table, pack
from baffle.report import RecordedRun
from baffle.runfolder.config import RunConfig
from baffle.runfolder.metrics import Record
from helpers import METHOD, digits_engine, initial_weights

Vector = npt.NDArray[np.float64]


PNG = b"\x89PNG\r\n\x1a\n"


def assert_is_png(data: bytes) -> None:
    """Every chunk's checksum is right, and there are pixels."""
    assert data.startswith(PNG)
    position, names = len(PNG), []
    while position < len(data):
        (length,) = struct.unpack_from(">I", data, position)
        chunk = data[position + 4 : position + 8 + length]
        assert struct.unpack_from(">I", data, position + 8 + length) == (zlib.crc32(chunk),)
        names.append(chunk[:4])
        position += length + 12
    assert names[0] == b"IHDR"
    assert names[-1] == b"IEND"
    assert b"IDAT" in names


def train_with_test(out: Path, rounds: int = 6, method: bf.Method = METHOD) -> bf.Run:
    _, test = bf.load("digits")
    command: dict[str, str | int | float | bool | None] = {"model": "linear", "dataset": "digits", "alpha": None}
    return bf.train(
        method,
        digits_engine(),
        initial_weights(),
        rounds=rounds,
        test=test,
        out=out,
        evaluate_every=2,
        command=command,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "plain"
    train_with_test(path)
    return path


TABLE = make_table({"w": (12, 20), "b": (10,)})


WEIGHTS = (60, 30, 10)  # examples of three clients


def make_rows(gradients: Sequence[Vector], family: Family, sharing: Sharing, rounds: int, noise: float) -> list[Row]:
    """Rows of clients whose losses are linear: scalar k is <gradient, direction k>, plus noise."""
    count, exponent, rng = 16, -10, np.random.default_rng(5)
    asked = examples_per_weight(max(WEIGHTS), len(WEIGHTS))
    weights = [weight_of(size, asked) for size in WEIGHTS]
    rows = []
    for round in range(1, rounds + 1):
        vectors = []
        for client, (gradient, weight) in enumerate(zip(gradients, weights, strict=True)):
            owner = 0 if sharing == "shared" else client + 1
            d = Directions(TABLE, family, (9, round), owner)
            entries = np.concatenate([d.entries(i, slice(0, count)) for i in range(len(TABLE))], axis=1) * d.unit
            scalars = entries @ gradient + noise * rng.standard_normal(count)
            vectors.append(weight * np.rint(scalars * 2.0**-exponent).astype(np.int64))
        stacked = np.stack(vectors)[:, None]
        sums = stacked if sharing == "per-client" else stacked.sum(axis=0, keepdims=True)
        rows.append(
            Row(
                round=round,
                key=9,
                applied=True,
                restores=None,
                rollbacks=0,
                family=family,
                sharing=sharing,
                num_directions=count,
                difference="central",
                sigma=1.0,
                lattice=0,
                exponents=(exponent,),
                local_steps=1,
                numbers=count,
                bits=bits_of(sums),
                magnitudes=(0,),
                participants=(0, 1, 2),
                weight_sum=sum(weights),
                scalars=pack(sums, bits_of(sums)),
                clipped=0,
                nonfinite=0,
                clip_factor=1.0,
                optimizer="sgd",
                coefficients={"lr": 0.1, "weight_decay": 0.0},
                ema=0.9,
                weights_sha256=b"",
                state_sha256=b"",
            )
        )
    return rows


def log_of(rows: Sequence[Row], family: Family, sharing: Sharing, table: Table = TABLE) -> RecordedRun:
    config = RunConfig(
        method=bf.Method(num_directions=16, family=family, sharing=sharing, difference="central"),
        key=9,
        rounds=len(rows),
        evaluate_every=1,
        snapshot_every=1,
        table=table,
        plan={},
        clients=WEIGHTS,
    )
    return RecordedRun("linear", Path("linear"), config, (), tuple(rows))


def record(round: int, *, applied: bool = True, restores: int | None = None, accuracy: float | None = None) -> Record:
    return Record(
        round=round,
        applied=applied,
        restores=restores,
        loss=None if accuracy is None else 1 - accuracy,
        accuracy=accuracy,
        lr=0.1,
        sigma=1e-3,
        exponent=-8,
        clip_factor=1.0,
        scalar_rms=0.5,
        participants=3,
        clipped=0,
        nonfinite=0,
        forward_passes=10,
        samples_forwarded=10,
        bytes_up=10,
        bytes_down=10,
        seconds=0.1,
        weights_sha256="00",
    )
