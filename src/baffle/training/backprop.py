"""The backpropagation baseline: the same federation with exact gradients.

FedSGD and FedAvg: McMahan et al., arXiv 1602.05629. Clients, cohorts, mini-batches, weights, optimizer, average and
records are those of the forward-only run with the same options; only the clients' responses differ. A round sends
n float32 values in each direction per participant, and stores activations that inference does not need.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np

from baffle.core import optim
from baffle.core.checks import require_count
from baffle.core.method import Method
from baffle.core.state import State, descend, weights_sha256
from baffle.core.types import Cohort, Task, Weights
from baffle.data import Dataset
from baffle.engines.local import LocalEngine
from baffle.errors import MissingExtraError, ModelError, PlanError
from baffle.files import append
from baffle.runfolder.config import RunConfig, create_folder, write_file
from baffle.runfolder.metrics import Record, encode_record
from baffle.runfolder.snapshots import encode_weights
from baffle.runtimes.pytorch.runtime import (
    load_into,
    per_example,
    takes_channels_last,
    to_tensors,
    trainable_parameters,
)
from baffle.training.loop import Progress, require_key
from baffle.training.result import Run, evaluate, finish

try:
    import torch
    from torch import Tensor, nn
except ImportError as error:
    raise MissingExtraError("PyTorch is not installed: pip install 'baffle[torch]'") from error

Kind = Literal["fedsgd", "fedavg"]


def train_backprop(
    kind: Kind,
    method: Method,
    engine: LocalEngine,
    model: nn.Module,
    loss: Callable[..., Tensor],
    *,
    rounds: int,
    test: Dataset | None = None,
    validation: Dataset | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    evaluate_every: int = 10,
    progress: Progress | None = None,
    command: dict[str, str | int | float | bool | None] | None = None,
) -> Run:
    """Train by backpropagation what ``train`` would train by forward passes, for comparison.

    The run folder has settings and metrics but no journal: it can be reported and compared, but not replayed.

    Args:
        kind: ``fedsgd``: each participant returns the gradient of its mini-batch. ``fedavg``: the mean gradient of
            ``method.local_steps`` local SGD steps.
        method: As in ``train``; what concerns perturbations is ignored.
        engine: The clients.
        model: The model to start from; it is not changed.
        loss: As in ``fit``.
        rounds: Number of updates.
        test: As in ``train``.
        validation: As in ``train``.
        seed: As in ``train``.
        out: New run folder; without it nothing is written.
        evaluate_every: As in ``train``.
        progress: Called with the record of each round.
        command: As in ``train``.

    Returns:
        The finished run.

    Raises:
        PlanError: ``kind`` and ``method.local_steps`` contradict each other.
        ModelError: The model cannot be differentiated.
        RunExistsError: ``out`` exists.

    Examples:
        >>> import torch.nn.functional as F
        >>> import baffle as bf
        >>> data, test = bf.load("digits")
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        >>> engine = bf.LocalEngine(bf.TorchRuntime(model, F.cross_entropy), bf.partition(data, clients=3))
        >>> run = train_backprop("fedsgd", bf.Method(), engine, model, F.cross_entropy, rounds=20, test=test)
        >>> run.accuracy > 0.6
        True
    """
    if (kind == "fedavg") != (method.local_steps > 1):
        expected = "> 1" if kind == "fedavg" else "1; fedavg takes local steps"
        raise PlanError(f"local_steps = {method.local_steps} with {kind}: expected {expected}")
    require_count("rounds", rounds)
    require_count("evaluate_every", evaluate_every)
    gradients = _Gradients(model, loss, engine)
    config = RunConfig(
        method=method,
        key=require_key(seed),
        rounds=rounds,
        evaluate_every=evaluate_every,
        snapshot_every=rounds,
        table=engine.table,
        plan=engine.plan,
        clients=engine.sizes,
        backprop=kind,
        command=command,
    )
    state = method.init(gradients.initial())
    # refuse what cannot work before anything is written
    task, cohort = method.plan(state, engine.table, engine.sizes, config.key, None)
    gradients(state.weights, engine.batch(task, next(iter(cohort)), 0))
    if test is not None:
        engine.evaluate(state.weights, test.take(np.arange(1)))
    path = None if out is None else Path(out)
    if path is not None:
        create_folder(path, config, state.weights, ("metrics.jsonl",))
    watched = test if validation is None else validation
    records: list[Record] = []
    measured: tuple[float | None, float | None] = None, None
    for index in range(rounds + 1):
        started = time.perf_counter()
        task, cohort = method.plan(state, engine.table, engine.sizes, config.key, None)
        state, factor = (
            _round(method, engine, gradients, task, cohort, state) if index else (replace(state, round=1), 1.0)
        )
        due = index % evaluate_every == 0 or index == rounds
        lr = method.optimizer.coefficients(max(1, state.step))["lr"]
        measured = evaluate(engine, state.ema_weights, watched) if due else (None, None)
        records.append(_record(task, cohort, state, engine, measured, lr, factor, time.perf_counter() - started))
        if path is not None:
            _append(path / "metrics.jsonl", encode_record(records[-1]))
        if progress is not None:
            progress(records[-1])
    if path is not None:
        write_file(path / "model.safetensors", encode_weights(engine.table, state.ema_weights))
    return finish(config, state, records, measured, engine, test, validation, path)


class _Gradients:
    """Gradients of the mean loss of a batch, for any weights."""

    def __init__(self, model: nn.Module, loss: Callable[..., Tensor], engine: LocalEngine) -> None:
        self._model, self._loss, self._table = copy.deepcopy(model), per_example(loss), engine.table
        self._parameters = [p for _, p in trainable_parameters(self._model)]
        self._channels_last: bool | None = None

    def initial(self) -> Weights:
        return self._flat([p.detach() for p in self._parameters])

    def __call__(self, weights: Weights, batch: Dataset) -> Weights:
        load_into(self._model, self._table, weights)
        x, y = to_tensors(batch, self._parameters[0].device)
        if x.ndim == 4 and x.is_floating_point():
            if self._channels_last is None:
                self._channels_last = takes_channels_last(lambda x, _: self._model(x), x.shape[1:], x.device)
            if self._channels_last:
                x = x.contiguous(memory_format=torch.channels_last)
        try:
            loss = self._loss(self._model(x), y).mean()
            gradients: tuple[Tensor | None, ...] = torch.autograd.grad(loss, self._parameters, allow_unused=True)
        except Exception as error:  # of the user's own code
            raise ModelError(f"the model cannot be differentiated on inputs {tuple(x.shape)}: {error}") from error
        return self._flat(
            [torch.zeros_like(p) if g is None else g for p, g in zip(self._parameters, gradients, strict=True)]
        )

    @staticmethod
    def _flat(tensors: list[Tensor] | tuple[Tensor, ...]) -> Weights:
        flat: Weights = torch.cat([t.reshape(-1) for t in tensors]).cpu().numpy()
        return flat


def _round(
    method: Method, engine: LocalEngine, gradients: _Gradients, task: Task, cohort: Cohort, state: State
) -> tuple[State, float]:
    """One round: weighted sum of the participants' gradients, optimizer step, average. Also returns the clip factor."""
    total = np.zeros(state.weights.size, np.float64)
    for client, weight in cohort.items():
        weights = state.weights
        for step in range(task.local_steps):
            gradient = gradients(weights, engine.batch(task, client, step))
            total += float(weight) * gradient
            weights = weights - np.float32(task.local_lr) * gradient
    mean = (total / (sum(cohort.values()) * task.local_steps)).astype(np.float32)
    factor = min((clip.factor(mean) for clip in method.server), default=1.0)
    step = state.step + 1
    after = descend(
        state,
        mean,
        round=task.round,
        rule=method.optimizer.name,
        coefficients=method.optimizer.coefficients(step),
        clip_factor=factor,
        ema=optim.ema_decay(method.ema, step),
    )
    return after, factor


def _record(
    task: Task,
    cohort: Cohort,
    state: State,
    engine: LocalEngine,
    measured: tuple[float | None, float | None],
    lr: float,
    factor: float,
    seconds: float,
) -> Record:
    trained = task.round > 0
    examples = sum(min(task.batch_size or engine.sizes[c], engine.sizes[c]) for c in cohort)
    sent = 4 * state.weights.size * len(cohort) if trained else 0
    return Record(
        round=task.round,
        applied=trained,
        restores=None,
        loss=measured[0],
        accuracy=measured[1],
        lr=lr,
        sigma=0.0,
        exponent=0,
        clip_factor=factor,
        scalar_rms=0.0,
        participants=len(cohort) if trained else 0,
        clipped=0,
        nonfinite=0,
        forward_passes=task.local_steps * len(cohort) if trained else 0,
        samples_forwarded=task.local_steps * examples if trained else 0,
        bytes_up=sent,
        bytes_down=sent,
        seconds=seconds,
        weights_sha256=weights_sha256(state.weights).hex(),
    )


def _append(file: Path, line: bytes) -> None:
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND)
    try:
        append(descriptor, line)
    finally:
        os.close(descriptor)
