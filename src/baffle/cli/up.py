"""``baffle up``: a whole federation on this machine, for development."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import msgspec
import numpy as np
import typer

from baffle.cli.common import Json, errors
from baffle.cli.node import need_flower
from baffle.cli.progress import print_summary
from baffle.cli.status import show_live
from baffle.core.checks import require_positive
from baffle.data import Dataset
from baffle.errors import FederationError, JournalError, OptionError, require_choice
from baffle.report.status import Status, read_status
from baffle.runfolder.clients import read_members
from baffle.training.build import require_runtime, splits
from baffle.training.options import TrainConfig, train_config

if TYPE_CHECKING:
    from baffle.deploy.federation import Federation

_LOOK = 0.5  # seconds between two reads of the run folder
_ASK = 3.0  # seconds without a new round before Flower is asked for the run's state
_CLIENTS = 2
_KEYS = "keys"  # in the run folder
_PATIENCE = 5  # deadlines without a quorum until the run fails; it can be continued
_SLOW_START = 30.0  # seconds before a hint where to look is printed
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_VARIABLES = ("FLWR_HOME", "FLWR_TELEMETRY_ENABLED", "FLWR_DISABLE_UPDATE_CHECK")


def up_command(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG.toml]", help="Options of 'baffle train', by name.")
    ] = None,
    clients: Annotated[int | None, typer.Option(help="Clients; by default CONFIG's, or 2.", min=1)] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Train to this run folder, or continue it; then end.")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(help="Keep keys, data, logs here; by default a temporary folder.")
    ] = None,
    secure: Annotated[bool, typer.Option("--secure", help="With TLS and registered nodes, as in production.")] = False,
    downlink: Annotated[str, typer.Option(help="replay (rows) or weights, to the clients.")] = "replay",
    quorum: Annotated[float, typer.Option(help="Share of a round's clients that must answer.", min=0, max=1)] = 0.5,
    deadline: Annotated[float, typer.Option(help="Seconds until a round closes without the others.")] = 60.0,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write event files to RUN/events.")] = False,
    json_output: Json = False,
) -> None:
    """Start a federation on this machine: a SuperLink and warm clients, with parts of the training data.

    With --out it trains, shows the state of the clients, prints the run's summary and ends. Without it, the federation
    runs until Ctrl-C, and commands to start runs from another shell are printed.
    """
    need_flower()
    from baffle.deploy.flower.app_bundle import app_folder

    require_choice("downlink", downlink, ["replay", "weights"])
    require_positive("deadline", deadline)
    if out is None and (tensorboard or json_output):
        raise OptionError("out", None, "a run folder, with --tensorboard or --json")
    options = _options(config, clients)
    if out is not None:
        _check_keys(out)
    parts = options.split(splits(options)[0])
    app: dict[str, str | int | float | bool] = {
        "config": "" if config is None else str(config.resolve()),
        "clients": len(parts),
        "downlink": downlink,
        "quorum": quorum,
        "deadline": deadline,
        "patience": _PATIENCE * deadline,
        "tensorboard": tensorboard,
    }
    with _ends_on_signals(), _place(folder) as place, _federation(place, secure) as federation:
        _start(federation, options, parts, out)
        if out is None:
            _explain(federation, app_folder(), app)
            _stay(federation)
            return
        _say("starting the run")
        run = federation.submit(app_folder(), out=str(out.resolve()), **app)
        try:
            show_live(_reported(_follow(federation, run, out)), errors)
        except KeyboardInterrupt:
            _say("stopped; the rounds so far are saved: the same command continues")
            raise
        finally:
            _keep_keys(federation, out)
    print_summary(_summary(out), json_output)


def _options(config: Path | None, clients: int | None) -> TrainConfig:
    """The run's options, checked as far as possible before anything is started."""
    options = train_config(config, {"clients": clients})
    options.method()
    require_runtime(options)
    for name, path in (("data", options.data), ("start", options.start)):
        if path is not None and not Path(path).is_absolute():
            raise OptionError(name, path, "an absolute path: the server runs in another folder")
    if options.backprop is not None:
        raise OptionError("backprop", options.backprop, "none: clients only infer")
    if options.clients is None and options.partition != "column":
        options = msgspec.structs.replace(options, clients=_CLIENTS)
    return options


def _check_keys(out: Path) -> None:
    """Refuse a run whose clients' keys are missing: it would wait forever for clients with those keys."""
    if not all((out / _KEYS / f"{member.name}.key").exists() for member in read_members(out)):
        raise OptionError("out", str(out), "a new folder, or a run of 'baffle up', with its clients' keys")


def _start(federation: Federation, options: TrainConfig, parts: Sequence[Dataset], out: Path | None) -> None:
    """Start SuperLink, SuperExec and the clients with their data; a continued run gets the keys it had."""
    _say("starting the SuperLink")
    if ":" in options.model:  # a module of the user's in the working directory, as for 'baffle train'
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path.cwd()), os.environ.get("PYTHONPATH")]))
    federation.start()
    if out is not None and (keys := out / _KEYS).is_dir():
        for key in keys.glob("*.key"):
            shutil.copy(key, federation.folder)
    for number, part in enumerate(parts):
        name = f"client-{number:04}"
        _say(f"starting client {number + 1} of {len(parts)}")
        data = federation.folder / f"{name}.npz"
        np.savez(data, x=part.x, y=part.y)
        own = ["--model", options.model] if ":" in options.model else []
        federation.start_node(name, data, *own)


def _follow(federation: Federation, run: int, out: Path) -> Iterator[Status]:
    """Yield the run's status repeatedly until Flower reports its end. Raises FederationError if it failed."""
    began = checked = time.monotonic()
    seen, hinted = -1, False
    while True:
        time.sleep(_LOOK)
        over = False
        with suppress(JournalError):  # the folder is being created; the server reports any other problem
            status = read_status(out)
            _keep_keys(federation, out)
            if status.round != seen:
                seen, checked = status.round, time.monotonic()
            over = status.over
            yield status
        now = time.monotonic()
        if seen < 0 and not hinted and now - began > _SLOW_START:
            hinted = True
            _say(f"no round yet; what the server says: {_shell(federation, 'log', str(run), 'local')}")
        if over or now - checked > _ASK:
            checked = now
            _check(federation)
            stage, reason = federation.outcome(run)
            if stage == "finished:completed":
                yield read_status(out)
                return
            if stage.startswith("finished"):
                raise FederationError(f"the run failed ({stage.partition(':')[2]}): {reason or 'no reason was given'}")


def _reported(statuses: Iterator[Status]) -> Iterator[Status]:
    """Pass statuses on; if stderr is not a terminal, print a line every tenth of the run."""
    tenth = -1
    for status in statuses:
        now = 10 * status.round // status.rounds
        if not errors.is_terminal and status.round >= 0 and now > tenth:
            tenth = now
            loss = "" if status.loss is None else f"  loss {status.loss:.3f}"
            accuracy = "" if status.accuracy is None else f"  accuracy {status.accuracy:.3f}"
            _say(f"round {status.round}/{status.rounds}{loss}{accuracy}")
        yield status


def _check(federation: Federation) -> None:
    """Raise FederationError if a process that is needed has ended."""
    parts = {"superlink": federation.superlink, "superexec": federation.superexec}
    dead = [name for name, process in parts.items() if process is not None and process.poll() is not None]
    if all(process.poll() is not None for process in federation.nodes.values()):
        dead += federation.nodes
    if dead:
        lines = (federation.folder / f"{dead[0]}.log").read_text(errors="replace").splitlines()
        raise FederationError(f"{dead[0]} ended: {lines[-1] if lines else 'it said nothing'}")


def _keep_keys(federation: Federation, out: Path) -> None:
    """Copy the clients' keys into the run folder, to identify them when the run is continued."""
    if not out.exists():
        return
    keys = out / _KEYS
    keys.mkdir(exist_ok=True)
    for key in federation.folder.glob("client-*.key"):
        if not (keys / key.name).exists():
            shutil.copy(key, keys)


def _explain(federation: Federation, app: Path, config: Mapping[str, str | int | float | bool]) -> None:
    """Print what to type in another shell."""
    out = str(Path("runs/first").resolve())
    values = [f"{name}={msgspec.json.encode(value).decode()}" for name, value in {**config, "out": out}.items()]
    run = _shell(federation, "run", str(app), "local", *(part for v in values for part in ("-c", v)))
    print(f"The federation is up at {federation.address}; its logs are in {federation.folder}.")
    print(f"Start a run from another shell (another out, another run):\n\n  {run}\n")
    print(f"Watch it:\n\n  baffle status {shlex.quote(out)} --watch\n\nCtrl-C ends the federation.", flush=True)


def _shell(federation: Federation, *arguments: str) -> str:
    """A command of ``flwr`` to type in a shell."""
    environment = federation.environment
    program = Path(shutil.which("flwr", path=environment["PATH"]) or "flwr")
    path = "" if shutil.which("flwr") else f'PATH={shlex.quote(str(program.parent))}:"$PATH" '
    variables = " ".join(f"{name}={shlex.quote(environment[name])}" for name in _VARIABLES)
    return f"{path}{variables} {shlex.join(['flwr', *arguments])}"


def _stay(federation: Federation) -> None:
    """Wait for Ctrl-C. Raises FederationError if a process that is needed ends by itself."""
    with suppress(KeyboardInterrupt):
        while True:
            time.sleep(_LOOK)
            _check(federation)


def _summary(out: Path) -> dict[str, str | int | float | None]:
    return msgspec.json.decode((out / "summary.json").read_bytes(), type=dict[str, str | int | float | None])


@contextmanager
def _place(folder: Path | None) -> Iterator[Path]:
    """Where the federation keeps its files."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="baffle-up-", ignore_cleanup_errors=True) as temporary:
        yield Path(temporary)


@contextmanager
def _federation(folder: Path, secure: bool) -> Iterator[Federation]:
    """A federation that is always closed, even on a second Ctrl-C."""
    from baffle.deploy.federation import Federation

    federation = Federation(folder, secure=secure)
    try:
        yield federation
    finally:
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        federation.close()


@contextmanager
def _ends_on_signals() -> Iterator[None]:
    """Treat SIGTERM and SIGHUP like Ctrl-C, so that child processes are stopped."""

    def end(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, end) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
