"""``baffle train``: options to a run folder."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from baffle.cli.common import Json
from baffle.cli.options import Flag, with_flags
from baffle.cli.progress import print_summary, resumable, show_progress, write_events
from baffle.core.method import Method
from baffle.runfolder.metrics import Record
from baffle.training.build import Setup, assemble
from baffle.training.loop import train
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
    --backprop it trains with exact gradients instead, for comparison; such a run can only be reported and compared.

    Ctrl-C (exit code 130) and SIGTERM (143) end it; the rounds so far are saved and 'baffle resume' continues them.
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
        show_progress(options.rounds, [], plan) as progress,
        write_events(path, tensorboard, progress) as tell,
        resumable(path),
    ):
        run = _run(options, method, setup, path, command, tell)
    print_summary(run.summary(), json_output)


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
