"""Event files for TensorBoard, from the same records as everything else.

They are a view of the run folder: when the first round is added, the rounds before it are written from
``metrics.jsonl`` and ``clients.jsonl`` to a new file that replaces earlier ones. So each round occurs once, even if a
run is continued, repaired, or watched from the middle.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO

import msgspec

from baffle.errors import JournalError, MissingExtraError
from baffle.runfolder.clients import ROUNDS, RoundLog, read_rounds
from baffle.runfolder.metrics import Record, read_records

_TAGS = {
    "evaluation/loss": "loss",
    "evaluation/accuracy": "accuracy",
    "update/lr": "lr",
    "update/sigma": "sigma",
    "update/scalar_rms": "scalar_rms",
    "update/clip_factor": "clip_factor",
    "update/clipped": "clipped",
    "update/nonfinite": "nonfinite",
    "cost/participants": "participants",
    "cost/forward_passes": "forward_passes",
    "cost/bytes_up": "bytes_up",
    "cost/bytes_down": "bytes_down",
    "cost/seconds": "seconds",
}
_OUTCOMES = ("ok", "late", "refused", "failed", "offline")
_STEM = "events.out.tfevents."  # TensorBoard reads files with this in their names, by order of the names


class EventLog:
    """Event files about a run; to be used in a ``with`` statement.

    The step of an event is the round. For a run with clients on other machines, events also count how many of them
    responded, were late, refused, failed or offline in a round, and the time of the slowest response.

    Args:
        folder: Where to write, created with the first round; None to write nothing.
        run: The run folder; None for no history and no clients.

    Raises:
        MissingExtraError: The package ``tensorboard`` is not installed.

    Examples:
        >>> with EventLog(None, None) as events:
        ...     pass
    """

    def __init__(self, folder: Path | None, run: Path | None) -> None:
        if folder is not None:
            try:
                from tensorboard.summary.writer import record_writer  # noqa: F401
            except ImportError as error:
                raise MissingExtraError("event files need TensorBoard: pip install 'baffle[tensorboard]'") from error
        self._folder, self._run = folder, run
        self._file: IO[bytes] | None = None
        self._tail = None if run is None else _Tail(run / ROUNDS)

    def __enter__(self) -> EventLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._folder is not None and self._file is None and error is None:  # no round was left to train
            self._file = self._open(self._folder, math.inf)
        if self._file is not None:
            self._file.close()

    def add(self, record: Record) -> None:
        """Write a round that is in the run folder; the first call also writes those before. Raises JournalError."""
        if self._folder is None:
            return
        if self._file is None:
            self._file = self._open(self._folder, record.round)
        try:
            visits = {} if self._tail is None else {log.round: log for log in self._tail.read()}
            _write(self._file, record, visits.get(record.round), time.time())
            self._file.flush()
        except OSError as error:
            raise JournalError(f"{self._folder}: cannot write events: {error.strerror}") from error

    def _open(self, folder: Path, before: float) -> IO[bytes]:
        """A new file with the rounds before ``before``, which replaces existing ones."""
        try:
            return _begin(folder, _history(self._run, before))
        except OSError as error:
            raise JournalError(f"{folder}: cannot write events: {error.strerror or error}") from error


def _begin(folder: Path, history: Iterable[tuple[Record, RoundLog | None]]) -> IO[bytes]:
    folder.mkdir(parents=True, exist_ok=True)
    old = list(folder.glob(f"{_STEM}*.baffle"))
    temporary = folder / ".unfinished"
    file = temporary.open("wb")
    _write_event(file, wall_time=time.time(), file_version="brain.Event:2")
    # makes TensorBoard drop what it read from an earlier file
    _write_event(file, wall_time=time.time(), step=0, session_log={"status": "START"})
    for record, log in history:
        _write(file, record, log, time.time())
    file.flush()
    temporary.rename(folder / f"{_STEM}{time.time_ns()}.baffle")
    for other in old:
        other.unlink()
    return file


class _Tail:
    """The lines that were added to a run's ``clients.jsonl`` since the last read."""

    def __init__(self, file: Path) -> None:
        self._file, self._position = file, 0

    def read(self) -> Iterator[RoundLog]:
        try:
            with self._file.open("rb") as file:
                file.seek(self._position)
                whole, newline, _ = file.read().rpartition(b"\n")
        except FileNotFoundError:
            return
        self._position += len(whole) + len(newline)
        for line in whole.splitlines():
            with suppress(msgspec.DecodeError):  # truncated by a kill
                yield msgspec.json.decode(line, type=RoundLog)


def _history(run: Path | None, before: float) -> Iterator[tuple[Record, RoundLog | None]]:
    """The rounds before ``before``, from the run folder."""
    if run is None or not (run / "metrics.jsonl").exists():
        return
    logs = {log.round: log for log in read_rounds(run)}
    for record in read_records(run / "metrics.jsonl")[0]:
        if record.round < before:
            yield record, logs.get(record.round)


def _write(file: IO[bytes], record: Record, log: RoundLog | None, now: float) -> None:
    values = {tag: getattr(record, name) for tag, name in _TAGS.items()}
    if log is not None:
        values |= _visits(log)
        now = log.time or now
    known = [
        {"tag": tag, "simple_value": value}
        for tag, value in values.items()
        if value is not None and math.isfinite(value)
    ]
    _write_event(file, wall_time=now, step=record.round, summary={"value": known})


def _visits(log: RoundLog) -> Mapping[str, float | None]:
    """What a round cost its clients."""
    counts = {f"clients/{kind}": sum(v.outcome == kind for v in log.visits) for kind in _OUTCOMES}
    return {
        **counts,
        "clients/late_answers": log.late,
        "clients/refused_answers": log.refused,
        "clients/slowest_answer": max((v.seconds for v in log.visits if v.seconds is not None), default=None),
        "clients/seconds": log.seconds,
    }


def _write_event(file: IO[bytes], **fields: object) -> None:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    RecordWriter(file).write(Event(**fields).SerializeToString())
