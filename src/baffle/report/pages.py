"""The pages: one self-contained HTML file, and its charts as PNGs beside it."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path

from baffle.errors import JournalError, OptionError
from baffle.files import write_atomic
from baffle.report.charts import Chart, draw
from baffle.report.figures import client_charts, progress_charts, scalar_charts, signal_charts, time_charts
from baffle.report.run import Value, read_run, totals, unique_names
from baffle.report.signal_noise import Progress
from baffle.report.text import counted, describe, event_sentences, notes, settings


def report(run: str | Path, out: str | Path | None = None, progress: Progress | None = None) -> Path:
    """Write a report of a run: ``report.html`` and its charts as PNGs.

    Args:
        run: The run folder.
        out: Folder to write to; by default ``RUN/report``.
        progress: Called with the number of rebuilt estimates, and of all.

    Returns:
        Path of the page.

    Raises:
        JournalError: The run cannot be read or the report cannot be written.
    """
    log = read_run(run)
    charts = {
        "Progress": progress_charts([log]),
        "Signal and noise": [*signal_charts([log], progress), *scalar_charts(log)],
        "Clients and time": [*client_charts(log), *time_charts(log)],
    }
    sums = {name.replace("_", " "): value for name, value in totals(log).items()}
    cards = _card("Settings", _pairs_table(settings(log))) + _card("Totals", _pairs_table(sums))
    parts = [f'<div class="grid">{cards}</div>', *_list("Notes", notes(log)), *_list("Events", event_sentences(log))]
    out = log.path / "report" if out is None else Path(out)
    return _write(out, "report.html", f"Run {log.name}", describe(log), parts, charts)


def compare(runs: Sequence[str | Path], out: str | Path = "comparison", progress: Progress | None = None) -> Path:
    """Write a comparison of runs: ``compare.html`` and charts as PNGs that overlay them.

    Args:
        runs: The run folders.
        out: Folder to write to.
        progress: Called with the number of rebuilt estimates, and of all.

    Returns:
        Path of the page.

    Raises:
        OptionError: There is no run.
        JournalError: A run cannot be read or the page cannot be written.
    """
    if not runs:
        raise OptionError("runs", [], "at least one run folder")
    names = unique_names([Path(run) for run in runs])
    logs = [replace(read_run(run), name=name) for run, name in zip(runs, names, strict=True)]
    sums, chosen = [totals(log) for log in logs], [settings(log) for log in logs]
    shown = [name for name in dict.fromkeys(name for values in sums for name in values) if name != "weights_sha256"]
    options = dict.fromkeys(name for values in chosen for name in values)
    differ = [name for name in options if len({repr(values.get(name)) for values in chosen}) > 1]
    reached = _wide_table(
        [name.replace("_", " ") for name in shown],
        [(log.name, [values.get(name, "-") for name in shown]) for log, values in zip(logs, sums, strict=True)],
    )
    differences = _wide_table(names, [(name, [values.get(name, "-") for values in chosen]) for name in differ])
    parts = [
        _card("Totals", reached),
        _card("Settings that differ", differences if differ else "<p>None: the runs were made alike.</p>"),
        *_list("Notes", [f"{log.name}: {note}" for log in logs for note in notes(log)]),
    ]
    charts = {"Progress": progress_charts(logs), "Signal and noise": signal_charts(logs, progress)}
    return _write(Path(out), "compare.html", f"{counted(len(logs), 'run')} compared", ", ".join(names), parts, charts)


def _write(out: Path, name: str, title: str, lead: str, parts: Sequence[str], charts: dict[str, list[Chart]]) -> Path:
    """Draw the charts and write them and the page, whose name is ``name``."""
    pictures = {chart.name: draw(chart) for group in charts.values() for chart in group}
    figures = [
        f'<section><h2>{_text(heading)}</h2>\n<div class="grid">\n'
        + "\n".join(_figure(chart, pictures[chart.name]) for chart in group)
        + "\n</div></section>"
        for heading, group in charts.items()
        if group
    ]
    style = resources.files("baffle.report").joinpath("report.css").read_text(encoding="utf-8")
    page = "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{_text(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>",
            f'<h1>{_text(title)}</h1>\n<p class="lead">{_text(lead)}</p>',
            *parts,
            *figures,
            "</main>\n</body>\n</html>\n",
        ]
    )
    try:
        out.mkdir(parents=True, exist_ok=True)
        for stem, picture in pictures.items():
            write_atomic(out / f"{stem}.png", picture)
        write_atomic(out / name, page.encode("utf-8", "replace"))
    except OSError as error:
        raise JournalError(f"{out}: cannot write the report: {error.strerror}") from error
    return out / name


def _figure(chart: Chart, picture: bytes) -> str:
    source = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
    return (
        f'<figure class="card"><img src="{source}" alt="{_text(chart.alt)}">\n'
        f"<figcaption>{_text(chart.caption)}</figcaption></figure>"
    )


def _card(heading: str, content: str) -> str:
    return f'<div class="card"><h2>{_text(heading)}</h2>\n{content}</div>'


def _list(heading: str, sentences: Sequence[str]) -> list[str]:
    items = "\n".join(f"<li>{_text(sentence)}</li>" for sentence in sentences)
    return [f"<section><h2>{_text(heading)}</h2>\n<ul>\n{items}\n</ul></section>"] if sentences else []


def _pairs_table(values: dict[str, Value]) -> str:
    rows = "\n".join(f'<tr><th scope="row">{_text(name)}</th>{_cell(value)}</tr>' for name, value in values.items())
    return f'<div class="scroll"><table class="plain">\n{rows}\n</table></div>'


def _wide_table(columns: Sequence[str], rows: Sequence[tuple[str, Sequence[Value]]]) -> str:
    head = "".join(f'<th scope="col">{_text(name)}</th>' for name in ("", *columns))
    body = "\n".join(
        f'<tr><th scope="row">{_text(name)}</th>{"".join(_cell(value) for value in values)}</tr>'
        for name, values in rows
    )
    return f'<div class="scroll"><table class="wide">\n<tr>{head}</tr>\n{body}\n</table></div>'


def _cell(value: Value) -> str:
    """A table cell; numbers are rounded for reading, and exact in ``data``."""
    if value is None:
        return "<td>unknown</td>"
    if isinstance(value, str):
        return f'<td class="words">{_text(value)}</td>'
    shown = f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return f'<td><data value="{value!r}">{shown}</data></td>'


def _text(text: str) -> str:
    """Text for HTML: markup escaped, control characters shown as question marks."""
    return html.escape("".join(c if c.isprintable() else "?" for c in text))
