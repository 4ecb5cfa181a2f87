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

from baffle.cli.common import Json, RunPath, command_of, errors, number_or_auto, option, print_json, warn_of_lost
from baffle.core.method import Method
from baffle.core.optim import Cosine
from baffle.report.events import EventLog
from baffle.runfolder.journal import Journal
from baffle.runfolder.metrics import Record
from baffle.runtimes.evaluation_plan import EvaluationPlan
from baffle.training.build import Setup, assemble, evaluated_as
from baffle.training.loop import resume, train
from baffle.training.options import DEFAULT_ALPHA, DEFAULT_CLIENTS, DEFAULT_SHARDS, TrainConfig, train_config
from baffle.training.result import Run

_DATA, _LEARN, _RUN = "Data and clients", "Method", "Run"
_D = TrainConfig()
TensorBoard = Annotated[
    bool, typer.Option("--tensorboard", help="Write event files to RUN/events.", rich_help_panel=_RUN)
]


def train_command(
    config: Annotated[Path | None, typer.Argument(metavar="[CONFIG.toml]", help="Options by name; flags win.")] = None,
    dataset: Annotated[
        str | None, option("digits, mnist, fashion-mnist, cifar10, cifar100, or arrays (your own).", _DATA, _D.dataset)
    ] = None,
    data: Annotated[str | None, option("Folder of the official files, or FILE.npz.", _DATA)] = None,
    augment: Annotated[bool | None, option("Augment batches: shift by up to 4 pixels, flip.", _DATA, "no")] = None,
    holdout: Annotated[int | None, option("Examples a class to hold out and evaluate on meanwhile.", _DATA)] = None,
    model: Annotated[str | None, option("One of 'baffle models', or package.module:builder.", _DATA, _D.model)] = None,
    activation: Annotated[str | None, option("hardswish, relu, selu or gelu.", _DATA, "hardswish")] = None,
    norm: Annotated[str | None, option("group or none; by default the model's own.", _DATA)] = None,
    start: Annotated[
        str | None, option("Weights to start from: a run folder (its average), or FILE.safetensors.", _DATA)
    ] = None,
    trainable: Annotated[
        str | None, option("What is trained: all, head, scales, or a pattern of names.", _DATA, _D.trainable)
    ] = None,
    prune: Annotated[float | None, option("Share of the weights to prune before training.", _DATA, _D.prune)] = None,
    prune_by: Annotated[
        str | None,
        option("magnitude, inputs (a forward-only score), or channels (a smaller model).", _DATA, _D.prune_by),
    ] = None,
    runtime: Annotated[
        str | None, option("torch, ort or openvino; auto: the faster of torch and openvino.", _DATA, _D.runtime)
    ] = None,
    precision: Annotated[
        str | None, option("fp32, bf16, fp16, int8 or int8-weights, where the runtime has it.", _DATA, _D.precision)
    ] = None,
    branches: Annotated[
        bool | None, option("Rank-1 perturbations beside the weights, in float (ort, openvino).", _DATA, "no")
    ] = None,
    clients: Annotated[int | None, option("Number of clients.", _DATA, DEFAULT_CLIENTS)] = None,
    partition: Annotated[str | None, option("iid, dirichlet, shards, or column.", _DATA, _D.partition)] = None,
    alpha: Annotated[float | None, option("Dirichlet parameter; smaller is less alike.", _DATA, DEFAULT_ALPHA)] = None,
    shards: Annotated[int | None, option("Shards of sorted labels a client.", _DATA, DEFAULT_SHARDS)] = None,
    participation: Annotated[float | None, option("Share of clients in a round.", _DATA, _D.participation)] = None,
    batch_size: Annotated[int | None, option("Examples of a client's mini-batch.", _DATA, _D.batch_size)] = None,
    num_directions: Annotated[
        int | None, option("K: directions, and numbers a client returns.", _LEARN, _D.num_directions)
    ] = None,
    family: Annotated[str | None, option("rank1, rademacher or gaussian directions.", _LEARN, _D.family)] = None,
    sharing: Annotated[
        str | None, option("shared directions (scalars can be summed), or per-client.", _LEARN, _D.sharing)
    ] = None,
    difference: Annotated[
        str | None, option("forward (K+1 passes) or central (2K); by default forward in fp32, else central.", _LEARN)
    ] = None,
    sigma: Annotated[
        str | None, option("Step of the finite difference; auto: clients measure it.", _LEARN, _D.sigma)
    ] = None,
    lattice: Annotated[
        int | None, option("Perturb matrices on the int8 lattice by so many codes, 1 to 8; 0: by sigma.", _LEARN, 0)
    ] = None,
    optimizer: Annotated[str | None, option("sgd, adam or adamw, on the server.", _LEARN, _D.optimizer)] = None,
    lr: Annotated[float | None, option("Learning rate.", _LEARN, _D.lr)] = None,
    schedule: Annotated[str | None, option("constant, or cosine over the rounds.", _LEARN, _D.schedule)] = None,
    momentum: Annotated[float | None, option("Momentum of sgd.", _LEARN, _D.momentum)] = None,
    weight_decay: Annotated[float | None, option("Weight decay.", _LEARN, _D.weight_decay)] = None,
    clip_scalars: Annotated[float | None, option("Clients clip each scalar to this.", _LEARN)] = None,
    clip_update: Annotated[float | None, option("The server clips the estimate's max-norm to this.", _LEARN)] = None,
    secure_sum: Annotated[
        bool | None, option("Sum the clients' integers so that the server sees the sum alone.", _LEARN, "no")
    ] = None,
    ema: Annotated[float | None, option("Decay of the averaged weights that are evaluated.", _LEARN, _D.ema)] = None,
    guard: Annotated[
        str | None, option("If training diverges: rollback (with a smaller lr), stop, or off.", _LEARN, _D.guard)
    ] = None,
    rounds: Annotated[int | None, option("Updates of the weights.", _RUN, _D.rounds)] = None,
    local_steps: Annotated[int | None, option("SGD steps on a client in a round.", _LEARN, _D.local_steps)] = None,
    local_lr: Annotated[float | None, option("Their learning rate; plain sgd: lr / local_steps.", _LEARN)] = None,
    backprop: Annotated[
        str | None, option("Baseline with true gradients, without guard: fedsgd, or fedavg (with local steps).", _RUN)
    ] = None,
    seed: Annotated[int | None, option("Seed of everything random.", _RUN, _D.seed)] = None,
    threads: Annotated[
        int | None, option("Passes side by side, each on one thread; by default one a core.", _RUN)
    ] = None,
    strategy: Annotated[
        str | None,
        option("How torch evaluates: copies, stacked, streaming; auto: by a short measurement.", _RUN, _D.strategy),
    ] = None,
    memory: Annotated[
        str | None, option("What evaluating may take besides the model, as 64MB; by default what is fast.", _RUN)
    ] = None,
    evaluate_every: Annotated[int | None, option("Rounds between evaluations.", _RUN, _D.evaluate_every)] = None,
    snapshot_every: Annotated[int | None, option("Rounds between snapshots.", _RUN, _D.snapshot_every)] = None,
    out: Annotated[Path | None, option("New run folder; by default runs/DATE-TIME-MODEL.", _RUN)] = None,
    tensorboard: TensorBoard = False,
    json_output: Json = False,
) -> None:
    """Train a model by forward passes only.

    Simulates the clients in this process and writes a run folder that can be resumed and replayed. With
    --backprop it trains the same by true gradients, for comparison; that run can only be reported and compared.
    """
    flags: dict[str, object] = {k: v for k, v in locals().items() if k in TrainConfig.__struct_fields__}
    flags["sigma"] = number_or_auto("sigma", sigma)
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
