"""``fit``: from a PyTorch model, the clients' data and a loss to a trained model in one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from baffle.core.method import Method
from baffle.core.optim import Adam, Cosine
from baffle.data import Dataset
from baffle.engines.local import LocalEngine, require_examples
from baffle.runtimes import Runtime
from baffle.runtimes.choose import choose, trial_batch
from baffle.training.loop import Progress, train
from baffle.training.result import Run

if TYPE_CHECKING:
    from torch import Tensor, nn


def default_method(rounds: int, credit: str = "global", examples: int = 32) -> Method:
    """The method of ``fit``: shared directions, forward differences, Adam on a cosine schedule.

    One scalar per direction needs many of them: K = 100, at a learning rate of 0.01. Rows that are credited one by one
    need few: K = 5 in 8 slices, in 8 bits, at 0.03.

    Args:
        rounds: Length of the schedule.
        credit: As for ``fit``.
        examples: Of the client that has the fewest: there are no more slices than that.

    Returns:
        The method, for ``fit`` or ``train``.
    """
    if credit == "global":
        return Method(optimizer=Adam(lr=0.01, schedule=Cosine(rounds)))
    slices = max(1, min(8, examples))
    return Method(num_directions=5, slices=slices, bits=8, optimizer=Adam(lr=0.03, schedule=Cosine(rounds)))


def fit(
    model: nn.Module,
    clients: Sequence[Dataset],
    *,
    loss: Callable[..., Tensor],
    test: Dataset | None = None,
    rounds: int = 400,
    method: Method | None = None,
    credit: str = "global",
    seed: int = 0,
    out: str | Path | None = None,
    progress: Progress | None = None,
) -> Run:
    """Train a copy of ``model`` on clients that run forward passes only, simulated in this process.

    The way forward passes are evaluated is chosen by a short measurement and recorded in the run's ``config.plan``.

    Args:
        model: The model to start from. It is not changed: ``run.load_into(model)`` copies the result into it.
        clients: One data set per client, as ``partition`` returns them.
        loss: ``loss(output, target)``: a function of ``torch.nn.functional``, or one that returns one number per
            example.
        test: Data to evaluate on every 10 rounds and at the end; without it, loss and accuracy are None.
        rounds: Number of updates of the weights.
        method: What happens in a round; by default ``default_method(rounds)``. A method of your own has its own
            learning-rate schedule.
        credit: ``global``: one scalar per direction. ``local``: one per row of each layer, through a head on the
            layer's features; ``feature``: the same for the layers before the last one (``docs/method.md``).
        seed: Seed of everything random; equal seeds give bit-identical runs.
        out: New run folder; without it nothing is written.
        progress: Called with the record of each round.

    Returns:
        The finished run.

    Raises:
        RunExistsError: ``out`` exists.
        DataError: A client has no examples.
        ModelError: The model cannot be evaluated on the clients' examples.
        DivergedError: Training diverged more often than ``method.guard`` allows.

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
    require_examples(clients)
    method = method or default_method(rounds, credit, min(len(client) for client in clients))
    runtime = _runtime_of(model, clients, loss, method, credit)
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


def _runtime_of(
    model: nn.Module, clients: Sequence[Dataset], loss: Callable[..., Tensor], method: Method, credit: str
) -> Runtime:
    """What evaluates the model: where there is more than one way, the one that a short measurement finds fastest."""
    if credit != "global":
        from baffle.runtimes.pytorch.credit import CreditRuntime

        return CreditRuntime(model, loss, clients[0], credit=credit)
    from baffle.runtimes.pytorch.runtime import TorchRuntime

    ways = {way: partial(TorchRuntime, model, loss, strategy=way) for way in ("copies", "stacked")}
    batch = trial_batch(clients, method.batch_size)
    return choose(ways, batch, num_directions=method.num_directions, family=method.family).runtime
