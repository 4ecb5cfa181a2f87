"""The result of training, and its totals."""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from baffle.client.costs import costs_of
from baffle.core.credit import model_table
from baffle.core.state import State, weights_sha256
from baffle.core.types import Weights, table_size
from baffle.data import Dataset
from baffle.engines import Engine
from baffle.runfolder.config import RunConfig, write_file
from baffle.runfolder.metrics import Record, total

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, eq=False)
class Run:
    """A finished run: the trained weights, how good they are, and the record of each round.

    Loss and accuracy are those of the averaged weights (an exponential moving average over the rounds), not of the
    raw weights, whose hash the journal holds.

    Attributes:
        config: Everything the run was made from, except data and model code.
        state: Weights, average and optimizer state after the last round.
        records: One record per round: what it did, and its cost.
        loss: Mean loss on the test data at the end; None without test data or if it is not known.
        accuracy: Share of correct predictions on the test data at the end, 0 to 1.
        validation_loss: Mean loss on the validation data at the end; None without such data.
        validation_accuracy: Share of correct predictions on the validation data at the end.
        path: The run folder; None if nothing was written.

    Examples:
        >>> import torch.nn.functional as F
        >>> from torch import nn
        >>> import baffle as bf
        >>> train, test = bf.load("digits")
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        >>> run = bf.fit(model, bf.partition(train, clients=3), loss=F.cross_entropy, test=test, rounds=5)
        >>> len(run.records), run.weights.shape  # round 0 only measures the scale of the scalars
        (6, (650,))
        >>> run.load_into(model)
    """

    config: RunConfig
    state: State
    records: tuple[Record, ...]
    loss: float | None
    accuracy: float | None
    validation_loss: float | None = None
    validation_accuracy: float | None = None
    path: Path | None = None

    @property
    def weights(self) -> Weights:
        """The raw weights, float32[n]."""
        return self.state.weights

    @property
    def average(self) -> Weights:
        """The averaged weights, float32[n]."""
        return self.state.ema_weights

    @property
    def weights_sha256(self) -> str:
        """Hash of the raw weights."""
        return weights_sha256(self.state.weights).hex()

    def load_into(self, model: nn.Module) -> None:
        """Copy the averaged weights into a PyTorch model."""
        from baffle.runtimes.pytorch.runtime import load_into

        load_into(model, model_table(self.config.table), self.average)

    def summary(self) -> dict[str, str | int | float | None]:
        """Totals of the run, as ``baffle train --json`` prints them; None where a value is unknown."""
        method, records = self.config.method, self.records
        costs = None if self.config.backprop else costs_of(method, self.config.table)
        return (
            {
                "accuracy": self.accuracy,
                "loss": _finite(self.loss),
                "validation_accuracy": self.validation_accuracy,
                "validation_loss": _finite(self.validation_loss),
                "rounds": self.state.round - 1,
                "updates": self.state.step,
                "rollbacks": sum(r.restores is not None for r in records),
                "clients": len(self.config.clients),
                "backprop": self.config.backprop,
            }
            | {
                name: None if self.config.backprop else getattr(method, name)
                for name in ("num_directions", "slices", "bits", "family", "sharing", "difference", "lattice")
            }
            | {"sigma": None if self.config.backprop else records[-1].sigma if records else method.sigma}
            | {
                "passes_per_example": None if costs is None else costs.passes,
                "numbers_per_reply": None if costs is None else costs.numbers,
                "numbers_of": None if costs is None else costs.kinds,
                "forward_passes": total(r.forward_passes for r in records),
                "samples_forwarded": total(r.samples_forwarded for r in records),
                "bytes_up": total(r.bytes_up for r in records),
                "bytes_down": total(r.bytes_down for r in records),
                "seconds": total(r.seconds for r in records),
                "peak_rss_mb": round(peak_rss_mb(), 1),
                "parameters": table_size(model_table(self.config.table)),
                "weights_sha256": self.weights_sha256,
                "run": None if self.path is None else str(self.path),
            }
        )


def finish(
    config: RunConfig,
    state: State,
    records: Sequence[Record],
    measured: tuple[float | None, float | None],
    engine: Engine,
    test: Dataset | None,
    validation: Dataset | None,
    path: Path | None,
) -> Run:
    """Make the finished run, and write its totals to ``summary.json``.

    Args:
        config: Settings of the run.
        state: State after the last round.
        records: One record per round.
        measured: Loss and accuracy of the last evaluation: on ``validation`` if there is such data, else on ``test``.
        engine: Evaluates on ``test`` if the last evaluation did not.
        test: Test data.
        validation: Validation data.
        path: The run folder; None to write nothing.

    Returns:
        The run.
    """
    if validation is None:
        run = Run(config, state, tuple(records), *measured, path=path)
    else:
        run = Run(config, state, tuple(records), *evaluate(engine, state.ema_weights, test), *measured, path)
    if path is not None:
        write_file(path / "summary.json", msgspec.json.format(msgspec.json.encode(run.summary())) + b"\n")
    return run


def evaluate(engine: Engine, weights: Weights, test: Dataset | None) -> tuple[float | None, float | None]:
    """Evaluate weights on a data set.

    Args:
        engine: An engine, or any object with such an ``evaluate``, such as a runtime.
        weights: Flat weights, float32[n].
        test: The data; None to evaluate nothing.

    Returns:
        Mean loss (infinite if it is not finite) and share of correct predictions. Both are None without data; the
        accuracy also where the model predicts no classes.

    Examples:
        >>> import torch.nn.functional as F
        >>> from torch import nn
        >>> import baffle as bf
        >>> train, test = bf.load("digits")
        >>> runtime = bf.TorchRuntime(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), F.cross_entropy)
        >>> loss, accuracy = evaluate(bf.LocalEngine(runtime, [train]), runtime.initial_weights(), test)
        >>> 0 <= accuracy <= 1
        True
    """
    if test is None:
        return None, None
    result = engine.evaluate(weights, test)
    loss = float(result.losses.astype(np.float64).mean())
    if not math.isfinite(loss):
        loss = math.inf
    return loss, None if result.correct is None else float(result.correct.mean())


def peak_rss_mb() -> float:
    """Peak resident memory of this process, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def _finite(loss: float | None) -> float | None:
    return loss if loss is not None and math.isfinite(loss) else None
