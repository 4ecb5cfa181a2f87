"""Event files for TensorBoard, from the same records as everything else."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

from baffle.journal import Record


class EventLog:
    """placeholder"""

    def __init__(self, folder: Path | None, run: Path | None) -> None:
        self._folder = folder

    def __enter__(self) -> EventLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def add(self, record: Record) -> None:
        """placeholder"""
