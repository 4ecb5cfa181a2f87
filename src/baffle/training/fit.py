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
from baffle.errors import ModelError
from baffle.runtimes import Runtime
from baffle.runtimes.choose import choose, trial_batch
from baffle.training.defaults import WAYS, usual
from baffle.training.loop import Progress, train
from baffle.training.result import Run

if TYPE_CHECKING:
    from torch import Tensor, nn

_GLOBAL = ("global", "directions")


def default_method(rounds: int, credit: str = "global", examples: int = 32, head: str | None = None) -> Method:
    """The method of ``fit``: shared directions, forward differences, Adam on a cosine schedule.

    One scalar per direction needs many of them: K = 100, at a learning rate of 0.01. Rows that are credited one by one
    need few: K = 5 in 8 slices, in 8 bits, at 0.03 (``training.defaults``, as for ``baffle train``).

    Args:
        rounds: Length of the schedule.
        credit: ``local`` or ``feature`` for rows; ``global`` for one scalar per direction.
        examples: Of the client that has the fewest: there are no more slices than that.
        head: ``exact`` or ``directions``; by default exact unless credit is global.

    Returns:
        The method, for ``fit`` or ``train``.

    Examples:
        >>> default_method(100, "local").num_directions, default_method(100).num_directions
        (5, 100)
    """
    head = head or ("directions" if credit == "global" else "exact")
    directions, slices, bits, lr = usual(credit, head, min(examples, Method().batch_size or examples))
    return Method(num_directions=directions, slices=slices, bits=bits, optimizer=Adam(lr=lr, schedule=Cosine(rounds)))


def fit(
    model: nn.Module,
    clients: Sequence[Dataset],
    *,
    loss: Callable[..., Tensor],
    test: Dataset | None = None,
    rounds: int = 400,
    method: Method | None = None,
    credit: str = "auto",
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
        method: What happens in a round; by default ``default_method``. A method of your own has its own learning-rate
            schedule, and ``credit="auto"`` is then ``global``.
        credit: Which numbers clients return (``docs/method.md``). ``local``: one per row of each layer, through a head
            on the layer's features; ``feature``: the same for the layers before the last one; ``global``: one scalar
            per direction. ``auto``: the first of these that the model has; with ``global`` the last layer is then
            exact if it can be. What was taken is in the run's ``config.table`` and ``config.plan``.
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
    examples = min(len(client) for client in clients)
    only = _GLOBAL if credit in ("auto", "global") else (credit, "exact")
    ways = WAYS if credit == "auto" and method is None else (only,)
    for kind, head in ways:
        chosen = method or default_method(rounds, kind, examples, head)
        try:
            runtime = _runtime(model, loss, clients, chosen, kind, head)
        except ModelError:  # it has no such numbers
            if (kind, head) == ways[-1]:
                raise
            continue
        break
    return train(
        chosen,
        LocalEngine(runtime, clients),
        runtime.initial_weights(),
        rounds=rounds,
        test=test,
        seed=seed,
        out=out,
        progress=progress,
    )


def _runtime(
    model: nn.Module, loss: Callable[..., Tensor], clients: Sequence[Dataset], method: Method, credit: str, head: str
) -> Runtime:
    """What evaluates the model; the fastest way, by a short measurement, where there is more than one."""
    from baffle.runtimes.pytorch.credit import CreditRuntime
    from baffle.runtimes.pytorch.runtime import TorchRuntime

    if (credit, head) != _GLOBAL:
        return CreditRuntime(model, loss, clients[0], credit=credit)
    ways = {way: partial(TorchRuntime, model, loss, strategy=way) for way in ("copies", "stacked")}
    batch = trial_batch(clients, method.batch_size)
    return choose(ways, batch, num_directions=method.num_directions, family=method.family).runtime
