"""Reports of run folders for people: one HTML page that needs nothing else, and its charts as PNGs beside it.

``report`` tells of one run, ``compare`` lays several over one another. Both read configuration, metrics and rows;
the folder of a baseline with true gradients has no rows, and what rows tell is then left out.

How much of an estimate is gradient (``measure_power``): let g = sum_v p_v g_v be what is estimated, p_v the weight
of a source v (a client with directions of its own, a local step), s_vk its K scalars. As E[d dT] = I, the mean of
s_vk^2 over k is |g_v|^2 without bias, and (BAFFLE, arXiv 2301.12195, section 3; Spall, SPSA, 1992)

    E|estimate|^2 = |g|^2 + noise,    noise = (n - 1)/K sum_v p_v^2 |g_v|^2    (n + 1 with Gaussian entries).

So the estimate's power less the noise is |g|^2 without bias, also where clients' gradients differ. Where they are
equal, |g|^2/noise is K/((n - 1) sum_v p_v^2): K/(n - 1) with shared directions, C K/(n - 1) with each client's own.
"""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from itertools import groupby
from pathlib import Path
from typing import TypeAlias

import msgspec
import numpy as np

from baffle.charts import Chart, Floats, Line, Panel, draw, drawable, unit
from baffle.client import weight_of
from baffle.errors import JournalError, OptionError
from baffle.estimate import estimate
from baffle.files import write_atomic
from baffle.journal import Journal, Record, RunConfig, _read_config, record_of
from baffle.method import Method, quantum_for
from baffle.types import LIMIT, Row, table_size
from baffle.wire import decode_row

Progress: TypeAlias = Callable[[int, int], None]
"""Called with the number of rebuilds that are done, and of all."""
Value: TypeAlias = str | int | float | None

_COSTS = {"passes": "forward_passes", "bytes": "bytes_up", "seconds": "seconds"}
_AGAINST = {"round": "rounds", "passes": "forward passes", "bytes": "bytes sent", "seconds": "time"}
_REBUILD_BUDGET = 4e9  # entries of directions that a report draws again: some seconds
_FEWEST_REBUILDS, _MOST_REBUILDS, _WINDOWS = 10, 200, 8
_MOST_COLUMNS = 60  # clients with a column each; of more, a histogram
_OPTIMIZER = {"lr", "schedule", "momentum", "weight_decay", "clip_scalars", "clip_update"}
_LOOP = {"clients", "rounds", "seed", "threads", "evaluate_every", "snapshot_every", "backprop"}
_TOLD_ELSEWHERE = {*Method.__struct_fields__, *_OPTIMIZER, *_LOOP}
"""Options of the command that method or configuration tell as well."""
_RASTER = (80, 150)  # most rows and columns of the image of who took part


@dataclass(frozen=True)
class RunLog:
    """What a folder tells of a run: configuration, a record a round, and the rows (none with true gradients).

    ``damage`` says in words what could not be read.
    """

    name: str
    path: Path
    config: RunConfig
    records: tuple[Record, ...]
    rows: tuple[Row, ...] = ()
    damage: str | None = None

    @property
    def backprop(self) -> str | None:
        """Which baseline with true gradients the run is; None if it trained by forward passes only."""
        return self.config.backprop

    @property
    def evaluated(self) -> list[Record]:
        """The records of rounds after which the averaged weights were evaluated."""
        return [r for r in self.records if r.loss is not None or r.accuracy is not None]

    @property
    def data(self) -> str:
        """What data the averaged weights were evaluated on."""
        if self.config.command is None:
            return "evaluation data"
        return "validation data" if self.config.command.get("holdout") else "test data"


@dataclass(frozen=True)
class Power:
    """The squared norm of a round's estimate, and the part of it that is noise.

    ``equal`` is the squared norm of the mean gradient if the clients' are equal (else it is more than that);
    ``variance`` that of ``signal``.
    """

    round: int
    estimate: float
    noise: float
    equal: float
    variance: float

    @property
    def signal(self) -> float:
        """Squared norm of the mean gradient, without bias; a single one is noisy and may be negative."""
        return self.estimate - self.noise


def read_run(path: str | Path) -> RunLog:
    """Read a run folder, or that of a baseline, which has no rows. Raises JournalError if it is none."""
    path = Path(path)
    name = path.resolve().name or str(path)
    log = RunLog(name, path, _read_config(path), ())
    if log.backprop:
        records, damage = _read_records(path / "metrics.jsonl")
        return replace(log, records=records, damage=damage)
    journal = Journal.open(path)
    rows = tuple(decode_row(row) for row in journal.rows)
    rebuilt = [record_of(row) for row in rows[len(journal.records) :]]
    damage = journal.damage or (f"{journal.lost} rows that the metrics tell of are lost" if journal.lost else None)
    return RunLog(name, path, journal.config, (*journal.records, *rebuilt), rows, damage)


def unique_names(paths: Sequence[Path]) -> list[str]:
    """The folders' names, with as many parents as it takes to tell them apart, or a number.

    Examples:
        >>> unique_names([Path("/runs/a"), Path("/old/a"), Path("/runs/b"), Path("/runs/b")])
        ['runs/a', 'old/a', 'b', 'b (2)']
    """
    parts = [path.resolve().parts for path in paths]
    depth = [1] * len(parts)
    while True:
        names = ["/".join(p[-d:]) for p, d in zip(parts, depth, strict=True)]
        clash = [
            d < len(p) and any(other == name and q != p for other, q in zip(names, parts, strict=True))
            for name, p, d in zip(names, parts, depth, strict=True)
        ]
        if not any(clash):
            break
        depth = [d + c for d, c in zip(depth, clash, strict=True)]
    return [f"{n} ({names[: i + 1].count(n)})" if n in names[:i] else n for i, n in enumerate(names)]


def totals(log: RunLog) -> dict[str, Value]:
    """What the run reached and cost; None where unknown. Names and values are those of ``Run.summary``.

    Loss and accuracy are the last that were measured on the way to the final weights.
    """
    last, steps = _last_evaluated(log), [0]
    for record in log.records:
        steps.append(steps[-1] + record.applied if record.restores is None else steps[record.restores + 1])
    costs = ("forward_passes", "samples_forwarded", "bytes_up", "bytes_down", "seconds")
    return {
        "accuracy": None if last is None else last.accuracy,
        "loss": None if last is None else last.loss,
        "rounds": max(0, len(log.records) - 1),
        "updates": steps[-1],
        "rollbacks": sum(r.restores is not None for r in log.records),
        **{name: _sum(getattr(record, name) for record in log.records) for name in costs},
        "parameters": table_size(log.config.table),
        "weights_sha256": log.records[-1].weights_sha256 if log.records else None,
    }


def settings(log: RunLog) -> dict[str, Value]:
    """What the run was made from, by names for people."""
    config, method, command = log.config, log.config.method, log.config.command or {}
    optimizer = msgspec.to_builtins(method.optimizer)
    schedule = optimizer.pop("schedule")
    guard = {name: value for name, value in (msgspec.to_builtins(method.guard) or {}).items() if name != "type"}
    sizes = config.clients
    chosen: dict[str, Value] = {
        "method": log.backprop or "forward passes only",
        **{
            name: value for name, value in command.items() if name not in _TOLD_ELSEWHERE and value not in (None, False)
        },
        "clients": len(sizes),
        "examples a client": f"{min(sizes)}" if len(set(sizes)) == 1 else f"{min(sizes)} to {max(sizes)}",
        "participation": method.participation,
        "batch size": method.batch_size or "all examples",
        "directions K": method.num_directions,
        "family": method.family,
        "sharing": method.sharing,
        "difference": method.difference,
        "sigma": method.sigma,
        "local steps": method.local_steps,
        "local learning rate": method.local_lr,
        "clients clip scalars to": min((c.limit for c in method.client), default=None),
        "server clips update to": min((c.max_norm for c in method.server), default=None),
        "optimizer": _rule(optimizer),
        "schedule": _rule(schedule),
        "decay of averaged weights": method.ema,
        "guard": _pairs(guard) if guard else "off",
        "rounds": config.rounds,
        "seed": config.key,
        "evaluated by": _pairs({name: value for name, value in config.plan.items() if name != "data"}),
    }
    if log.backprop:
        unused = ("directions K", "family", "sharing", "difference", "sigma", "clients clip scalars to")
        chosen = {name: value for name, value in chosen.items() if name not in unused}
    return {name: value for name, value in chosen.items() if value is not None}


def describe(log: RunLog) -> str:
    """What was trained, in a sentence."""
    command, method = log.config.command or {}, log.config.method
    model = command.get("model") or "A model"
    what = f"{model} of {table_size(log.config.table):,} parameters"
    where = f" on {command['dataset']}" if command.get("dataset") else ""
    how = (
        f"by {log.backprop} with true gradients (backpropagation)"
        if log.backprop
        else f"by forward passes only: each client returns K = {method.num_directions} numbers a round, along "
        f"{method.sharing} {method.family} directions"
    )
    return f"{what}, trained{where} in {_count(len(log.config.clients), 'client')} {how}."


def notes(log: RunLog) -> list[str]:
    """What a reader of the curves has to know, in sentences."""
    told = [
        (not log.records, "No round is done yet."),
        (log.damage is not None, f"The run is damaged; what is before the damage is shown. {log.damage}."),
        (
            0 < len(log.records) <= log.config.rounds,
            f"The run is not finished: {len(log.records) - 1} of {log.config.rounds} rounds are done.",
        ),
        (
            bool(log.records) and not log.evaluated,
            "No round was evaluated (there was no data for it), so there is neither loss nor accuracy.",
        ),
        (
            any(r.loss is None or not math.isfinite(r.loss) for r in log.evaluated),
            "At some evaluations the loss was not a finite number; they are left out.",
        ),
        (
            any(r.seconds is None for r in log.records),
            "What some rounds cost is unknown, as their metrics were lost; curves against cost end there.",
        ),
        (
            log.backprop is not None,
            "This run has true gradients: each forward pass has a backward pass besides, which is not counted.",
        ),
        (
            bool(log.records) and not log.backprop and not any(r.applied for r in log.records),
            "No round has updated the weights yet.",
        ),
    ]
    return [sentence for holds, sentence in told if holds]


def event_sentences(log: RunLog) -> list[str]:
    """Rounds that did not update the weights, and returns to an earlier state."""
    told: list[str] = []
    for kind, group in groupby(log.records, key=round_kind):
        rounds = [r.round for r in group]
        span = f"Round {rounds[0]}" if len(rounds) == 1 else f"Rounds {rounds[0]} to {rounds[-1]}"
        if kind == "calibration":
            told.append(f"{span} only measured the scale of the scalars: no update.")
        elif kind == "empty":
            told.append(f"{span} brought no usable scalar: no update.")
        elif kind == "rollback":
            for index in rounds:
                restores = log.records[index].restores
                told.append(f"Round {index} found divergence and went back to the state after round {restores}.")
    return told


def round_kind(record: Record) -> str:
    """What became of a round: "update", "rollback", "calibration", or "empty" (nothing usable came)."""
    if record.restores is not None:
        return "rollback"
    if record.applied:
        return "update"
    return "empty" if record.nonfinite and record.scalar_rms == 0 else "calibration"


def cumulative(log: RunLog, kind: str) -> Floats:
    """The x axis of ``kind`` at each record: the round, or what all rounds so far cost (NaN where unknown)."""
    if kind == "round":
        return np.array([float(record.round) for record in log.records])
    return np.cumsum(_floats(getattr(record, _COSTS[kind]) for record in log.records))


def measure_power(log: RunLog, samples: int | None = None, progress: Progress | None = None) -> list[Power]:
    """Rebuild the estimates of evenly spaced applied rounds: their power and its noise.

    ``samples`` is the number of rounds; by default as many as take some seconds.
    """
    rows = [row for row in log.rows if row.applied]
    if not rows:
        return []
    n, table, gaussian = table_size(log.config.table), log.config.table, log.config.method.family == "gaussian"
    if samples is None:
        entries = max(len(row.scalars) // 4 for row in rows) * n * (10 if gaussian else 1)
        samples = max(_FEWEST_REBUILDS, min(_MOST_REBUILDS, int(_REBUILD_BUDGET / max(entries, 1))))
    chosen = np.unique(np.linspace(0, len(rows) - 1, min(samples, len(rows))).round().astype(int))
    found: list[Power] = []
    for done, row in enumerate((rows[i] for i in chosen), 1):
        scaled = row.integers * (2.0**row.exponent / max(row.weight_sum, 1) / row.local_steps)
        scatter = float((scaled**2).mean(axis=2).sum())  # sum over the sources of p_v^2 |g_v|^2
        gradient = estimate(table, row).astype(np.float64)
        power = float(gradient @ gradient)
        noise = (n + 1 if gaussian else n - 1) / row.num_directions * scatter
        per_direction = scatter / row.num_directions
        variance = 2 * n * per_direction**2 + 4 * max(power - noise, 0.0) * per_direction
        found.append(Power(row.round, power, noise, scatter / _concentration(log.config, row), variance))
        if progress is not None:
            progress(done, len(chosen))
    return found


def _last_evaluated(log: RunLog) -> Record | None:
    """The last record with an evaluation that led to the run's weights: what a rollback undid did not."""
    index = len(log.records) - 1
    while index >= 0:
        record = log.records[index]
        if record.restores is None and (record.loss is not None or record.accuracy is not None):
            return record
        index = index - 1 if record.restores is None else record.restores
    return None


def _concentration(config: RunConfig, row: Row) -> float:
    """sum_v p_v^2 over a row's sources; 1/V for V of equal weight."""
    if row.sharing == "shared":
        return 1.0 / row.local_steps
    asked = max(1, round(config.method.participation * len(config.clients)))
    quantum = quantum_for(max(config.clients), asked)
    weights = np.array([weight_of(config.clients[client], quantum) for client in row.participants], np.float64)
    return float(((weights / weights.sum()) ** 2).sum()) / row.local_steps


def _read_records(file: Path) -> tuple[tuple[Record, ...], str | None]:
    """The metrics of a run without rows, up to the first line that is none; a last line cut short is no damage."""
    try:
        lines = file.read_bytes().split(b"\n")
    except OSError as error:
        raise JournalError(f"{file}: cannot be read: {error.strerror}") from error
    records: list[Record] = []
    for number, line in enumerate(lines[:-1]):
        try:
            records.append(msgspec.json.decode(line, type=Record))
        except msgspec.DecodeError as error:
            return tuple(records), f"{file}: line {number + 1}: {error}"
    return tuple(records), None


def _floats(values: Iterable[float | None]) -> Floats:
    return np.array([math.nan if value is None else value for value in values], np.float64)


def _sum(values: Iterable[float | None]) -> float | None:
    known = list(values)
    return None if None in known else round(sum(value for value in known if value is not None), 3)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def _rule(options: dict[str, Value]) -> str:
    """A rule of the method by its type and options."""
    numbers = _pairs({name: value for name, value in options.items() if name != "type"})
    return f"{options['type']} ({numbers})" if numbers else str(options["type"])


def _pairs(values: dict[str, Value]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def progress_charts(logs: Sequence[RunLog]) -> list[Chart]:
    """Loss and accuracy of the averaged weights against rounds, passes, bytes and seconds."""
    charts, names = list[Chart](), _legend_names(logs)
    for kind in ("round", "passes", "bytes", "seconds"):
        spent = [cumulative(log, kind) for log in logs]
        size, label = unit(kind, max((float(np.nanmax(x)) for x in spent if np.isfinite(x).any()), default=0.0))
        panels = []
        for field in ("loss", "accuracy"):
            lines = []
            for index, (log, x) in enumerate(zip(logs, spent, strict=True)):
                y = _floats(getattr(record, field) for record in log.records)
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
        if baselines:
            caption += " Runs with true gradients do a backward pass for each of theirs, which is not counted."
        if panels:
            title = f"Loss and accuracy against {_AGAINST[kind]}" if len(panels) > 1 else f"Against {_AGAINST[kind]}"
            marks = _marks(logs[0], cumulative(logs[0], kind) / size, kind) if len(logs) == 1 else ()
            charts.append(Chart(f"progress-{kind}", title, caption, label, tuple(panels), marks))
    return charts


def signal_charts(logs: Sequence[RunLog], progress: Progress | None = None) -> list[Chart]:
    """Signal-to-noise of the estimates against rounds: as measured in windows, and in theory."""
    lines, told, names = list[Line](), list[str](), _legend_names(logs)
    for index, log in enumerate(logs):
        powers = measure_power(log, progress=progress)
        if not powers or sum(p.noise for p in powers) <= 0:
            continue
        name = f"{names[index]}: " if len(logs) > 1 else ""
        windows = [_pool(part) for part in np.array_split(np.array(powers, object), min(_WINDOWS, len(powers)))]
        x, y, low, high = (np.array(values) for values in zip(*windows, strict=True))
        x = x + (index - (len(logs) - 1) / 2) * 0.008 * (x[-1] - x[0])  # bars side by side
        lines.append(Line(f"{name}measured", x, y, colour=index, low=low, high=high))
        equal = np.sqrt([p.equal / p.noise if p.noise > 0 else math.nan for p in powers])
        rounds = np.array([float(p.round) for p in powers])
        lines.append(Line(f"{name}theory", rounds, equal, style="dashed", colour=index))
        _, mean, least, most = _pool(powers)
        whose = f"{log.name}: over" if len(logs) > 1 else "Over"
        told.append(
            f"{whose} all {_count(len(powers), 'rebuilt round')} {mean:.3g} (one standard error: {least:.3g} to "
            f"{most:.3g}), in theory {float(np.nanmean(equal)):.3g}."
        )
    if not lines:
        return []
    caption = (
        "How much of the rebuilt estimate is gradient: the norm of the clients' mean gradient over that of the noise "
        "which K random directions leave, in windows of rounds with a bar of one standard error either side. Dashed, "
        "what theory says if all clients have the same gradient, √(C K/(n ∓ 1)), with C = 1 for shared directions; "
        "points below it mean clients that disagree, or scalars that are not only gradient (curvature, rounding). "
        "The gradient is that of each round's mini-batches. "
    )
    return [
        Chart(
            "signal",
            "Signal-to-noise of the estimate",
            caption + " ".join(told),
            "round",
            (Panel("|gradient| / |noise|", tuple(lines), low=0),),
            _marks(logs[0], cumulative(logs[0], "round"), "round") if len(logs) == 1 else (),
        )
    ]


def scalar_charts(log: RunLog) -> list[Chart]:
    """Scalars and their scale, what was clipped, learning rate and step."""
    if not log.records:
        return []
    x, marks = cumulative(log, "round"), _marks(log, cumulative(log, "round"), "round")
    fields = ("scalar_rms", "exponent", "clipped", "nonfinite", "clip_factor", "lr", "sigma")
    # a rollback repeats the values of the round that it returns to: left out
    y = {f: _floats(None if r.restores is not None else getattr(r, f) for r in log.records) for f in fields}
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
    scale.append(Line("largest that can be sent", x, unit_of_scale * LIMIT, "dashed", 2))
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


def client_charts(log: RunLog) -> list[Chart]:
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
        caption = f"In how many of the {_count(len(log.rows), 'round')} so far each client took part."
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
        raster = Panel("client", shares=shares, extent=extent)
        charts.append(Chart("participants", "Who took part when", caption, "round", (raster,)))
    return charts


def time_charts(log: RunLog) -> list[Chart]:
    """Seconds of each round."""
    y = _floats(record.seconds for record in log.records)
    if not np.isfinite(y).any():
        return []
    panel = Panel("seconds a round", (Line("seconds", cumulative(log, "round"), y, "dots"),), log=None)
    caption = "What each round took, evaluation of the averaged weights included where there was one."
    return [Chart("seconds", "Time of a round", caption, "round", (panel,))]


def _pool(powers: Iterable[Power]) -> tuple[float, float, float, float]:
    """Mean round and √(signal/noise) of several rounds, and that one standard error below and above."""
    found = list(powers)
    noise, signal = sum(p.noise for p in found), sum(p.signal for p in found)
    error = math.sqrt(sum(p.variance for p in found))
    if noise <= 0:
        return math.nan, math.nan, math.nan, math.nan
    middle, low, high = (math.sqrt(max(0.0, value) / noise) for value in (signal, signal - error, signal + error))
    return sum(p.round for p in found) / len(found), middle, low, high


def _legend_names(logs: Sequence[RunLog]) -> list[str]:
    """The runs' names as a chart can show them, still unlike."""
    names = [drawable(log.name) for log in logs]
    return [f"{i + 1}: {name}" if names.count(name) > 1 else name for i, name in enumerate(names)]


def _marks(log: RunLog, x: Floats, kind: str) -> tuple[tuple[float, str], ...]:
    """Rollbacks on every axis; rounds without an update on that of rounds."""
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


def report(run: str | Path, out: str | Path | None = None, progress: Progress | None = None) -> Path:
    """Write ``report.html`` and its PNGs into ``out`` (by default RUN/report); returns the page's path.

    Raises JournalError if the run cannot be read or the report cannot be written.
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
    """Write ``compare.html`` and its PNGs, which overlay several runs, into ``out``; returns the page's path.

    Raises OptionError without a run, JournalError if one cannot be read or the page cannot be written.
    """
    if not runs:
        raise OptionError("runs", [], "at least one run folder")
    names = unique_names([Path(run) for run in runs])
    logs = [replace(read_run(run), name=name) for run, name in zip(runs, names, strict=True)]
    sums, chosen = [totals(log) for log in logs], [settings(log) for log in logs]
    shown = [name for name in sums[0] if name != "weights_sha256"]
    options = dict.fromkeys(name for values in chosen for name in values)
    differ = [name for name in options if len({repr(values.get(name)) for values in chosen}) > 1]
    reached = _wide_table(
        [name.replace("_", " ") for name in shown],
        [(log.name, [values[name] for name in shown]) for log, values in zip(logs, sums, strict=True)],
    )
    differences = _wide_table(names, [(name, [values.get(name, "-") for values in chosen]) for name in differ])
    parts = [
        _card("Totals", reached),
        _card("Settings that differ", differences if differ else "<p>None: the runs were made alike.</p>"),
        *_list("Notes", [f"{log.name}: {note}" for log in logs for note in notes(log)]),
    ]
    charts = {"Progress": progress_charts(logs), "Signal and noise": signal_charts(logs, progress)}
    return _write(Path(out), "compare.html", f"{_count(len(logs), 'run')} compared", ", ".join(names), parts, charts)


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
    style = resources.files("baffle").joinpath("report.css").read_text(encoding="utf-8")
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
    """A table's cell; numbers rounded to be read, and whole in ``data``."""
    if value is None:
        return "<td>unknown</td>"
    if isinstance(value, str):
        return f'<td class="words">{_text(value)}</td>'
    shown = f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return f'<td><data value="{value!r}">{shown}</data></td>'


def _text(text: str) -> str:
    """Text for HTML: markup escaped, control characters shown as question marks."""
    return html.escape("".join(c if c.isprintable() else "?" for c in text))
