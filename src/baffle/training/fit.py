"""The shortest way in: a PyTorch model, clients' data and a loss -> a trained model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from baffle.core.method import Method
from baffle.core.optim import Adam, Cosine
from baffle.data import Dataset
from baffle.engines.local import LocalEngine, require_examples
from baffle.runtimes.choose import choose, trial_batch
from baffle.training.loop import Progress, train
from baffle.training.result import Run

if TYPE_CHECKING:
    from torch import Tensor, nn


def default_method(rounds: int) -> Method:
    """100 shared rank-1 directions, forward differences, Adam 1e-2 on a cosine over ``rounds``."""
    return Method(optimizer=Adam(lr=0.01, schedule=Cosine(rounds)))


def fit(
    model: nn.Module,
    clients: Sequence[Dataset],
    *,
    loss: Callable[..., Tensor],
    test: Dataset | None = None,
    rounds: int = 400,
    method: Method | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    progress: Progress | None = None,
) -> Run:
    """Train a copy of ``model`` on clients that run forward passes only, simulated in this process.

    A short measurement says how passes are evaluated; the run's ``config.plan`` has it.

    ``method`` is by default ``default_method(rounds)``; one of your own brings its own schedule. The model itself
    stays as it is; ``run.load_into(model)`` brings the result into it. ``loss(output, target)``
    is any function of ``torch.nn.functional`` or one that gives a number an example.

    Examples:
        >>> import torch.nn.functional as F
        >>> from torch import nn
        >>> import baffle as bf
        >>> train, test = bf.load("digits")
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        >>> run = fit(model, bf.partition(train, clients=10), loss=F.cross_entropy, test=test, rounds=40)
        >>> run.accuracy > 0.75
        True
    """
    from baffle.runtimes.pytorch.runtime import TorchRuntime

    require_examples(clients)
    method = method or default_method(rounds)
    ways = {way: partial(TorchRuntime, model, loss, strategy=way) for way in ("copies", "stacked")}
    batch = trial_batch(clients, method.batch_size)
    runtime = choose(ways, batch, num_directions=method.num_directions, family=method.family).runtime
    return train(
        method,
        LocalEngine(runtime, clients),
        runtime.initial_weights(),
        rounds=rounds,
        test=test,
        seed=seed,
        out=out,
        progress=progress,
    )
