"""A client's computation: from a task, weights and a batch to integers, by forward passes only.

BAFFLE (arXiv 2301.12195), section 3: finite differences of the loss along shared directions. Here a scalar is
encoded as an integer on the round's power-of-two scale and weighted by an integer, so that all later steps
(sums, secure sums, rebuilding the gradient estimate) are exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from baffle.core.checks import require_count, require_positive
from baffle.core.directions import Directions
from baffle.core.philox import Purpose, generator
from baffle.core.rebuild import FAST, Execution, scaled
from baffle.core.scalars import Encoded, encode, weight_of
from baffle.core.types import Losses, Reply, Table, Task, Weights, pack_int32
from baffle.data import Dataset, sample
from baffle.runtimes import Evaluator, Runtime
from baffle.runtimes.perturb import Perturbations


def perturbations(task: Task, table: Table, client: int, step: int = 0) -> Perturbations:
    """List the forward passes of a client's local step.

    Args:
        task: of the round.
        table: the trainable tensors.
        client: its number; matters only for per-client directions.
        step: local step.
    """
    directions = Directions.of(task, table, client, step)
    if task.difference == "forward":
        return Perturbations(directions, task.num_directions, (task.sigma,), baseline=True, lattice=task.lattice)
    return Perturbations(
        directions, task.num_directions, (task.sigma, -task.sigma), baseline=False, lattice=task.lattice
    )


def finite_differences(task: Task, losses: Losses) -> npt.NDArray[np.float64]:
    """Compute the scalars s_k, finite differences of the mean loss L along the directions d_k.

    Forward: (L(W + sigma d) - L(W)) / sigma; central: (L(W + sigma d) - L(W - sigma d)) / (2 sigma). Losses are
    subtracted per example in float64, so that nearly equal losses cancel exactly.

    Args:
        task: of the round.
        losses: float32[passes, examples], in the order of :func:`perturbations`.

    Returns:
        float64[K].
    """
    precise = losses.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        if task.difference == "forward":
            gaps, width = precise[1:] - precise[0], task.sigma
        else:
            gaps, width = precise[0::2] - precise[1::2], 2 * task.sigma
        return np.asarray(gaps.sum(axis=1) / (losses.shape[1] * width))


def reply(task: Task, client: int, weight: int, steps: Sequence[Encoded]) -> Reply:
    """Assemble the reply from the encoded scalars of all local steps."""
    return Reply(
        round=task.round,
        client=client,
        weight=weight,
        scalars=pack_int32(np.stack([s.integers for s in steps]) * weight),
        clipped=sum(s.clipped for s in steps),
        nonfinite=sum(s.nonfinite for s in steps),
    )


def local_update(
    task: Task, table: Table, weights: Weights, encoded: Encoded, step: int, execution: Execution
) -> Weights:
    """Take one local step of plain SGD.

    It uses the scalars as encoded, so that the sums describe exactly the steps that clients took.
    """
    directions = Directions.of(task, table, 0, step)  # local steps need shared directions
    factor = directions.unit * 2.0**task.exponent / task.num_directions
    gradient = scaled(table, [(directions, encoded.integers)], factor, execution)
    with np.errstate(over="ignore", invalid="ignore"):  # non-finite losses follow, and are counted
        return weights - np.float32(task.local_lr) * gradient


def draw(task: Task, data: Dataset, client: int, step: int) -> Dataset:
    """Draw a client's mini-batch for a local step of a task; the same arguments give the same batch."""
    rng = generator((task.key, task.round), Purpose.BATCH, client + 1, step)
    return sample(data, task.batch_size, rng)


def respond(
    task: Task,
    runtime: Runtime,
    weights: Weights,
    batch: Callable[[int], Dataset],
    client: int,
    examples: int,
    execution: Execution = FAST,
    lane: Evaluator | None = None,
) -> Reply:
    """Answer a task.

    Args:
        task: of the round.
        runtime: evaluates the passes.
        weights: float32[n], at which the task starts.
        batch: returns the mini-batch of a local step.
        client: its number.
        examples: number of the client's examples, which sets its weight.
        execution: how directions are rebuilt on this machine, for several local steps.
        lane: of the runtime, to evaluate on; None: on all lanes.
    """
    evaluator: Evaluator = lane or runtime
    if evaluator is not runtime:  # other clients use the other lanes
        execution = replace(execution, threads=1)
    steps: list[Encoded] = []
    for step in range(task.local_steps):
        losses = evaluator.losses(weights, perturbations(task, runtime.table, client, step), batch(step))
        steps.append(encode(task, finite_differences(task, losses)))
        if step + 1 < task.local_steps:
            weights = local_update(task, runtime.table, weights, steps[-1], step, execution)
    return reply(task, client, weight_of(examples, task.quantum), steps)


def check_task(task: Task) -> None:
    """Reject tasks that are out of range or would never finish. Raises OptionError."""
    require_count("num_directions", task.num_directions, 1, 2**20)
    require_count("local_steps", task.local_steps, 1, 2**20)
    require_positive("sigma", task.sigma)
    if task.batch_size is not None:
        require_count("batch_size", task.batch_size)
