"""The charts of a run, and of several overlaid."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from baffle.core.types import DEFAULT_BITS, limit_of
from baffle.data import Dataset
from baffle.report.charts import Chart, Line, Panel, drawable, unit
from baffle.report.run import Floats, RecordedRun, cumulative, floats, round_kind
from baffle.report.signal_noise import Progress, measure_power, pool
from baffle.report.text import counted

_AGAINST = {"round": "rounds", "passes": "forward passes", "bytes": "bytes sent", "seconds": "time"}
_WINDOWS = 8
_APART = 20.0  # ratio of the runs' costs above which their axis is logarithmic
_MOST_COLUMNS = 60  # clients with one column each; above, a histogram
_RASTER = (80, 150)  # most rows and columns of the image of who took part


def progress_charts(logs: Sequence[RecordedRun]) -> list[Chart]:
    """Loss and accuracy of the averaged weights against rounds, passes, bytes and seconds."""
    charts, names = list[Chart](), _legend_names(logs)
    for kind in ("round", "passes", "bytes", "seconds"):
        spent = [cumulative(log, kind) for log in logs]
        ends = [float(np.nanmax(x)) for x in spent if np.isfinite(x).any() and np.nanmax(x) > 0]
        apart = kind != "round" and bool(ends) and max(ends) > _APART * min(ends)
        size, label = unit(kind, max((float(np.nanmax(x)) for x in spent if np.isfinite(x).any()), default=0.0))
        panels = []
        for field in ("loss", "accuracy"):
            lines = []
            for index, (log, x) in enumerate(zip(logs, spent, strict=True)):
                y = floats(getattr(record, field) for record in log.records)
                known = np.isfinite(x) & np.isfinite(y)
                if known.any():
                    name = names[index] if len(logs) > 1 else field
                    lines.append(Line(name, x[known] / size, y[known], colour=index))
            if lines:
                panels.append(Panel(field, tuple(lines), log=None if field == "loss" else False))
        baselines = any(log.backprop for log in logs) and kind == "passes"
        data = " or ".join(dict.fromkeys(log.data for log in logs))
        caption = (
            f"Loss (lower is better) and accuracy (higher is better) of the averaged weights on the {data} against "
            f"{_AGAINST[kind]}{', summed over all clients and rounds so far' if kind in ('passes', 'bytes') else ''}."
        )
        if apart:
            caption += " The axis is logarithmic."
        if baselines:
            caption += " Runs with exact gradients do a backward pass after each forward pass, which is not counted."
        if panels:
            title = f"Loss and accuracy against {_AGAINST[kind]}" if len(panels) > 1 else f"Against {_AGAINST[kind]}"
            marks = _marks(logs[0], cumulative(logs[0], kind) / size, kind) if len(logs) == 1 else ()
            charts.append(Chart(f"progress-{kind}", title, caption, label, tuple(panels), marks, log_x=apart))
    return charts


def signal_charts(logs: Sequence[RecordedRun], progress: Progress | None = None) -> list[Chart]:
    """Signal-to-noise of the estimates against rounds: as measured in windows, and in theory."""
    lines, sentences, names = list[Line](), list[str](), _legend_names(logs)
    for index, log in enumerate(logs):
        powers = measure_power(log, progress=progress)
        if not powers or sum(p.noise for p in powers) <= 0:
            continue
        name = f"{names[index]}: " if len(logs) > 1 else ""
        windows = [pool(part) for part in np.array_split(np.array(powers, object), min(_WINDOWS, len(powers)))]
        x, y, low, high = (np.array(values) for values in zip(*windows, strict=True))
        x = x + (index - (len(logs) - 1) / 2) * 0.008 * (x[-1] - x[0])  # bars side by side
        lines.append(Line(f"{name}measured", x, y, colour=index, low=low, high=high))
        equal = np.sqrt([p.equal / p.noise if p.noise > 0 else math.nan for p in powers])
        rounds = np.array([float(p.round) for p in powers])
        lines.append(Line(f"{name}theory", rounds, equal, style="dashed", colour=index))
        _, mean, least, most = pool(powers)
        whose = f"{log.name}: over" if len(logs) > 1 else "Over"
        sentences.append(
            f"{whose} all {counted(len(powers), 'rebuilt round')} {mean:.3g} (one standard error: {least:.3g} to "
            f"{most:.3g}), in theory {float(np.nanmean(equal)):.3g}."
        )
    if not lines:
        return []
    caption = (
        "How much of the rebuilt estimate is gradient: the norm of the clients' mean gradient over that of the noise "
        "which K random directions leave, in windows of rounds with a bar of one standard error either side. Dashed, "
        "what theory says if all clients have the same gradient: √(C K/n) for n parameters, and C clients with "
        "directions of their own (C = 1 if they share them). Points below it mean clients that disagree, or scalars "
        "that are not only gradient (curvature, rounding, clipping). "
        "The gradient is that of each round's mini-batches. "
    )
    return [
        Chart(
            "signal",
            "Signal-to-noise of the estimate",
            caption + " ".join(sentences),
            "round",
            (Panel("|gradient| / |noise|", tuple(lines), low=0),),
            _marks(logs[0], cumulative(logs[0], "round"), "round") if len(logs) == 1 else (),
        )
    ]


def scalar_charts(log: RecordedRun) -> list[Chart]:
    """Scalars and their scale, what was clipped, learning rate and step."""
    if not log.records:
        return []
    x, marks = cumulative(log, "round"), _marks(log, cumulative(log, "round"), "round")
    fields = ("scalar_rms", "exponent", "clipped", "nonfinite", "clip_factor", "lr", "sigma")
    # a rollback repeats the values of the round that it returns to: left out
    y = {f: floats(None if r.restores is not None else getattr(r, f) for r in log.records) for f in fields}
    rates = Chart(
        "rates",
        "Learning rate and step" if not log.backprop else "Learning rate",
        "The server's learning rate in each round"
        + ("." if log.backprop else ", and sigma, the step of the differences."),
        "round",
        (Panel("learning rate", (Line("learning rate", x, y["lr"]),), low=0),)
        + (() if log.backprop else (Panel("sigma", (Line("sigma", x, y["sigma"], colour=1),), low=0),)),
        marks,
    )
    if log.backprop:
        return [rates]
    unit_of_scale = np.exp2(y["exponent"])
    scale = [Line("root mean square", x, y["scalar_rms"]), Line("unit of the integers", x, unit_of_scale, "dashed", 1)]
    scale.append(Line("largest that can be sent", x, unit_of_scale * limit_of(DEFAULT_BITS), "dashed", 2))
    limit = min((clip.limit for clip in log.config.method.client), default=None)
    if limit is not None:
        scale.append(Line("clients' clipping norm", x, np.full(len(x), limit), "dashed", 3))
    return [
        Chart(
            "scalars",
            "Scalars and their scale",
            "Root mean square of the aggregated scalars (derivatives of the clients' mean loss along the directions), "
            "between the finest and the largest value that the round's integers can carry: it should stay well inside.",
            "round",
            (Panel("loss per unit of step", tuple(scale), log=True),),
            marks,
        ),
        Chart(
            "clipping",
            "Clipped and non-finite scalars, clipped updates",
            "Scalars that clients clipped or that were not finite (sent as 0), of all clients in a round: both should "
            "be rare; and the factor by which the server shrank the update (1: not clipped).",
            "round",
            (
                Panel(
                    "scalars a round",
                    (Line("clipped", x, y["clipped"]), Line("not finite", x, y["nonfinite"], "dashed", 1)),
                    low=0,
                    high=None if np.nansum(y["clipped"] + y["nonfinite"]) else 1,
                ),
                Panel("factor", (Line("factor", x, y["clip_factor"], colour=2),), low=0, high=1.05),
            ),
            marks,
        ),
        rates,
    ]


def client_charts(log: RecordedRun) -> list[Chart]:
    """Who took part: rounds by client, and clients against rounds where not all took part in all."""
    if not log.rows:
        return []
    clients = len(log.config.clients)
    part = np.zeros((clients, len(log.rows)))
    for column, row in enumerate(log.rows):
        if row.restores is None:  # else it repeats another round's row
            part[list(row.participants), column] = 1
    counts = part.sum(axis=1)
    if clients <= _MOST_COLUMNS:
        panel, xlabel = Panel("rounds taken part in", columns=(np.arange(clients, dtype=np.float64), counts)), "client"
        caption = f"In how many of the {counted(len(log.rows), 'round')} so far each client took part."
    else:
        heights, edges = np.histogram(counts, bins=min(40, max(1, round(float(np.ptp(counts))))))
        columns = ((edges[:-1] + edges[1:]) / 2, heights.astype(np.float64))
        panel, xlabel = Panel("clients", columns=columns), "rounds taken part in"
        caption = f"How many of the {clients:,} clients took part in how many of the {len(log.rows):,} rounds so far."
    charts = [Chart("participation", "Rounds that clients took part in", caption, xlabel, (panel,))]
    if not (counts == counts.max()).all() or counts.max() < len(log.rows):
        rows, columns_ = (-(-size // most) for size, most in zip(part.shape, _RASTER, strict=True))
        shares = _bin(_bin(part, rows).T, columns_).T
        extent = (-0.5, len(log.rows) - 0.5, clients - 0.5, -0.5)
        caption = "Which clients took part in which rounds: the darker a cell, the larger the share of its rounds."
        raster = Panel("client", image=shares, shade="share of the cell's rounds", extent=extent)
        charts.append(Chart("participants", "Who took part when", caption, "round", (raster,)))
    return charts


def partition_chart(clients: Sequence[Dataset], classes: int) -> Chart:
    """How many examples of each class every client has."""
    counts = np.array([np.bincount(data.y.astype(np.int64), minlength=classes) for data in clients], np.float64)
    image = Panel(
        "client",
        image=counts,
        most=float(counts.max()),
        shade="examples",
        extent=(-0.5, classes - 0.5, len(clients) - 0.5, -0.5),
    )
    sizes = counts.sum(axis=1)
    caption = (
        f"Examples of each class that every client has. {counted(len(clients), 'client')} with {sizes.min():,.0f} to "
        f"{sizes.max():,.0f} examples."
    )
    return Chart("partition", "Classes of each client's examples", caption, "class", (image,))


def time_charts(log: RecordedRun) -> list[Chart]:
    """Seconds of each round."""
    y = floats(record.seconds for record in log.records)
    if not np.isfinite(y).any():
        return []
    panel = Panel("seconds a round", (Line("seconds", cumulative(log, "round"), y, "dots"),), log=None)
    caption = "What each round took, evaluation of the averaged weights included where there was one."
    return [Chart("seconds", "Time of a round", caption, "round", (panel,))]


def _legend_names(logs: Sequence[RecordedRun]) -> list[str]:
    """The runs' names as a chart can show them, still distinct."""
    names = [drawable(log.name) for log in logs]
    return [f"{i + 1}: {name}" if names.count(name) > 1 else name for i, name in enumerate(names)]


def _marks(log: RecordedRun, x: Floats, kind: str) -> tuple[tuple[float, str], ...]:
    """Marks: rollbacks on every axis, rounds without an update on the axis of rounds."""
    marks: list[tuple[float, str]] = []
    for record, position in zip(log.records, x.tolist(), strict=True):
        event = round_kind(record)
        if event == "rollback" and math.isfinite(position):
            marks.append((position, "rollback"))
        elif event != "update" and kind == "round":
            marks.append((position, "no update"))
    return tuple(marks)


def _bin(values: Floats, size: int) -> Floats:
    """Means of ``size`` rows each."""
    starts = np.arange(0, len(values), size)
    counts = np.diff(np.append(starts, len(values)))
    return np.asarray(np.add.reduceat(values, starts, axis=0) / counts[:, None])
