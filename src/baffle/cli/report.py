"""``baffle report`` and ``baffle compare``: pages about runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress

from baffle.cli.common import Json, RunPath, errors, print_json


def report_command(
    run: RunPath,
    out: Annotated[Path | None, typer.Option(help="Folder for page and pictures; by default RUN/report.")] = None,
    json_output: Json = False,
) -> None:
    """One HTML page about a run, and its charts as PNGs beside it.

    Loss and accuracy against rounds, passes, bytes and seconds; the estimate's signal-to-noise; scalars, clipping,
    learning rate; who took part; what the guard did.
    """
    from baffle.report import read_run, report, totals  # matplotlib is an extra

    with _progress() as progress:
        page = report(run, out, progress)
    if json_output:
        print_json({"report": str(page), **totals(read_run(run))})
    else:
        print(page)


def compare_command(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs.")],
    out: Annotated[Path, typer.Option(help="Folder for page and pictures.")] = Path("comparison"),
    json_output: Json = False,
) -> None:
    """One HTML page that overlays several runs, backpropagation baselines included."""
    from baffle.report import compare, read_run, totals

    with _progress() as progress:
        page = compare(runs, out, progress)
    if json_output:
        print_json({"report": str(page), "runs": [{"run": str(run), **totals(read_run(run))} for run in runs]})
    else:
        print(page)


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    with Progress(console=errors, disable=not errors.is_terminal) as bar:
        line = bar.add_task("rebuilding estimates", total=None)
        yield lambda done, total: bar.update(line, completed=done, total=total)
