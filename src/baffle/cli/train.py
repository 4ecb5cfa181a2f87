"""``baffle train`` and ``baffle resume``."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from baffle.cli.common import Json, RunPath, command_of, errors, print_json, warn_of_lost
from baffle.cli.options import Flag, with_flags
from baffle.core.method import Method
from baffle.core.optim import Cosine
from baffle.report.events import EventLog
from baffle.runfolder.journal import Journal
from baffle.runfolder.metrics import Record
from baffle.runtimes.evaluation_plan import EvaluationPlan
from baffle.training.build import Setup, assemble, evaluated_as
from baffle.training.loop import resume, train
from baffle.training.options import TrainConfig, train_config
from baffle.training.result import Run

_RUN = "Run"
TensorBoard = Annotated[
    bool, typer.Option("--tensorboard", help="Write event files to RUN/events.", rich_help_panel=_RUN)
]


@with_flags([Flag(name) for name in TrainConfig.__struct_fields__])
def train_command(
    *,
    config: Annotated[Path | None, typer.Argument(metavar="[CONFIG.toml]", help="Options by name; flags win.")] = None,
    flags: dict[str, object],
    out: Annotated[
        Path | None,
        typer.Option(help="New run folder; by default runs/DATE-TIME-MODEL.", rich_help_panel=_RUN, show_default=False),
    ] = None,
    tensorboard: TensorBoard = False,
    json_output: Json = False,
) -> None:
    """Train a model by forward passes only.

    Simulates the clients in this process and writes a run folder that can be resumed and replayed. With
    --backprop it trains the same by true gradients, for comparison; that run can only be reported and compared.
    """
    options = train_config(config, flags)
    method = options.method()
    setup = assemble(options)
    path = out or Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{options.model.replace(':', '.')}"
    places = {
        name: value and str(Path(value).resolve()) for name, value in (("data", options.data), ("start", options.start))
    }
    command = msgspec.to_builtins(options) | places
    plan = "" if setup.choice is None or not setup.choice.rates else f"plan: {setup.choice}"
    with (
        _progress(options.rounds, [], plan) as progress,
        _events(path, tensorboard, progress) as tell,
        _can_go_on(path),
    ):
        run = _run(options, method, setup, path, command, tell)
    print_summary(run.summary(), json_output)


def resume_command(
    run: RunPath,
    rounds: Annotated[int | None, typer.Option(help="A new total of rounds.", min=1)] = None,
    repair: Annotated[bool, typer.Option("--repair", help="Drop rounds behind damage; they are kept aside.")] = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write event files to RUN/events.")] = False,
    json_output: Json = False,
) -> None:
    """Continue a run where it stopped, to the same weights as if it had not."""
    journal = Journal.open(run)
    warn_of_lost(journal)
    options = command_of(journal)
    setup = assemble(evaluated_as(options, EvaluationPlan.of(journal.config.plan)))
    schedule = journal.config.method.optimizer.schedule
    if rounds is not None and isinstance(schedule, Cosine) and rounds > schedule.rounds:
        errors.print(f"note: the cosine schedule ended with round {schedule.rounds}; lr stays {schedule.final:g} x lr")
    with (
        _progress(rounds or journal.config.rounds, journal.records) as progress,
        _events(run, tensorboard, progress) as tell,
        _can_go_on(run),
    ):
        done = resume(
            run,
            setup.engine,
            test=setup.test,
            validation=setup.validation,
            rounds=rounds,
            repair=repair,
            progress=tell,
        )
    print_summary(done.summary(), json_output)


def _run(
    options: TrainConfig,
    method: Method,
    setup: Setup,
    path: Path,
    command: dict[str, str | int | float | bool | None],
    progress: Callable[[Record], None],
) -> Run:
    """By forward passes, or for the baseline by backpropagation."""
    if options.backprop is None:
        return train(
            method,
            setup.engine,
            setup.initial,
            rounds=options.rounds,
            test=setup.test,
            validation=setup.validation,
            seed=options.seed,
            out=path,
            evaluate_every=options.evaluate_every,
            snapshot_every=options.snapshot_every,
            progress=progress,
            command=command,
        )
    from torch.nn.functional import cross_entropy

    from baffle.training.backprop import train_backprop

    return train_backprop(
        options.backprop,
        method,
        setup.engine,
        setup.model,
        cross_entropy,
        rounds=options.rounds,
        test=setup.test,
        validation=setup.validation,
        seed=options.seed,
        out=path,
        evaluate_every=options.evaluate_every,
        progress=progress,
        command=command,
    )


@contextmanager
def _events(run: Path, wanted: bool, progress: Callable[[Record], None]) -> Iterator[Callable[[Record], None]]:
    """Each round to the event files, too, if they are wanted."""
    with EventLog(run / "events" if wanted else None, run) as events:

        def tell(record: Record) -> None:
            events.add(record)
            progress(record)

        yield tell


@contextmanager
def _can_go_on(path: Path) -> Iterator[None]:
    """After Ctrl-C, say that nothing is lost where that is so."""
    try:
        yield
    except KeyboardInterrupt:
        if (path / "rows.bin").exists():
            told = f"stopped; the rounds so far are saved: continue with 'baffle resume {path}'"
            errors.print(told, highlight=False, markup=False, soft_wrap=True)
        raise


@contextmanager
def _progress(total: int, done: Sequence[Record], first: str = "") -> Iterator[Callable[[Record], None]]:
    """A progress bar on a terminal's stderr; elsewhere a line every tenth of the way. Begins with ``first``."""
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
    """The totals of a run that is done: a table, or one line of JSON."""
    if json_output:
        print_json(summary)
        return
    table = Table(title="run", show_header=False)
    for name, value in summary.items():
        text = f"{value:.4f}" if isinstance(value, float) and name in ("accuracy", "loss") else str(value)
        table.add_row(name, f"{value:,}" if type(value) is int else text)
    Console().print(table)
