"""The training loop: plan, exchange, absorb, commit. It knows engines by their protocol only, no model, no network.

    for each round:  method.plan -> engine.exchange -> method.absorb -> journal.commit

Round 0 measures the scale of the scalars (and up to three more rounds do if it was far off); the other rounds, up
to number ``rounds``, update the weights.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np

from baffle.core.checks import require_count
from baffle.core.method import Method
from baffle.core.state import State
from baffle.core.types import Row, Weights, table_size
from baffle.data import Dataset
from baffle.engines import Engine, Exchange
from baffle.errors import BaffleError, DivergedError, JournalError, ModelError, OptionError, PlanError
from baffle.protocol.encoding import decode_row, encode_message
from baffle.runfolder.config import RunConfig
from baffle.runfolder.journal import Journal
from baffle.runfolder.metrics import Record, record_of
from baffle.runtimes.evaluation_plan import EvaluationPlan
from baffle.training.result import Run, evaluate, finish
from baffle.training.rollback import Rollback

Progress = Callable[[Record], None]
"""Called with the record of each round after it is saved."""


def train(
    method: Method,
    engine: Engine,
    initial: Weights,
    *,
    rounds: int,
    test: Dataset | None = None,
    validation: Dataset | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    evaluate_every: int = 10,
    snapshot_every: int = 100,
    progress: Progress | None = None,
    command: dict[str, str | int | float | bool | None] | None = None,
) -> Run:
    """Train for ``rounds`` updates of the weights with any engine.

    Every ``evaluate_every`` rounds and after the last one, the averaged weights are evaluated. The guard of the
    method judges a run by these evaluations.

    Args:
        method: What happens in a round.
        engine: Carries tasks to the clients: ``LocalEngine``, ``PipeEngine``, ``RemoteEngine``, or your own.
        initial: Weights to start from, float32[n], flat in the order of ``engine.table``.
        rounds: Number of updates.
        test: Data to evaluate on. With ``validation``, they are used once, after the last round.
        validation: Data to evaluate on during training.
        seed: Seed of everything random, 0 to 2^64 - 1; equal seeds give bit-identical runs.
        out: New run folder; without it nothing is written.
        evaluate_every: Rounds from one evaluation to the next.
        snapshot_every: Rounds from one saved state to the next, which a resume starts from.
        progress: Called with the record of each round.
        command: Options to record in ``config.json``, from which the command line can rebuild data and model.

    Returns:
        The finished run.

    Raises:
        RunExistsError: ``out`` exists.
        JournalError: The run folder cannot be written; what was saved before can be resumed.
        OptionError: A number is out of range.
        ModelError: ``initial`` does not fit the model, or the model cannot be evaluated on ``test``.
        PlanError: Method and engine contradict each other.
        DivergedError: The run diverged more often than the guard allows.

    Examples:
        >>> import torch.nn.functional as F
        >>> from torch import nn
        >>> import baffle as bf
        >>> data, test = bf.load("digits")
        >>> runtime = bf.TorchRuntime(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), F.cross_entropy)
        >>> engine = bf.LocalEngine(runtime, bf.partition(data, clients=3))
        >>> run = train(bf.Method(num_directions=20), engine, runtime.initial_weights(), rounds=5, test=test)
        >>> run.summary()["rounds"]
        5
    """
    config = RunConfig(
        method=method,
        key=require_key(seed),
        rounds=_count("rounds", rounds),
        evaluate_every=_count("evaluate_every", evaluate_every),
        snapshot_every=_count("snapshot_every", snapshot_every),
        table=engine.table,
        plan=engine.plan,
        clients=engine.sizes,
        command=command,
    )
    if initial.shape != (table_size(engine.table),):
        raise ModelError(f"initial weights of shape {initial.shape}: expected ({table_size(engine.table)},)")
    for spec in engine.table:
        if spec.mask is not None and initial[spec.slice][~spec.mask].any():
            raise ModelError(f"initial weights of {spec.name}: a number where it is pruned: expected 0")
    state = method.init(initial)
    # refuse what cannot work before anything is written
    method.plan(state, engine.table, engine.sizes, config.key, None)
    if test is not None:
        engine.evaluate(state.weights, test.take(np.arange(1)))
    if out is None:
        return _loop(config, engine, state, None, test, validation, progress)
    journal = Journal.create(out, config, state.weights)
    try:
        return _loop(config, engine, state, journal, test, validation, progress)
    except BaffleError as error:
        if not journal.rows and not isinstance(error, JournalError):  # it never started
            shutil.rmtree(journal.path)
        raise
    finally:
        journal.close()


def resume(
    path: str | Path,
    engine: Engine,
    *,
    test: Dataset | None = None,
    validation: Dataset | None = None,
    rounds: int | None = None,
    repair: bool = False,
    progress: Progress | None = None,
) -> Run:
    """Continue a run where it stopped, to bit-identical weights as if it had not stopped.

    Args:
        path: The run folder.
        engine: An engine with the same model and the same clients' data as before.
        test: As in ``train``.
        validation: As in ``train``.
        rounds: A new total of rounds; by default the run's own.
        repair: Whether to drop rounds after damage instead of refusing; damaged files are kept as ``*.damaged``.
        progress: Called with the record of each new round.

    Returns:
        The finished run, with the records of all its rounds.

    Raises:
        JournalError: ``path`` is not the folder of a run, another process writes it, or it cannot be written.
        CorruptRunError: The folder is damaged and ``repair`` is not set, or no round is intact.
        PlanError: Model, frozen parameters or clients' data differ from those of the run.
        OptionError: ``rounds`` is less than what is done.
        DivergedError: The run diverged more often than the guard allows.

    Examples:
        >>> import tempfile, torch.nn.functional as F
        >>> from torch import nn
        >>> import baffle as bf
        >>> data, test = bf.load("digits")
        >>> def engine():
        ...     runtime = bf.TorchRuntime(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), F.cross_entropy)
        ...     return bf.LocalEngine(runtime, bf.partition(data, clients=3))
        >>> out = Path(tempfile.mkdtemp(), "run")
        >>> run = train(bf.Method(num_directions=4), engine(), np.zeros(650, np.float32), rounds=2, out=out)
        >>> resume(out, engine(), rounds=4, test=test).summary()["rounds"]
        4
    """
    journal = Journal.open(path, write=True, repair=repair)
    try:
        if rounds is not None and rounds < len(journal.rows) - 1:
            raise OptionError("rounds", rounds, f"at least the {len(journal.rows) - 1} that are done")
        if engine.table != journal.config.table:
            raise PlanError(f"{path}: the run trains other tensors than this model has: expected the same model")
        if engine.sizes[: len(journal.config.clients)] != journal.config.clients:  # more may have joined
            raise PlanError(f"{path}: the run has other clients than this engine: expected the same partition")
        now, then = EvaluationPlan.of(engine.plan), EvaluationPlan.of(journal.config.plan)
        if now.data != then.data:
            raise PlanError(f"{path}: the clients' data differ from those of the run: expected the same partition")
        if now.frozen != then.frozen:
            raise PlanError(f"{path}: the frozen parameters differ from those of the run: expected the same model")
        if rounds is not None:
            journal.extend(rounds=_count("rounds", rounds))
        return _loop(journal.config, engine, journal.state(), journal, test, validation, progress)
    finally:
        journal.close()


def _loop(
    config: RunConfig,
    engine: Engine,
    state: State,
    journal: Journal | None,
    test: Dataset | None,
    validation: Dataset | None,
    progress: Progress | None,
) -> Run:
    method, table = config.method, config.table
    rows: list[bytes] = [] if journal is None else journal.rows
    records: list[Record] = [] if journal is None else journal.records
    last = decode_row(rows[-1]) if rows else None
    watched = test if validation is None else validation
    loss, accuracy, evaluated = None, None, False
    rollback = Rollback.start(method.guard, config.evaluate_every, records, journal)
    while state.round <= config.rounds and not rollback.exhausted(last):
        index = state.round
        started = time.perf_counter()
        if engine.sizes != config.clients:  # some have joined
            config = msgspec.structs.replace(config, clients=engine.sizes)
            if journal is not None:
                journal.extend(clients=engine.sizes)
        task, cohort = method.plan(state, table, engine.sizes, config.key, last)
        calibration = None
        if last is None and method.sigma == "auto":
            calibration = engine.calibrate(task, tuple(cohort), state)
            task = msgspec.structs.replace(task, sigma=calibration.sigma)
        exchange = engine.exchange(task, tuple(cohort), state, rows)
        if calibration is not None:
            exchange = replace(
                exchange,
                forward_passes=exchange.forward_passes + calibration.forward_passes,
                samples_forwarded=exchange.samples_forwarded + calibration.samples_forwarded,
            )
        last, state = method.absorb(
            state, table, task, cohort, exchange.total or exchange.replies, last, checkpoint=rollback.checkpoint
        )
        due = index % config.evaluate_every == 0
        evaluated = last.restores is None and (due or index == config.rounds)
        loss, accuracy = evaluate(engine, state.ema_weights, watched) if evaluated else (None, None)
        # the guard ignores an evaluation that is only due to the end: with another total it would not exist
        last, state, rollback = rollback.judge(method, last, state, loss, evaluated=evaluated and due)
        record = _record(last, exchange, loss, accuracy, time.perf_counter() - started)
        if journal is None:
            rows.append(encode_message(last))
            records.append(record)
        else:
            journal.commit(encode_message(last), record)
            if state.round % config.snapshot_every == 0:
                journal.snapshot(state)
        if progress is not None:
            progress(record)
    if journal is not None:
        journal.finish(state)
    if last is not None and rollback.exhausted(last):
        raise DivergedError(
            f"round {last.round}: the run diverged (number {last.rollbacks}) and stops with the weights it had after "
            f"round {last.restores}. Use a smaller lr than {method.optimizer.lr:g}, or clip_update"
        )
    path = None if journal is None else journal.path
    # no round was left to do, or the last one rolled back
    if not evaluated or (last is not None and last.restores is not None):
        loss, accuracy = evaluate(engine, state.ema_weights, watched)
    return finish(config, state, records, (loss, accuracy), engine, test, validation, path)


def require_key(seed: int) -> int:
    """The run key of a seed: itself, an unsigned 64-bit integer."""
    return _count("seed", seed, 0, 2**64 - 1)


def _record(row: Row, exchange: Exchange, loss: float | None, accuracy: float | None, seconds: float) -> Record:
    return msgspec.structs.replace(
        record_of(row),
        loss=loss,
        accuracy=accuracy,
        forward_passes=exchange.forward_passes,
        samples_forwarded=exchange.samples_forwarded,
        bytes_up=exchange.bytes_up,
        bytes_down=exchange.bytes_down,
        seconds=seconds,
    )


def _count(field: str, value: int, low: int = 1, high: int | None = None) -> int:
    require_count(field, value, low, high)
    return value
