"""The commands: ``baffle train | resume | replay | evaluate``. They parse, call the library and print."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Annotated, NoReturn

import msgspec

from baffle.errors import BaffleError, CorruptRunError, DataError, MissingExtraError, OptionError

try:
    import typer
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Table
except ImportError as error:
    raise MissingExtraError("the command line needs typer and rich: pip install 'baffle[cli]'") from error

import numpy as np

from baffle.config import DEFAULT_ALPHA, TrainConfig, train_config
from baffle.data import Dataset, load, partition
from baffle.engines.local import LocalEngine
from baffle.estimate import Execution
from baffle.journal import Journal, Record
from baffle.method import weights_sha256
from baffle.optim import Cosine
from baffle.train import Run, evaluate, resume, train
from baffle.types import Weights

app = typer.Typer(
    name="baffle",
    help="Federated learning without backpropagation: clients run forward passes and return K numbers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_errors = Console(stderr=True)
# typer has an exception of its own since 0.28; before, and with Flower, which wants an older one, it is click's
_BAD_USAGE: type[Exception] = getattr(typer, "TyperException", None) or import_module("click").ClickException
_MOST_CLASSES = 2**20  # a larger label is a mistake, not a reason to build such a model
_INTERRUPTED = 130  # what typer makes of Ctrl-C

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of stdout.")]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")]
_DATA, _LEARN, _RUN = "Data and clients", "Method", "Run"


def _option(help: str, panel: str, default: object = None) -> typer.models.OptionInfo:
    shown = f"{help} [dim]\\[default: {default}][/dim]" if default is not None else help
    option: typer.models.OptionInfo = typer.Option(help=shown, rich_help_panel=panel, show_default=False)
    return option


_D = TrainConfig()


@app.command("train")
def train_command(
    config: Annotated[Path | None, typer.Argument(metavar="[CONFIG.toml]", help="Options by name; flags win.")] = None,
    dataset: Annotated[str | None, _option("digits, or arrays (your own: --data FILE.npz).", _DATA, _D.dataset)] = None,
    data: Annotated[str | None, _option(".npz with x_train, y_train, x_test, y_test.", _DATA)] = None,
    model: Annotated[str | None, _option("lenet-small, mlp, or package.module:builder.", _DATA, _D.model)] = None,
    clients: Annotated[int | None, _option("Number of clients.", _DATA, _D.clients)] = None,
    partition: Annotated[str | None, _option("iid, or dirichlet (by label).", _DATA, _D.partition)] = None,
    alpha: Annotated[float | None, _option("Dirichlet parameter; smaller is less alike.", _DATA, DEFAULT_ALPHA)] = None,
    participation: Annotated[float | None, _option("Share of clients in a round.", _DATA, _D.participation)] = None,
    batch_size: Annotated[int | None, _option("Examples of a client's mini-batch.", _DATA, _D.batch_size)] = None,
    num_directions: Annotated[
        int | None, _option("K: directions, and numbers a client returns.", _LEARN, _D.num_directions)
    ] = None,
    family: Annotated[str | None, _option("rank1, rademacher or gaussian directions.", _LEARN, _D.family)] = None,
    sharing: Annotated[
        str | None, _option("shared directions (scalars can be summed), or per-client.", _LEARN, _D.sharing)
    ] = None,
    difference: Annotated[str | None, _option("forward (K+1 passes) or central (2K).", _LEARN, _D.difference)] = None,
    sigma: Annotated[float | None, _option("Step of the finite difference.", _LEARN, _D.sigma)] = None,
    optimizer: Annotated[str | None, _option("sgd, adam or adamw, on the server.", _LEARN, _D.optimizer)] = None,
    lr: Annotated[float | None, _option("Learning rate.", _LEARN, _D.lr)] = None,
    schedule: Annotated[str | None, _option("constant, or cosine over the rounds.", _LEARN, _D.schedule)] = None,
    momentum: Annotated[float | None, _option("Momentum of sgd.", _LEARN, _D.momentum)] = None,
    weight_decay: Annotated[float | None, _option("Weight decay.", _LEARN, _D.weight_decay)] = None,
    clip_scalars: Annotated[float | None, _option("Clients clip each scalar to this.", _LEARN)] = None,
    clip_update: Annotated[float | None, _option("The server clips the estimate's max-norm to this.", _LEARN)] = None,
    ema: Annotated[float | None, _option("Decay of the averaged weights that are evaluated.", _LEARN, _D.ema)] = None,
    rounds: Annotated[int | None, _option("Updates of the weights.", _RUN, _D.rounds)] = None,
    local_steps: Annotated[int | None, _option("SGD steps on a client in a round.", _LEARN, _D.local_steps)] = None,
    local_lr: Annotated[float | None, _option("Their learning rate; plain sgd: lr / local_steps.", _LEARN)] = None,
    seed: Annotated[int | None, _option("Seed of everything random.", _RUN, _D.seed)] = None,
    threads: Annotated[
        int | None, _option("Passes side by side, each on one thread; by default one a core.", _RUN)
    ] = None,
    evaluate_every: Annotated[int | None, _option("Rounds between evaluations.", _RUN, _D.evaluate_every)] = None,
    snapshot_every: Annotated[int | None, _option("Rounds between snapshots.", _RUN, _D.snapshot_every)] = None,
    out: Annotated[Path | None, _option("New run folder; by default runs/DATE-TIME-MODEL.", _RUN)] = None,
    json_output: Json = False,
) -> None:
    """Train a model by forward passes only.

    Simulates the clients in this process and writes a run folder that can be resumed and replayed.
    """
    flags = {k: v for k, v in locals().items() if k in TrainConfig.__struct_fields__}
    options = train_config(config, flags)
    method = options.method()
    engine, test, initial = _assemble(options)
    path = out or Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{options.model.replace(':', '.')}"
    with _progress(options.rounds, 0) as progress:
        run = train(
            method,
            engine,
            initial,
            rounds=options.rounds,
            test=test,
            seed=options.seed,
            out=path,
            evaluate_every=options.evaluate_every,
            snapshot_every=options.snapshot_every,
            progress=progress,
            command=msgspec.to_builtins(options) | {"data": options.data and str(Path(options.data).resolve())},
        )
    _print_run(run, json_output)


@app.command("resume")
def resume_command(
    run: RunPath,
    rounds: Annotated[int | None, typer.Option(help="A new total of rounds.", min=1)] = None,
    repair: Annotated[bool, typer.Option("--repair", help="Drop rounds behind damage; they are kept aside.")] = False,
    json_output: Json = False,
) -> None:
    """Continue a run where it stopped, to the same weights as if it had not."""
    journal = Journal.open(run)
    _warn_of_lost(journal)
    options = _command_of(journal)
    engine, test, _ = _assemble(msgspec.structs.replace(options, threads=int(journal.config.plan.get("threads", 1))))
    schedule = journal.config.method.optimizer.schedule
    if rounds is not None and isinstance(schedule, Cosine) and rounds > schedule.rounds:
        _errors.print(f"note: the cosine schedule ended with round {schedule.rounds}; lr stays {schedule.final:g} x lr")
    with _progress(rounds or journal.config.rounds, len(journal.rows)) as progress:
        done = resume(run, engine, test=test, rounds=rounds, repair=repair, progress=progress)
    _print_run(done, json_output)


@app.command("replay")
def replay_command(
    run: RunPath,
    round: Annotated[int | None, typer.Option("--round", help="Round to rebuild; by default the last.", min=0)] = None,
    threads: Annotated[int, typer.Option(help="Threads; no choice changes a bit.", min=1)] = 1,
    block: Annotated[int, typer.Option(help="Entries worked on at once; no choice changes a bit.", min=1)] = 2**16,
    slow: Annotated[bool, typer.Option("--slow", help="Use the reference loop instead of the fast rebuild.")] = False,
    json_output: Json = False,
) -> None:
    """Rebuild a round's weights from the initial weights and the journal alone; print their sha256.

    Every round on the way is checked against the hash in its row.
    """
    journal = Journal.open(run)
    _require_rounds(journal, whole=round is None)
    wanted = len(journal.rows) - 1 if round is None else round
    if not 0 <= wanted < len(journal.rows):
        if journal.damage:
            raise CorruptRunError(f"{journal.damage}; round {wanted} cannot be rebuilt, those before can")
        raise OptionError("round", wanted, f"a round of this run, 0..{len(journal.rows) - 1}")
    with _replay_progress(wanted) as progress:
        for state in journal.states(Execution(threads, block, slow)):
            progress(state.round - 1)
            if state.round == wanted + 1:
                break
    digest = weights_sha256(state.weights).hex()
    if json_output:
        print(msgspec.json.encode({"run": str(run), "round": wanted, "weights_sha256": digest}).decode())
    else:
        print(digest)


@app.command("evaluate")
def evaluate_command(run: RunPath, json_output: Json = False) -> None:
    """Loss and accuracy of a run's weights on its test data: the average, and the raw weights."""
    journal = Journal.open(run)
    _require_rounds(journal, whole=True)
    engine, test, _ = _assemble(_command_of(journal))
    state = journal.state()
    average, raw = evaluate(engine, state.average, test), evaluate(engine, state.weights, test)
    result = {
        "run": str(run),
        "round": state.round - 1,
        "loss": average[0],
        "accuracy": average[1],
        "raw_loss": raw[0],
        "raw_accuracy": raw[1],
    }
    if json_output:
        print(msgspec.json.encode(result).decode())
        return
    table = Table("", "loss", "accuracy", title=f"{run}, round {state.round - 1}")
    table.add_row("averaged weights", f"{average[0]:.4f}", f"{average[1]:.4f}")
    table.add_row("raw weights", f"{raw[0]:.4f}", f"{raw[1]:.4f}")
    Console().print(table)


def main() -> None:
    """Entry point: errors are one line on stderr and exit code 2."""
    code = 0
    try:
        code = app(standalone_mode=False) or 0
    except BaffleError as error:
        _fail(str(error))
    except (KeyboardInterrupt, typer.Abort):
        code = _INTERRUPTED
    except _BAD_USAGE as error:
        message = error.format_message() if hasattr(error, "format_message") else str(error)
        if message:
            _fail(f"{message.rstrip('.')} (see --help)")
        code = 2  # no command: the help was shown
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    if code == _INTERRUPTED:
        _errors.print("stopped; the rounds so far are saved: continue with 'baffle resume RUN'", highlight=False)
    sys.exit(code)


def _fail(message: str) -> NoReturn:
    line = " ".join(message.split())
    _errors.print("[bold red]error:[/bold red]", escape(line), soft_wrap=True, highlight=False, emoji=False)
    sys.exit(2)


def _assemble(options: TrainConfig) -> tuple[LocalEngine, Dataset, Weights]:
    """Data, model and engine of a run."""
    if options.data is not None and options.dataset == "digits":
        raise OptionError("data", options.data, "none with dataset digits; for your own: --dataset arrays")
    train_set, test = load(options.dataset, options.data)
    for data in (train_set, test):
        if not np.issubdtype(data.y.dtype, np.integer) or data.y.ndim != 1:
            raise DataError(f"{data.name}.y: {data.y.dtype}{list(data.y.shape)}: expected one integer label an example")
    train_set.check_labels(_MOST_CLASSES)
    classes = int(train_set.y.max()) + 1
    test.check_labels(classes)
    if np.issubdtype(train_set.x.dtype, np.integer) and ":" not in options.model:
        raise DataError(
            f"train.x: {train_set.x.dtype}: model {options.model!r} expects floating point: scale and convert"
        )
    parts = partition(train_set, options.clients, alpha=options.dirichlet_alpha, seed=options.seed)
    if ":" in options.model and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # where a user's own model is likely to be
    # PyTorch is imported here, so that --help and replay do not wait for it
    from torch.nn.functional import cross_entropy

    from baffle.models import build
    from baffle.runtimes.pytorch import TorchRuntime

    model = build(options.model, train_set.x.shape[1:], classes, options.seed)
    runtime = TorchRuntime(model, cross_entropy, options.threads)
    return LocalEngine(runtime, parts), test, runtime.initial_weights()


def _warn_of_lost(journal: Journal) -> None:
    if journal.lost:
        _errors.print(
            f"note: {journal.path / 'rows.bin'} was cut short: it holds {len(journal.rows)} rows, metrics tell of "
            f"{journal.lost} more",
            soft_wrap=True,
            highlight=False,
        )


def _require_rounds(journal: Journal, *, whole: bool) -> None:
    """A run that has rounds, and with ``whole`` one without damage behind them."""
    if journal.damage and (whole or not journal.rows):
        raise CorruptRunError(f"{journal.damage}; {len(journal.rows)} rounds before it are intact")
    if not journal.rows:
        raise OptionError("run", str(journal.path), "a run with at least one round")
    if whole:
        _warn_of_lost(journal)


def _command_of(journal: Journal) -> TrainConfig:
    """The options that the run was started with."""
    if journal.config.command is None:
        raise OptionError("run", str(journal.path), "a run of 'baffle train'; one from Python continues with bf.resume")
    try:
        return msgspec.convert(journal.config.command, TrainConfig)
    except msgspec.ValidationError as error:
        raise CorruptRunError(f"{journal.path / 'config.json'}: command: {error}") from error


@contextmanager
def _progress(total: int, done: int) -> Iterator[Callable[[Record], None]]:
    """A progress bar on a terminal's stderr; elsewhere a line every tenth of the way."""
    passes, sent, shown = 0, 0, ""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[info]}"),
        TimeRemainingColumn(),
        console=_errors,
        disable=not _errors.is_terminal,
    )
    with bar:
        line = bar.add_task("train", total=total, completed=done, info="")

        def advance(record: Record) -> None:
            nonlocal passes, sent, shown
            passes += record.forward_passes or 0
            sent += record.bytes_up or 0
            if record.loss is not None:
                accuracy = "" if record.accuracy is None else f"accuracy {record.accuracy:.3f} "
                shown = f"loss {record.loss:.3f} {accuracy}"
            info = f"{shown} {passes:,} passes  {sent / 1e6:.2f} MB up"
            bar.update(line, completed=record.round, info=info)
            if not _errors.is_terminal and record.round % max(1, total // 10) == 0:
                print(f"round {record.round}/{total}  {info}", file=sys.stderr, flush=True)

        yield advance


@contextmanager
def _replay_progress(total: int) -> Iterator[Callable[[int], None]]:
    with Progress(console=_errors, disable=not _errors.is_terminal) as bar:
        line = bar.add_task("replay", total=total)
        yield lambda round: bar.update(line, completed=round)


def _print_run(run: Run, json_output: bool) -> None:
    summary = run.summary()
    if json_output:
        print(msgspec.json.encode(summary).decode())
        return
    table = Table(title="run", show_header=False)
    for name, value in summary.items():
        text = f"{value:.4f}" if isinstance(value, float) and name in ("accuracy", "loss") else str(value)
        table.add_row(name, f"{value:,}" if type(value) is int else text)
    Console().print(table)
