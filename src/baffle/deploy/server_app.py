"""The ServerApp: builds the run from its options, waits for clients, trains or continues.

The app in ``apps/`` is a few lines that call :func:`serve`, and ``answer`` of ``client_app.py``. Its run configuration
is in ``app_config.py``.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
from flwr.app import Context
from flwr.serverapp import Grid

from baffle.deploy.app_config import AppConfig, app_config, options_of
from baffle.deploy.flower.grid import quick
from baffle.deploy.logs import log_to_stderr
from baffle.engines.remote.engine import RemoteEngine
from baffle.engines.remote.flower import GridTransport
from baffle.errors import OptionError
from baffle.protocol.messages import Setup
from baffle.report.events import EventLog
from baffle.runfolder.clients import Roster, read_members
from baffle.runfolder.config import read_config
from baffle.runfolder.journal import Journal
from baffle.runfolder.metrics import Record
from baffle.runtimes.evaluation_plan import EvaluationPlan
from baffle.training.build import Server, assemble_server
from baffle.training.loop import resume, train
from baffle.training.options import TrainConfig
from baffle.training.result import Run

_log = logging.getLogger("baffle")


def serve(grid: Grid, context: Context) -> Run:
    """Run the whole ServerApp: assemble, wait for clients, train or continue, write the run folder.

    Raises:
        OptionError: Options do not fit each other, or the run folder has a run with another method.
        FederationError: Too few clients for longer than the patience.
    """
    log_to_stderr("baffle")
    config = app_config(context.run_config)
    options = options_of(config)
    out = Path(config.out) if config.out else None
    if out is not None:
        _remove_unstarted(out)
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
        run = _train(options, config, server, engine, out, lambda record: _log_round(record, events))
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
        recorded = read_config(out)
        first = recorded.rounds if recorded.command is None else int(recorded.command["rounds"] or recorded.rounds)
        if msgspec.structs.replace(options, rounds=first).method() != recorded.method:
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


def _log_round(record: Record, events: EventLog) -> None:
    events.add(record)
    if record.loss is not None:
        accuracy = "" if record.accuracy is None else f"  accuracy {record.accuracy:.3f}"
        _log.info("round %d: loss %.4f%s  clients %d", record.round, record.loss, accuracy, record.participants)


def _remove_unstarted(out: Path) -> None:
    """Remove a run folder that was created but never started."""
    if out.exists() and not read_members(out) and not Journal.open(out).rows:
        shutil.rmtree(out)


_TOLD = ("model", "activation", "norm", "trainable", "runtime", "precision", "seed", "augment", "credit")


def setup_of(options: TrainConfig, server: Server) -> Setup:
    """What a server that trains by these options tells its clients to evaluate.

    Raises:
        OptionError: The model has fewer channels than its name says, and no bundle to send.
    """
    if server.bundle is None and options.prune and options.prune_by == "channels":
        raise OptionError("runtime", options.runtime, "ort or openvino: a model with fewer channels needs a bundle")
    runtime, scaling = server.runtime, server.train.scaling
    return Setup(
        table=runtime.table,
        frozen=EvaluationPlan.of(runtime.plan).frozen,
        shape=tuple(server.train.x.shape[1:]),
        classes=server.classes,
        vocabulary=server.vocabulary,
        mean=() if scaling is None else scaling.mean,
        std=() if scaling is None else scaling.std,
        options={name: getattr(options, name) for name in _TOLD},
        bundle=None if server.bundle is None else server.bundle.encode(),
    )
