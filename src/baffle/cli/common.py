"""Shared by the commands: the console for errors, common arguments, checks of run folders, printing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console

from baffle.errors import CorruptRunError, OptionError
from baffle.runfolder.journal import Journal
from baffle.training.build import command_of as command_of

errors = Console(stderr=True)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of stdout.")]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")]


def print_json(value: object) -> None:
    """Print one line of JSON to stdout."""
    print(msgspec.json.encode(value).decode())


def warn_of_lost(journal: Journal) -> None:
    """Print a note if the file of rows is shorter than the metrics."""
    if journal.lost:
        errors.print(
            f"note: {journal.path / 'rows.bin'} was cut short: it holds {len(journal.rows)} rows, metrics mention "
            f"{journal.lost} more",
            soft_wrap=True,
            highlight=False,
        )


def require_rounds(journal: Journal, *, whole: bool) -> None:
    """Raise unless the run has rounds and, with ``whole``, no damage after them."""
    if journal.damage and (whole or not journal.rows):
        raise CorruptRunError(f"{journal.damage}; {len(journal.rows)} rounds before it are intact")
    if not journal.rows:
        raise OptionError("run", str(journal.path), "a run with at least one round")
    if whole:
        warn_of_lost(journal)
