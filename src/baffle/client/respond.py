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
from baffle.core.credit import is_plain, sizes_of, units_of
from baffle.core.directions import Directions
from baffle.core.philox import Purpose, generator
from baffle.core.rebuild import FAST, Execution, gradient
from baffle.core.scalars import Encoded, encode, weight_of
from baffle.core.types import MOST_BITS, Losses, Reply, Table, Task, Weights, pack
from baffle.data import Dataset, concatenate, sample
from baffle.errors import OptionError, PlanError
from baffle.runtimes import CreditEvaluator, Evaluator, Runtime
from baffle.runtimes.perturb import Perturbations


def perturbations(task: Task, table: Table, client: int, step: int = 0, first: int = 0) -> Perturbations:
    """List the forward passes of a client's local step, or of a slice of its mini-batch.

    Args:
        task: of the round.
        table: the trainable tensors.
        client: its number; matters only for per-client directions.
        step: local step.
        first: number of the first direction.
    """
    directions = Directions.of(task, table, client, step)
    if task.difference == "forward":
        return Perturbations(
            directions, task.num_directions, (task.sigma,), baseline=True, first=first, lattice=task.lattice
        )
    return Perturbations(
        directions, task.num_directions, (task.sigma, -task.sigma), baseline=False, first=first, lattice=task.lattice
    )


def passes_of(task: Task, table: Table) -> int:
    """Forward passes over each example of a mini-batch that a reply takes.

    Rows that are credited one by one are perturbed in one pass through all layers, each on its clean input, beside
    the clean pass.
    """
    kinds = {unit.kind for unit in units_of(table)}
    clean = int(task.difference == "forward" or kinds != {"loss"})
    steps = 1 if task.difference == "forward" else 2
    return task.local_steps * (clean + steps * task.num_directions * len(kinds - {"exact"}))


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


def numbers_of(
    task: Task,
    table: Table,
    evaluator: Evaluator,
    weights: Weights,
    batches: Sequence[Dataset],
    client: int = 0,
    step: int = 0,
) -> list[npt.NDArray[np.float64]]:
    """The numbers of a reply, before they are encoded, of clients that evaluate the same directions together.

    Example i of a mini-batch is in slice i mod S; the examples of a slice, of all clients, go through the same
    perturbed models.

    Args:
        task: what is asked.
        table: the trainable tensors.
        evaluator: evaluates, on the model that ``table`` describes.
        weights: float32[n].
        batches: each client's mini-batch.
        client: whose directions; any, where they are shared.
        step: the local step.

    Returns:
        For each batch float64[numbers].
    """
    cut = [[b.take(np.arange(s, len(b), task.slices)) for b in batches] for s in range(task.slices)]
    if not is_plain(table):
        order = [part for parts in cut for part in parts]
        groups = np.repeat(np.tile(np.arange(len(batches)), task.slices), [len(part) for part in order])
        bounds = np.cumsum([0, *(sum(map(len, parts)) for parts in cut)]).tolist()
        asked = perturbations(task, table, client, step)
        if not isinstance(evaluator, CreditEvaluator):
            raise PlanError(f"{type(evaluator).__name__} gives losses alone: expected a runtime for the model's credit")
        numbers = evaluator.credits(weights, asked, concatenate(order), groups, bounds)
        return list(numbers)
    columns: list[list[npt.NDArray[np.float64]]] = []
    for s, parts in enumerate(cut):
        asked = perturbations(task, table, client, step, s * task.num_directions)
        losses = evaluator.losses(weights, asked, concatenate(parts))
        ends = np.cumsum([len(part) for part in parts])[:-1]
        columns.append([finite_differences(task, part) for part in np.split(losses, ends, axis=1)])
    return [np.concatenate(own) for own in zip(*columns, strict=True)]


def reply(task: Task, client: int, weight: int, steps: Sequence[Encoded]) -> Reply:
    """Assemble the reply from the encoded numbers of all local steps."""
    magnitudes = np.mean([s.magnitudes for s in steps], axis=0)
    return Reply(
        round=task.round,
        client=client,
        weight=weight,
        scalars=pack(np.stack([s.integers for s in steps]), task.bits),
        magnitudes=tuple(weight * round(m) for m in magnitudes.tolist()),
        clipped=sum(s.clipped for s in steps),
        nonfinite=sum(s.nonfinite for s in steps),
    )


def local_update(
    task: Task, table: Table, weights: Weights, encoded: Encoded, step: int, execution: Execution
) -> Weights:
    """Take one local step of plain SGD.

    It uses the numbers as encoded, so that the sums describe exactly the steps that clients took.
    """
    directions = Directions.of(task, table, 0, step)  # local steps need shared directions
    estimate = gradient([(directions, encoded.integers)], task, 1, execution)
    with np.errstate(over="ignore", invalid="ignore"):  # non-finite losses follow, and are counted
        return weights - np.float32(task.local_lr) * estimate


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
        [numbers] = numbers_of(task, runtime.table, evaluator, weights, [batch(step)], client, step)
        steps.append(encode(task, numbers))
        if step + 1 < task.local_steps:
            weights = local_update(task, runtime.table, weights, steps[-1], step, execution)
    return reply(task, client, weight_of(examples, task.quantum), steps)


def check_task(task: Task, table: Table) -> None:
    """Reject tasks that are out of range, not about this model, or would never finish. Raises OptionError."""
    require_count("num_directions", task.num_directions, 1, 2**20)
    require_count("slices", task.slices, 1, 2**16)
    require_count("bits", task.bits, 1, MOST_BITS)
    require_count("local_steps", task.local_steps, 1, 2**20)
    require_positive("sigma", task.sigma)
    if task.batch_size is not None:
        require_count("batch_size", task.batch_size)
    sizes = sizes_of(table, task.num_directions * task.slices)
    if task.sizes != sizes:
        raise OptionError("unit_sizes", task.unit_sizes, f"{sizes}, for this model")
    if len(task.exponents) != len(sizes):
        raise OptionError("exponents", task.exponents, f"{len(sizes)}, one for each unit")
