"""The strategy ``stacked`` (batched over directions): groups of directions in one batch each, checked on the way.

Whether a model can be evaluated so cannot be derived from its code, so it is tried: for every shape of a stack, its
first and last pass are compared once with the same passes evaluated alone. A second check with one extra example
ensures that the example dimension is not confused with another of equal length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial

import numpy as np
import torch
from torch import Tensor

from baffle.errors import ModelError
from baffle.runtimes.perturb import Block, Pass, Perturbations, Point
from baffle.runtimes.pytorch.replica import LOOSE, MicroBatch, Replica, as_bits
from baffle.runtimes.pytorch.stack import NotStackable, Stack


class Stacks:
    """Evaluates stacks on one replica, and remembers which shapes passed the checks."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self._stackable: dict[tuple[int, ...], bool] = {}
        self._checked = set[tuple[int, ...]]()  # shapes of micro-batches whose example dimension was checked

    def losses(
        self, point: Point, part: Perturbations, batches: Sequence[MicroBatch], budget: int, rows: int
    ) -> Iterator[Tensor]:
        """Losses [examples] of each pass, in stacks of up to ``rows`` examples times passes.

        Raises:
            NotStackable: If the model cannot be evaluated as a stack at all.
        """
        most = max(1, rows // (len(batches[0].x) * max(1, len(part.steps))))
        for evaluated in point.passes(only_baseline(part)):
            yield torch.cat([self._replica.streamed(point, evaluated, c) for c in batches])
            self._replica.require_seen()
        plain = cache(partial(self._replica.plain, point))
        for block in point.blocks(part, budget, most):
            for micro_batch in batches:
                self._require_examples(point, block, part.steps[0], micro_batch, plain)
            losses = [self._stack(point, block, part.steps, c, plain) for c in self._replica.remembering(batches)]
            self._replica.require_seen()
            yield from torch.cat(losses, dim=1)

    def _stack(
        self,
        point: Point,
        block: Block,
        steps: Sequence[float],
        micro_batch: MicroBatch,
        plain: Callable[[int], Tensor],
    ) -> Tensor:
        """Losses [passes, examples] of a block of directions; pass by pass if a stack of this shape failed before."""
        s, b = block.size * len(steps), len(micro_batch.x)
        shape = (s, *micro_batch.x.shape)
        passes = [Pass(point, block, k, np.float32(step)) for k in range(block.size) for step in steps]
        if not self._stackable.get(shape, True):
            return torch.stack([self._replica.streamed(point, p, micro_batch) for p in passes])
        each = partial(self._each, point, block, steps)
        mode = Stack(self._replica.index, s, b, plain, cache(partial(self._factors, point, block, steps)), each)
        try:
            losses = self._replica.forward(micro_batch.x, micro_batch.y, mode, s)[1].view(len(steps), block.size, b)
        except (NotStackable, ModelError) as error:
            if not any(self._stackable.values()):  # no shape has worked so far: the model itself cannot be stacked
                raise NotStackable(str(error)) from error
            self._stackable[shape] = False
            return self._stack(point, block, steps, micro_batch, plain)
        losses = losses.transpose(0, 1).reshape(s, b)
        if shape not in self._stackable:  # once per shape: compare with the same passes alone
            alone = torch.stack([self._replica.streamed(point, passes[i], micro_batch) for i in (0, -1)])
            both = losses[[0, -1]].isfinite() & alone.isfinite()
            close = torch.allclose(losses[[0, -1]][both], alone[both], 1e-3, LOOSE[self._replica.dtype])
            if not close and not any(self._stackable.values()):
                raise NotStackable("a stack gives other losses than its examples alone")
            self._stackable[shape] = close
            if not close:
                return self._stack(point, block, steps, micro_batch, plain)
        return losses

    def _require_examples(
        self, point: Point, block: Block, step: float, micro_batch: MicroBatch, plain: Callable[[int], Tensor]
    ) -> None:
        """Check that the dimension taken for examples is one: adding an example must add one output.

        Otherwise a dimension that happens to be as long as a micro-batch or a stack could be taken for the examples.
        """
        if tuple(micro_batch.x.shape) in self._checked:
            return

        def factors(i: int) -> tuple[Tensor, Tensor] | None:
            pair = self._factors(point, block, (step,), i)
            return None if pair is None else (pair[0][:1], pair[1][:1])

        each = cache(partial(self._replica.written, point, Pass(point, block, 0, np.float32(step))))
        x, y = (torch.cat([t, t[:1]]) for t in (micro_batch.x, micro_batch.y))
        try:
            self._replica.forward(x, y, Stack(self._replica.index, 1, len(x), plain, factors, lambda i: each(i)[None]))
        except ModelError as error:
            raise NotStackable(str(error)) from error
        self._checked.add(tuple(micro_batch.x.shape))

    def _factors(self, point: Point, block: Block, steps: Sequence[float], tensor: int) -> tuple[Tensor, Tensor] | None:
        """The rank-1 factors of a stack, the left ones times the step; None where entries are not such a product."""
        pair = block.factors(tensor)
        if pair is None or tensor in point.masks:  # a product cannot leave pruned entries out
            return None
        a = torch.from_numpy(np.concatenate([pair[0] * np.float32(step) for step in steps]))
        b = torch.from_numpy(np.concatenate([pair[1]] * len(steps)))
        axes = point.layouts[tensor].axes
        if axes is not None:
            shape = self._replica.table[tensor].shape
            b = b.view(-1, *[shape[a] for a in axes[1:]]).permute(0, *[axes.index(d) for d in range(1, len(axes))])
        return a.to(self._replica.device, self._replica.dtype), b.to(self._replica.device, self._replica.dtype)

    def _each(self, point: Point, block: Block, steps: Sequence[float], tensor: int) -> Tensor:
        """A tensor's perturbed weights for every pass of a stack: [passes, *shape]."""
        made, view = self._replica.memory(point.layouts[tensor], tensor, len(steps) * block.size)
        for step, part in zip(steps, np.split(as_bits(made), len(steps)), strict=True):
            Pass(point, block, slice(0, block.size), np.float32(step)).write(tensor, part)
        return view.to(self._replica.device)


def only_baseline(part: Perturbations) -> Perturbations:
    """The unperturbed passes of one part of a call."""
    return Perturbations(part.directions, 0, (), part.baseline, part.first, part.lattice)
