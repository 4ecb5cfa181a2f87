"""Reports of run folders for people: ``report`` tells of one run, ``compare`` lays several over one another.

Both read configuration, metrics and rows; the folder of a baseline with true gradients has no rows, and what rows
tell is then left out.

Beside them, for a run that is going on: ``status`` and, for TensorBoard, ``events``. These do without matplotlib, so
it is loaded with the first page.
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
