"""What runs between SuperLink and clients: the ServerApp, and the ClientApp for Flower's own clients and simulation.

The app in ``apps/`` is a few lines that call these two; its run configuration is here, by the same names.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Callable
from functools import cache, lru_cache
from pathlib import Path

import msgspec
from flwr.app import Context, Message
from flwr.serverapp import Grid

from baffle.client.examples import load_arrays
from baffle.client.participant import Memory, Participant
from baffle.data import Dataset
from baffle.deploy.adapter import quick
from baffle.deploy.setups import Own, data_for, runtime_for, setup_of
from baffle.engines.flower import GridTransport, reply_to
from baffle.engines.remote import Downlink, RemoteEngine
from baffle.errors import OptionError
from baffle.protocol.messages import Setup, decode_setup, encode
from baffle.report.events import EventLog
from baffle.runfolder.clients import Roster, read_members
from baffle.runfolder.config import read_config
from baffle.runfolder.journal import Journal
from baffle.runfolder.metrics import Record
from baffle.runtimes import Runtime
from baffle.training.build import Server, assemble_server, splits
from baffle.training.loop import resume, train
from baffle.training.options import TrainConfig, train_config
from baffle.training.result import Run

_log = logging.getLogger("baffle")
_participants: dict[int, Participant] = {}
_memory = Memory()  # simulated clients of a process share what they keep: each would have the same


class AppConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="kebab"):
    """The app's run configuration: ``flwr run APP -c 'out="runs/one" clients=3'``."""

    config: str = ""
    """TOML file of the options of ``baffle train``, on the server; empty: the defaults."""
    out: str = ""
    """Run folder, on the server. One that exists is continued."""
    clients: int = 2
    """How many must have joined before the run begins."""
    downlink: Downlink = "replay"
    quorum: float = 0.5
    deadline: float = 60.0
    patience: float = 3600.0
    tensorboard: bool = False
    """Write event files into the run folder."""


def app_config(values: object) -> AppConfig:
    """The run configuration of a context. Raises OptionError."""
    try:
        return msgspec.convert(values, AppConfig)
    except msgspec.ValidationError as error:
        reason, _, field = str(error).partition(" - at `$.")
        raise OptionError("run-config", field.rstrip("`") or "?", reason) from error


def options_of(config: AppConfig) -> TrainConfig:
    """The training options of a run configuration."""
    options = train_config(Path(config.config) if config.config else None, {})
    if options.backprop is not None:
        raise OptionError("backprop", options.backprop, "none: clients only infer")
    return options


def serve(grid: Grid, context: Context) -> Run:
    """The whole ServerApp: assemble, wait for clients, train or continue, write the run folder."""
    _speak()
    config = app_config(context.run_config)
    options = options_of(config)
    out = Path(config.out) if config.out else None
    if out is not None:
        _drop_unbegun(out)
    server = assemble_server(options)
    engine = RemoteEngine(
        GridTransport(quick(grid)),
        server.runtime,
        setup_of(options, server),
        clients=config.clients,
        downlink=config.downlink,
        quorum=config.quorum,
        deadline=config.deadline,
        patience=config.patience,
        roster=Roster(out),
    )
    with EventLog(out / "events" if config.tensorboard and out is not None else None, out) as events:
        run = _train(options, config, server, engine, out, lambda record: _told(record, events))
    _log.info("done: %s", msgspec.json.encode(run.summary()).decode())
    return run


def _train(
    options: TrainConfig,
    config: AppConfig,
    server: Server,
    engine: RemoteEngine,
    out: Path | None,
    progress: Callable[[Record], None],
) -> Run:
    if out is not None and out.exists():
        was = read_config(out)
        first = was.rounds if was.command is None else int(was.command["rounds"] or was.rounds)
        if msgspec.structs.replace(options, rounds=first).method() != was.method:
            raise OptionError("out", str(out), "a new folder: the run there has another method than these options")
        rounds = max(options.rounds, len(Journal.open(out).rows) - 1)
        return resume(out, engine, test=server.test, validation=server.validation, rounds=rounds, progress=progress)
    return train(
        options.method(),
        engine,
        server.initial,
        rounds=options.rounds,
        test=server.test,
        validation=server.validation,
        seed=options.seed,
        out=out,
        evaluate_every=options.evaluate_every,
        snapshot_every=options.snapshot_every,
        progress=progress,
        command=msgspec.to_builtins(options) | {"clients": len(engine.sizes)},
    )


def answer(message: Message, context: Context) -> Message:
    """The whole ClientApp, for ``flower-supernode`` and for the simulation.

    A SuperNode says where its data are: ``--node-config 'data="/srv/examples.npz"'``. A simulated client takes its
    part of the data set that the options name.
    """
    if context.node_id not in _participants:
        _participants[context.node_id] = _participant(context)
    return reply_to(message, _participants[context.node_id])


def _participant(context: Context) -> Participant:
    told = context.node_config
    if "data" in told:
        data = load_arrays(str(told["data"]))
    elif "partition-id" in told and "num-partitions" in told:
        data = _parts(str(context.run_config["config"]), int(told["num-partitions"]))[int(told["partition-id"])]
    else:
        raise OptionError("node-config", dict(told), 'data="FILE.npz", or partition-id and num-partitions')
    name = f"client-{told['partition-id']:0>6}" if "partition-id" in told else str(told.get("name", context.node_id))

    def build(setup: Setup) -> tuple[Runtime, Dataset]:
        runtime = _runtime(encode(setup))
        return runtime, data_for(setup, data, runtime)

    return Participant(name, build, _memory)


@cache
def _parts(config: str, parts: int) -> tuple[Dataset, ...]:
    """The data of all simulated clients, read once a process."""
    options = options_of(AppConfig(config=config))
    return msgspec.structs.replace(options, clients=parts).split(splits(options)[0])


@lru_cache(maxsize=1)
def _runtime(setup: bytes) -> Runtime:
    """The simulated clients of a process evaluate one after another, on one runtime."""
    return runtime_for(decode_setup(setup), Own())


def _told(record: Record, events: EventLog) -> None:
    events.add(record)
    if record.loss is not None:
        accuracy = "" if record.accuracy is None else f"  accuracy {record.accuracy:.3f}"
        _log.info("round %d: loss %.4f%s  clients %d", record.round, record.loss, accuracy, record.participants)


def _drop_unbegun(out: Path) -> None:
    """A run folder without a round and without clients was made and never begun: begin anew."""
    if out.exists() and not read_members(out) and not Journal.open(out).rows:
        shutil.rmtree(out)


def _speak() -> None:
    """Log to stderr, which Flower carries to ``flwr log``."""
    if not _log.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s baffle %(message)s", "%H:%M:%S"))
        _log.addHandler(handler)
        _log.setLevel(os.environ.get("BAFFLE_LOG", "INFO").upper())
