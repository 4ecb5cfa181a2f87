"""A run in words: its settings, what was trained, what happened, and notes for the reader."""

from __future__ import annotations

import math
from itertools import groupby

import msgspec

from baffle.client.costs import costs_of
from baffle.core.credit import is_plain, model_table
from baffle.core.method import Method
from baffle.core.types import table_size
from baffle.report.run import RecordedRun, Value, round_kind

_OPTIMIZER = {"lr", "schedule", "momentum", "weight_decay", "clip_scalars", "clip_update"}
_LOOP = {"clients", "rounds", "seed", "threads", "evaluate_every", "snapshot_every", "backprop"}
_SHOWN_ELSEWHERE = {*Method.__struct_fields__, *_OPTIMIZER, *_LOOP}
"""Options of the command that are shown as parts of method or configuration."""


def settings(log: RecordedRun) -> dict[str, Value]:
    """Settings of a run, by readable names."""
    config, method, command = log.config, log.config.method, log.config.command or {}
    optimizer = msgspec.to_builtins(method.optimizer)
    schedule = optimizer.pop("schedule")
    guard = {name: value for name, value in (msgspec.to_builtins(method.guard) or {}).items() if name != "type"}
    sizes = config.clients
    costs = costs_of(method, config.table)
    chosen: dict[str, Value] = {
        "method": log.backprop or "forward passes only",
        **{
            name: value
            for name, value in command.items()
            if name not in _SHOWN_ELSEWHERE and value not in (None, False)
        },
        "clients": len(sizes),
        "examples a client": f"{min(sizes)}" if len(set(sizes)) == 1 else f"{min(sizes)} to {max(sizes)}",
        "participation": method.participation,
        "batch size": method.batch_size or "all examples",
        "directions K": method.num_directions,
        "slices": method.slices,
        "passes over each example": costs.passes,
        "numbers of a reply": f"{costs.numbers:,} of {counted(costs.bits, 'bit')} ({costs.bytes:,} bytes)",
        "numbers by kind": costs.kinds,
        "family": method.family,
        "sharing": method.sharing,
        "difference": method.difference,
        "sigma": f"{log.records[0].sigma:g} (measured)" if method.sigma == "auto" and log.records else method.sigma,
        "lattice codes": method.lattice or None,
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
        forward = (
            "directions K",
            "slices",
            "passes over each example",
            "numbers of a reply",
            "numbers by kind",
            "family",
            "sharing",
            "difference",
            "sigma",
            "lattice codes",
            "clients clip scalars to",
        )
        unused = ("guard", *forward)
        chosen = {name: value for name, value in chosen.items() if name not in unused}
    return {name: value for name, value in chosen.items() if value is not None}


def describe(log: RecordedRun) -> str:
    """What was trained, in one sentence."""
    command, method = log.config.command or {}, log.config.method
    costs = costs_of(method, log.config.table)
    model = command.get("model") or "A model"
    what = f"{model} of {table_size(model_table(log.config.table)):,} parameters"
    where = f" on {command['dataset']}" if command.get("dataset") else ""
    how = (
        f"by {log.backprop} with exact gradients (backpropagation)"
        if log.backprop
        else f"by forward passes only: each client returns {counted(costs.numbers, 'number')} a round, along "
        f"K = {method.num_directions} {method.sharing} {method.family} directions"
        + (f" for each of {method.slices} slices" if method.slices > 1 else "")
    )
    return f"{what}, trained{where} in {counted(len(log.config.clients), 'client')} {how}."


def notes(log: RecordedRun) -> list[str]:
    """What a reader of the curves must know, in sentences."""
    guard = log.config.method.guard
    sentences = [
        (not log.records, "No round is done yet."),
        (log.damage is not None, f"The run is damaged; what is before the damage is shown. {log.damage}."),
        (
            0 < len(log.records) <= log.config.rounds,
            f"The run is not finished: {len(log.records) - 1} of {log.config.rounds} rounds are done.",
        ),
        (
            bool(log.rows) and log.rows[-1].rollbacks > (guard.rollbacks if guard else math.inf),
            "It diverged too often and was stopped, with the best weights it had had.",
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
            "This run has exact gradients: each forward pass is followed by a backward pass, which is not counted.",
        ),
        (
            not log.backprop and not is_plain(log.config.table),
            "Signal and noise of the estimate are not shown: the estimate of their noise is for one scalar per "
            "direction, and this run has numbers of other kinds.",
        ),
        (
            bool(log.records) and not log.backprop and not any(r.applied for r in log.records),
            "No round has updated the weights yet.",
        ),
    ]
    return [sentence for holds, sentence in sentences if holds]


def event_sentences(log: RecordedRun) -> list[str]:
    """Sentences about rounds that did not update the weights, and rollbacks."""
    sentences: list[str] = []
    for kind, group in groupby(log.records, key=round_kind):
        rounds = [r.round for r in group]
        span = f"Round {rounds[0]}" if len(rounds) == 1 else f"Rounds {rounds[0]} to {rounds[-1]}"
        if kind == "calibration":
            what = "evaluated the initial weights" if log.backprop else "measured the scale of the scalars"
            sentences.append(f"{span} only {what}: no update.")
        elif kind == "empty":
            sentences.append(f"{span} brought no usable scalar: no update.")
        elif kind == "rollback":
            for index in rounds:
                restores = log.records[index].restores
                sentences.append(f"Round {index} found divergence and went back to the state after round {restores}.")
    return sentences


def counted(number: int, what: str) -> str:
    """A number of things, in the singular if it is one."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def _rule(options: dict[str, Value]) -> str:
    """A rule of the method by its type and options."""
    numbers = _pairs({name: value for name, value in options.items() if name != "type"})
    return f"{options['type']} ({numbers})" if numbers else str(options["type"])


def _pairs(values: dict[str, Value]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
