"""What training gives, and its totals."""

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
    """What training gave.

    ``average`` is the exponential moving average of the weights, which is what loss and accuracy are of;
    ``weights`` are the raw ones, whose hash the journal holds. Both flat, float32[n]. ``loss`` and ``accuracy`` are
    of the test data at the end, the other two of validation data, if there were any.
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

        load_into(model, self.config.table, self.average)

    def summary(self) -> dict[str, str | int | float | None]:
        """Totals of the run, as ``baffle train --json`` prints them."""
        method, records = self.config.method, self.records
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
                for name in ("num_directions", "family", "sharing", "difference", "lattice")
            }
            | {"sigma": None if self.config.backprop else records[-1].sigma if records else method.sigma}
            | {
                "forward_passes": total(r.forward_passes for r in records),
                "samples_forwarded": total(r.samples_forwarded for r in records),
                "bytes_up": total(r.bytes_up for r in records),
                "bytes_down": total(r.bytes_down for r in records),
                "seconds": total(r.seconds for r in records),
                "peak_rss_mb": round(peak_rss_mb(), 1),
                "parameters": table_size(self.config.table),
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
    """The run that is done, last ``measured`` on validation data if there are any; its totals in ``summary.json``."""
    if validation is None:
        run = Run(config, state, tuple(records), *measured, path=path)
    else:
        run = Run(config, state, tuple(records), *evaluate(engine, state.ema_weights, test), *measured, path)
    if path is not None:
        write_file(path / "summary.json", msgspec.json.format(msgspec.json.encode(run.summary())) + b"\n")
    return run


def evaluate(engine: Engine, weights: Weights, test: Dataset | None) -> tuple[float | None, float | None]:
    """Mean loss and accuracy on ``test``; None where there is none."""
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
