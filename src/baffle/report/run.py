"""A run as read from its folder (settings, one record per round, rows), and sums over it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

from baffle.core.credit import model_table
from baffle.core.types import Row, table_size
from baffle.protocol.encoding import decode_row
from baffle.runfolder.config import RunConfig, read_config
from baffle.runfolder.journal import Journal
from baffle.runfolder.metrics import Record, read_records, total

Floats: TypeAlias = npt.NDArray[np.float64]
Value: TypeAlias = str | int | float | None

_COSTS = {"passes": "forward_passes", "bytes": "bytes_up", "seconds": "seconds"}


@dataclass(frozen=True)
class RecordedRun:
    """A run as read from its folder.

    Attributes:
        name: Name to show.
        path: The folder.
        config: Settings of the run.
        records: One record per round.
        rows: One row per round; none for a backpropagation baseline.
        damage: What could not be read, in words; None if the folder is intact.
    """

    name: str
    path: Path
    config: RunConfig
    records: tuple[Record, ...]
    rows: tuple[Row, ...] = ()
    damage: str | None = None

    @property
    def backprop(self) -> str | None:
        """Which backpropagation baseline the run is; None if it trained by forward passes only."""
        return self.config.backprop

    @property
    def evaluated(self) -> list[Record]:
        """The records of rounds after which the averaged weights were evaluated."""
        return [r for r in self.records if r.loss is not None or r.accuracy is not None]

    @property
    def data(self) -> str:
        """Name of the data that the averaged weights were evaluated on."""
        if self.config.command is None:
            return "evaluation data"
        return "validation data" if self.config.command.get("holdout") else "test data"


def read_run(path: str | Path) -> RecordedRun:
    """Read a run folder, or that of a baseline, which has no rows. Raises JournalError if it is not one."""
    path = Path(path)
    name = path.resolve().name or str(path)
    log = RecordedRun(name, path, read_config(path), ())
    if log.backprop:
        records, damage = read_records(path / "metrics.jsonl")
        return replace(log, records=records, damage=damage)
    journal = Journal.open(path)
    rows = tuple(decode_row(row) for row in journal.rows)
    damage = journal.damage or (f"{journal.lost} rows that the metrics mention are lost" if journal.lost else None)
    return RecordedRun(name, path, journal.config, tuple(journal.records), rows, damage)


def unique_names(paths: Sequence[Path]) -> list[str]:
    """The folders' names, with as many parents as needed to distinguish them, or a number.

    Examples:
        >>> unique_names([Path("/runs/a"), Path("/old/a"), Path("/runs/b"), Path("/runs/b")])
        ['runs/a', 'old/a', 'b', 'b (2)']
    """
    parts = [path.resolve().parts for path in paths]
    depth = [1] * len(parts)
    while True:
        names = ["/".join(p[-d:]) for p, d in zip(parts, depth, strict=True)]
        clash = [
            d < len(p) and any(other == name and q != p for other, q in zip(names, parts, strict=True))
            for name, p, d in zip(names, parts, depth, strict=True)
        ]
        if not any(clash):
            break
        depth = [d + c for d, c in zip(depth, clash, strict=True)]
    return [f"{n} ({names[: i + 1].count(n)})" if n in names[:i] else n for i, n in enumerate(names)]


def totals(log: RecordedRun) -> dict[str, Value]:
    """Results and costs of a run, with the names and values of ``Run.summary``; None where unknown.

    Loss and accuracy are the last ones measured before the final weights. If a run was evaluated on validation data,
    those on test data are known after its end.
    """
    last, steps = _last_evaluated(log), [0]
    for record in log.records:
        steps.append(steps[-1] + record.applied if record.restores is None else steps[record.restores + 1])
    kind = "validation_" if log.data == "validation data" else ""
    tested = {} if not kind else _summary(log)
    costs = ("forward_passes", "samples_forwarded", "bytes_up", "bytes_down", "seconds")
    return {
        **{name: tested[name] for name in ("accuracy", "loss") if name in tested},
        f"{kind}accuracy": None if last is None else last.accuracy,
        f"{kind}loss": None if last is None else last.loss,
        "rounds": max(0, len(log.records) - 1),
        "updates": steps[-1],
        "rollbacks": sum(r.restores is not None for r in log.records),
        **{name: total(getattr(record, name) for record in log.records) for name in costs},
        "parameters": table_size(model_table(log.config.table)),
        "weights_sha256": log.records[-1].weights_sha256 if log.records else None,
    }


def round_kind(record: Record) -> str:
    """The outcome of a round: "update", "rollback", "calibration", or "empty" (no usable scalar arrived)."""
    if record.restores is not None:
        return "rollback"
    if record.applied:
        return "update"
    return "empty" if record.nonfinite and record.scalar_rms == 0 else "calibration"


def cumulative(log: RecordedRun, kind: str) -> Floats:
    """The x axis of ``kind`` at each record: the round, or what all rounds so far cost (NaN where unknown)."""
    if kind == "round":
        return np.array([float(record.round) for record in log.records])
    return np.cumsum(floats(getattr(record, _COSTS[kind]) for record in log.records))


def floats(values: Iterable[float | None]) -> Floats:
    """Numbers, with NaN for what is unknown."""
    return np.array([math.nan if value is None else value for value in values], np.float64)


def _last_evaluated(log: RecordedRun) -> Record | None:
    """The last evaluated record that led to the run's weights: rounds that were rolled back did not."""
    index = len(log.records) - 1
    while index >= 0:
        record = log.records[index]
        if record.restores is None and (record.loss is not None or record.accuracy is not None):
            return record
        index = index - 1 if record.restores is None else record.restores
    return None


def _summary(log: RecordedRun) -> dict[str, Value]:
    """The summary that the run wrote at its end; empty if it has not ended, or was continued since."""
    try:
        summary = msgspec.json.decode((log.path / "summary.json").read_bytes(), type=dict[str, Value])
    except (OSError, msgspec.DecodeError):
        return {}
    last = log.records[-1].weights_sha256 if log.records else None
    return summary if summary.get("weights_sha256") == last else {}
