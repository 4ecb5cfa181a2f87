"""Numbers of credited models by forward passes only: rows by their features, heads exactly. For every engine.

An engine (:class:`Blocks`) runs a model head by head. Where a head's features are known its gradient is exact: the
derivative of the loss by the outputs, from finite differences of the loss alone, times the features; and so is the
derivative by the features. Then every unit that the head credits runs again on its clean input, once for each
direction, with all its rows perturbed: what a row's features change, times their derivative, over sigma, is the row's
number. All units of a model so take one pass for each direction, and what one head needs is forgotten before the next.

Local losses: Nokland and Eidnes, arXiv 1901.06656; with forward gradients: Ren et al., arXiv 2210.03310.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from baffle.core.credit import part_of, sizes_of, units_of
from baffle.core.types import Table
from baffle.runtimes.lanes import side_by_side
from baffle.runtimes.perturb import BUDGET, Pass, Perturbations, Point

Float64: TypeAlias = npt.NDArray[np.float64]

LARGEST_PART = 64
"""Examples that go through a model together, at most."""
_OUTPUTS = 2**21  # numbers whose losses are taken together


@dataclass(frozen=True, eq=False)
class CreditHead:
    """A linear layer on features, by the places of its tensors in the table."""

    weight: int
    bias: int | None


@dataclass(frozen=True, eq=False)
class CreditRows:
    """A unit whose rows are credited through a head's features.

    Attributes:
        unit: its number in the table.
        head: the number of its head.
        map: float64[features, numbers] of 0 and 1: to which of the unit's numbers each feature adds.
    """

    unit: int
    head: int
    map: Float64


@dataclass(frozen=True, eq=False)
class CreditPlan:
    """Which numbers come from which features.

    Attributes:
        table: the trained tensors.
        heads: in the order in which a pass meets them; the last is the model's own.
        rows: the units that are credited row by row.
    """

    table: Table
    heads: tuple[CreditHead, ...]
    rows: tuple[CreditRows, ...]


def plan_of(
    table: Table,
    heads: Iterable[tuple[str, str | None]],
    rows: Iterable[tuple[int, int, npt.NDArray[np.int64]]],
) -> CreditPlan:
    """Which numbers come from which features.

    Args:
        table: the trained tensors.
        heads: names of each head's weight and bias.
        rows: of each unit that is credited row by row its number, that of its head, and which of its numbers owns each
            feature.
    """
    place = {spec.name: i for i, spec in enumerate(table)}
    units = units_of(table)
    return CreditPlan(
        table,
        tuple(CreditHead(place[weight], None if bias is None else place[bias]) for weight, bias in heads),
        tuple(CreditRows(unit, head, map_of(owners, units[unit].numbers)) for unit, head, owners in rows),
    )


def map_of(owners: npt.NDArray[np.int64], count: int) -> Float64:
    """The map of a unit of ``count`` numbers, from the number that owns each feature (-1: none does).

    A number that owns no feature adds all of them up: it is that of rows which no feature tells apart.

    Examples:
        >>> map_of(np.array([0, 0, -1]), 2).tolist()
        [[1.0, 1.0], [1.0, 1.0], [0.0, 1.0]]
    """
    chosen = np.zeros((len(owners), count))
    known = np.flatnonzero(owners >= 0)
    chosen[known, owners[known]] = 1
    if count > int(owners.max(initial=-1)) + 1:
        chosen[:, -1] = 1
    return chosen


class Blocks(Protocol):
    """One thread's engine: a model in blocks, from head to head."""

    @property
    def step(self) -> float:
        """Step of the finite differences of the loss: small where the engine takes losses in float64."""
        ...

    def start(self, examples: slice, evaluated: Pass | None = None) -> None:
        """Begin to run some examples of the batch, clean, or with the tensors of kind loss as in a pass."""
        ...

    def features(self, head: int) -> Float64:
        """Run on to a head, and return its features float64[examples, features]. Heads are asked for in order."""
        ...

    def again(self, rows: int, evaluated: Pass) -> Float64:
        """The features of a unit (by its place in the plan) in a pass that perturbs it, on its clean input.

        Called while the unit's head is the one that was asked for last.
        """
        ...

    def losses(self, outputs: Float64) -> Float64:
        """The loss of outputs of the last layer: [m, examples, outputs] -> float64[m, examples]."""
        ...


@dataclass(frozen=True)
class _Part:
    """Examples that go through the model together, all of the slice with a number."""

    number: int
    examples: slice


def credits_of(
    plan: CreditPlan,
    lanes: Sequence[Blocks],
    point: Point,
    asked: Perturbations,
    groups: npt.NDArray[np.int64],
    bounds: Sequence[int],
    run: Callable[[Callable[[int], list[list[Float64]]], int], list[list[list[Float64]]]] = side_by_side,
) -> Float64:
    """The numbers of each unit, as ``runtimes.CreditEvaluator`` describes them: float64[groups, numbers].

    Args:
        plan: which numbers there are.
        lanes: engines that work side by side, one a thread.
        point: the weights of the call.
        asked: the directions of slice 0, and the steps.
        groups: to whom each example belongs, int64[examples].
        bounds: where the slices begin, and the end of the last.
        run: calls a function side by side (``lanes.side_by_side``).
    """
    parts = [
        _Part(j, slice(start, min(start + LARGEST_PART, end)))
        for j, (first, end) in enumerate(pairwise(bounds))
        for start in range(first, end, LARGEST_PART)
    ]
    count, lanes = int(groups.max()) + 1, lanes[: len(parts)]

    def work(i: int) -> list[list[Float64]]:
        done = []
        for part in parts[i :: len(lanes)]:
            owners = np.zeros((count, part.examples.stop - part.examples.start))
            owners[groups[part.examples], np.arange(owners.shape[1])] = 1
            done.append(_of_part(plan, lanes[i], point, asked, part, owners))
        return done

    found: list[list[Float64]] = [[]] * len(parts)
    for i, own in enumerate(run(work, len(lanes))):
        found[i :: len(lanes)] = own
    return _means(plan, asked.num_directions, parts, found, groups, bounds)


def _of_part(
    plan: CreditPlan, blocks: Blocks, point: Point, asked: Perturbations, part: _Part, owners: Float64
) -> list[Float64]:
    """Of each unit the sums over a part's examples, float64[groups, numbers]."""
    first = asked.first + part.number * asked.num_directions
    passes = list(point.passes(replace(asked, first=first, baseline=0), BUDGET))
    units = units_of(plan.table)
    sums: dict[int, Float64] = {}
    losses = np.zeros(0)
    blocks.start(part.examples)
    for number, head in enumerate(plan.heads):
        features = blocks.features(number)
        weight, outputs = _outputs(plan, head, features, point)
        losses, slopes = _slopes(blocks, outputs)
        exact = {head.weight: owners[:, None, :] * slopes.T[None] @ features}
        if head.bias is not None:
            exact[head.bias] = owners @ slopes
        unit = plan.table[head.weight].credit.unit
        sums[unit] = np.concatenate([exact[i].reshape(len(owners), -1) for i in units[unit].tensors], axis=1)
        slopes_of_features = slopes @ weight
        for place, rows in enumerate(plan.rows):
            if rows.head == number:
                ends = (blocks.again(place, evaluated) for evaluated in passes)
                derivatives = _derivatives(ends, asked.steps, features)
                sums[rows.unit] = np.concatenate([owners @ (slopes_of_features * d) @ rows.map for d in derivatives], 1)
    if units[0].kind == "loss":
        ends = (_loss(plan, blocks, point, part, evaluated) for evaluated in passes)
        sums[0] = owners @ np.stack(list(_derivatives(ends, asked.steps, losses)), axis=1)
    return [sums[unit] for unit in range(len(sums))]


def _derivatives(ends: Iterator[Float64], steps: tuple[float, ...], clean: Float64) -> Iterator[Float64]:
    """What changes per step, direction by direction: forward differences from ``clean``, or central ones."""
    for end in ends:
        yield (end - clean) / steps[0] if len(steps) == 1 else (end - next(ends)) / (steps[0] - steps[1])


def _outputs(plan: CreditPlan, head: CreditHead, features: Float64, point: Point) -> tuple[Float64, Float64]:
    """A head's weight float64[outputs, features], and what it makes of features, float64[examples, outputs]."""
    weight = point.weights(head.weight)
    outputs: Float64 = features @ weight.T
    return weight, outputs if head.bias is None else outputs + point.weights(head.bias)


def _loss(plan: CreditPlan, blocks: Blocks, point: Point, part: _Part, evaluated: Pass) -> Float64:
    """Losses float64[examples] in a pass that perturbs the tensors of kind loss."""
    blocks.start(part.examples, evaluated)
    features = blocks.features(len(plan.heads) - 1)
    [losses] = blocks.losses(_outputs(plan, plan.heads[-1], features, point)[1][None])
    return np.asarray(losses)


def _slopes(blocks: Blocks, outputs: Float64) -> tuple[Float64, Float64]:
    """Losses [n] of outputs [n, m], and their derivatives by the outputs [n, m], by differences of the loss alone."""
    count, size = outputs.shape
    slopes = np.empty((count, size))
    together = max(1, _OUTPUTS // (2 * outputs.size))
    for first in range(0, size, together):
        moved = blocks.step * np.eye(size)[first : first + together, None]
        up, down = np.split(blocks.losses(np.concatenate([outputs + moved, outputs - moved])), 2)
        slopes[:, first : first + together] = ((up - down) / (2 * blocks.step)).T
    return blocks.losses(outputs[None])[0], slopes


def _means(
    plan: CreditPlan,
    num_directions: int,
    parts: Sequence[_Part],
    found: Sequence[Sequence[Float64]],
    groups: npt.NDArray[np.int64],
    bounds: Sequence[int],
) -> Float64:
    """Sums over the parts, in their order whatever thread they came from, over the numbers of examples."""
    slices, count = len(bounds) - 1, int(groups.max()) + 1
    sizes = sizes_of(plan.table, num_directions * slices)
    numbers = np.zeros((count, sum(sizes)))
    whole = np.bincount(groups, minlength=count)[:, None]
    of_slice = [np.bincount(groups[a:b], minlength=count)[:, None] for a, b in pairwise(bounds)]
    for unit, (place, size) in enumerate(zip(part_of(sizes), sizes, strict=True)):
        exact = units_of(plan.table)[unit].kind == "exact"
        own = numbers[:, place]
        share = size if exact else size // slices
        for part, values in zip(parts, found, strict=True):
            at = slice(0, share) if exact else slice(part.number * share, (part.number + 1) * share)
            own[:, at] += values[unit] / np.maximum(1, whole if exact else of_slice[part.number])
    return numbers
