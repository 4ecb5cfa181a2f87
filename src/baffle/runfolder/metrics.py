"""The metrics of a run: one line of metrics.jsonl per round, what it did and cost."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from baffle.core.aggregate import scalar_rms
from baffle.core.types import Row
from baffle.errors import (
    JournalError,
)


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """A line of ``metrics.jsonl``: what one round did, and its cost.

    Loss and accuracy are those of the averaged weights, on validation data if there is any. The cost is unknown
    (None) if the line was lost and rebuilt from the row.
    """

    round: int
    applied: bool
    restores: int | None
    """The round whose state the run returned to because it had diverged, with ``loss``; None for other rounds."""
    loss: float | None
    accuracy: float | None
    lr: float
    sigma: float
    exponent: int
    clip_factor: float
    scalar_rms: float
    """Root mean square of the aggregated scalars: directional derivatives of the clients' mean loss."""
    participants: int
    clipped: int
    nonfinite: int
    forward_passes: int | None
    samples_forwarded: int | None
    bytes_up: int | None
    bytes_down: int | None
    seconds: float | None
    weights_sha256: str


def encode_record(record: Record) -> bytes:
    """A line of ``metrics.jsonl``."""
    return msgspec.json.encode(record) + b"\n"


def records_by_round(lines: Sequence[bytes]) -> dict[tuple[int, str], tuple[int, Record]]:
    """Records and their line numbers by round and hash; malformed lines are skipped."""
    records: dict[tuple[int, str], tuple[int, Record]] = {}
    for number, line in enumerate(lines):
        try:
            record = msgspec.json.decode(line, type=Record)
        except msgspec.DecodeError:
            continue
        records.setdefault((record.round, record.weights_sha256), (number, record))
    return records


def record_of(row: Row) -> Record:
    """Rebuild the record of a round from its row, without evaluation and cost."""
    return Record(
        round=row.round,
        applied=row.applied,
        restores=row.restores,
        loss=None,
        accuracy=None,
        lr=row.coefficients["lr"],
        sigma=row.sigma,
        exponent=row.exponents[0],
        clip_factor=row.clip_factor,
        scalar_rms=scalar_rms(row),
        participants=len(row.participants),
        clipped=row.clipped,
        nonfinite=row.nonfinite,
        forward_passes=None,
        samples_forwarded=None,
        bytes_up=None,
        bytes_down=None,
        seconds=None,
        weights_sha256=row.weights_sha256.hex(),
    )


def read_records(file: Path) -> tuple[tuple[Record, ...], str | None]:
    """Read metrics up to the first malformed line, and what is wrong with it. A truncated last line is ignored."""
    try:
        lines = file.read_bytes().split(b"\n")
    except OSError as error:
        raise JournalError(f"{file}: cannot be read: {error.strerror}") from error
    records: list[Record] = []
    for number, line in enumerate(lines[:-1]):
        try:
            records.append(msgspec.json.decode(line, type=Record))
        except msgspec.DecodeError as error:
            return tuple(records), f"{file}: line {number + 1}: {error}"
    return tuple(records), None


def total(values: Iterable[int | float | None]) -> int | float | None:
    """The sum, or None if a part of it is unknown."""
    known = list(values)
    return None if None in known else round(sum(v for v in known if v is not None), 3)
