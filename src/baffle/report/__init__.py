"""Reports of run folders for people: ``report`` describes one run, ``compare`` overlays several.

Both read configuration, metrics and rows. A backpropagation baseline has no rows; its report leaves out what only rows
contain.

``status`` and, for TensorBoard, ``events`` show a run in progress. They do not need matplotlib, which is loaded with
the first page.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from baffle.report.run import RecordedRun, read_run, totals

if TYPE_CHECKING:
    from baffle.report.pages import compare, report

__all__ = ["RecordedRun", "compare", "read_run", "report", "totals"]


def __getattr__(name: str) -> object:
    if name in ("compare", "report"):
        return getattr(importlib.import_module("baffle.report.pages"), name)
    raise AttributeError(f"module 'baffle.report' has no attribute {name!r}")
