"""What the commands share: the console, common arguments, run folders, printing."""

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


def option(help: str, panel: str, default: object = None) -> typer.models.OptionInfo:
    """An option that shows its default without having one, so that a file's value can show through."""
    shown = f"{help} [dim]\\[default: {default}][/dim]" if default is not None else help
    info: typer.models.OptionInfo = typer.Option(help=shown, rich_help_panel=panel, show_default=False)
    return info


def number_or_auto(field: str, text: str | None) -> float | str | None:
    """The value of an option that is a number or "auto"."""
    if text is None or text == "auto":
        return text
    try:
        return float(text)
    except ValueError:
        raise OptionError(field, text, "a number > 0, or auto") from None


def print_json(value: object) -> None:
    """One line of JSON on stdout."""
    print(msgspec.json.encode(value).decode())


def warn_of_lost(journal: Journal) -> None:
    """Say so if the file of rows is shorter than the metrics."""
    if journal.lost:
        errors.print(
            f"note: {journal.path / 'rows.bin'} was cut short: it holds {len(journal.rows)} rows, metrics tell of "
            f"{journal.lost} more",
            soft_wrap=True,
            highlight=False,
        )


def require_rounds(journal: Journal, *, whole: bool) -> None:
    """A run that has rounds, and with ``whole`` one without damage behind them."""
    if journal.damage and (whole or not journal.rows):
        raise CorruptRunError(f"{journal.damage}; {len(journal.rows)} rounds before it are intact")
    if not journal.rows:
        raise OptionError("run", str(journal.path), "a run with at least one round")
    if whole:
        warn_of_lost(journal)
