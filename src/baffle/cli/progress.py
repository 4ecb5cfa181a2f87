"""Output while a run trains and when it ends: progress, event files, how to continue, totals."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from baffle.cli.common import errors, print_json
from baffle.report.events import EventLog
from baffle.runfolder.metrics import Record


@contextmanager
def write_events(run: Path, wanted: bool, progress: Callable[[Record], None]) -> Iterator[Callable[[Record], None]]:
    """Also write each round to event files if ``wanted``."""
    with EventLog(run / "events" if wanted else None, run) as events:

        def advance(record: Record) -> None:
            events.add(record)
            progress(record)

        yield advance


@contextmanager
def resumable(path: Path) -> Iterator[None]:
    """After Ctrl-C or SIGTERM, print how to continue the run, if it has begun. SIGTERM exits with code 143."""
    with _exits_on_sigterm():
        try:
            yield
        except (KeyboardInterrupt, SystemExit):
            if (path / "rows.bin").exists():
                hint = f"stopped; the rounds so far are saved: continue with 'baffle resume {path}'"
                errors.print(hint, highlight=False, markup=False, soft_wrap=True)
            raise


@contextmanager
def _exits_on_sigterm() -> Iterator[None]:
    """Raise SystemExit on SIGTERM, unless the process was started with the signal ignored."""
    default = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if not default or threading.current_thread() is not threading.main_thread():  # only it may set a handler
        yield
        return

    def end(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def show_progress(total: int, done: Sequence[Record], first: str = "") -> Iterator[Callable[[Record], None]]:
    """A progress bar on stderr, or ten lines if that is not a terminal; ``first`` is printed before the first round."""
    passes, sent = (sum(getattr(r, name) or 0 for r in done) for name in ("forward_passes", "bytes_up"))
    shown = ""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[info]}"),
        TimeRemainingColumn(),
        console=errors,
        disable=not errors.is_terminal,
    )
    with bar:
        line = bar.add_task("train", total=total, completed=len(done), info="")

        def advance(record: Record) -> None:
            nonlocal passes, sent, shown, first
            if first:
                errors.print(first, soft_wrap=True, highlight=False)
                first = ""
            passes += record.forward_passes or 0
            sent += record.bytes_up or 0
            if record.loss is not None:
                accuracy = "" if record.accuracy is None else f"accuracy {record.accuracy:.3f} "
                shown = f"loss {record.loss:.3f} {accuracy}"
            if record.restores is not None:
                seen = "its weights came near overflow" if record.loss is None else f"loss {record.loss:.3g}"
                errors.print(
                    f"note: round {record.round}: training diverged ({seen}): back to the weights after round "
                    f"{record.restores}",
                    soft_wrap=True,
                    highlight=False,
                )
            info = f"{shown} {passes:,} passes  {sent / 1e6:.2f} MB up"
            bar.update(line, completed=record.round, info=info)
            if not errors.is_terminal and record.round % max(1, total // 10) == 0:
                print(f"round {record.round}/{total}  {info}", file=sys.stderr, flush=True)

        yield advance


def print_summary(summary: Mapping[str, str | int | float | None], json_output: bool) -> None:
    """Print the totals of a finished run: a table, or one line of JSON."""
    if json_output:
        print_json(summary)
        return
    table = Table(title="run", show_header=False)
    for name, value in summary.items():
        text = f"{value:.4f}" if isinstance(value, float) and name in ("accuracy", "loss") else str(value)
        table.add_row(name, f"{value:,}" if type(value) is int else text)
    Console().print(table)
