"""Evaluating by stacks: directions in groups, each group in one batch, and whatever could go wrong noticed.

That a model can be evaluated so is tried, not known: for every shape of a stack its first and last pass are compared
once with what they give alone, and one more example once tells examples from any other dimension of that length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial

import numpy as np
import torch
from torch import Tensor

from baffle.errors import ModelError
from baffle.runtimes.perturb import Block, Pass, Perturbations, Point
from baffle.runtimes.pytorch.replica import LOOSE, Chunk, Replica, as_bits
from baffle.runtimes.pytorch.stack import NotStackable, Stack


class Stacks:
    """One replica's stacks, and what is known of them."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self._stackable: dict[tuple[int, ...], bool] = {}
        self._told_apart = set[tuple[int, ...]]()

    def losses(
        self, point: Point, part: Perturbations, chunks: Sequence[Chunk], budget: int, rows: int
    ) -> Iterator[Tensor]:
        """Losses [examples] of each pass, several at once: as many as have ``rows`` examples together.

        Raises NotStackable.
        """
        most = max(1, rows // (len(chunks[0].x) * max(1, len(part.steps))))
        for evaluated in point.passes(only_baseline(part)):
            yield torch.cat([self._replica.streamed(point, evaluated, c) for c in chunks])
            self._replica.require_seen()
        plain = cache(partial(self._replica.plain, point))
        for block in point.blocks(part, budget, most):
            for chunk in chunks:
                self._require_examples(point, block, part.steps[0], chunk, plain)
            found = [self._stack(point, block, part.steps, c, plain) for c in self._replica.remembering(chunks)]
            self._replica.require_seen()
            yield from torch.cat(found, dim=1)

    def _stack(
        self, point: Point, block: Block, steps: Sequence[float], chunk: Chunk, plain: Callable[[int], Tensor]
    ) -> Tensor:
        """Losses [passes, examples] of a block of directions."""
        s, b = block.size * len(steps), len(chunk.x)
        shape = (s, *chunk.x.shape)
        passes = [Pass(point, block, k, np.float32(step)) for k in range(block.size) for step in steps]
        if not self._stackable.get(shape, True):
            return torch.stack([self._replica.streamed(point, p, chunk) for p in passes])
        each = partial(self._each, point, block, steps)
        mode = Stack(self._replica.index, s, b, plain, cache(partial(self._factors, point, block, steps)), each)
        try:
            losses = self._replica.forward(chunk.x, chunk.y, mode, s)[1].view(len(steps), block.size, b)
        except (NotStackable, ModelError) as error:
            if not any(self._stackable.values()):
                raise NotStackable(str(error)) from error
            self._stackable[shape] = False
            return self._stack(point, block, steps, chunk, plain)
        losses = losses.transpose(0, 1).reshape(s, b)
        if shape not in self._stackable:  # once, that it is what passes alone give
            alone = torch.stack([self._replica.streamed(point, passes[i], chunk) for i in (0, -1)])
            both = losses[[0, -1]].isfinite() & alone.isfinite()
            close = torch.allclose(losses[[0, -1]][both], alone[both], 1e-3, LOOSE[self._replica.dtype])
            if not close and not any(self._stackable.values()):
                raise NotStackable("a stack gives other losses than its examples alone")
            self._stackable[shape] = close
            if not close:
                return self._stack(point, block, steps, chunk, plain)
        return losses

    def _require_examples(
        self, point: Point, block: Block, step: float, chunk: Chunk, plain: Callable[[int], Tensor]
    ) -> None:
        """That what is taken for examples is: with one more of them, and one pass alone, there is one more.

        Else a dimension that happens to be as long as a batch or a stack could be taken for the examples.
        """
        if tuple(chunk.x.shape) in self._told_apart:
            return

        def factors(i: int) -> tuple[Tensor, Tensor] | None:
            found = self._factors(point, block, (step,), i)
            return None if found is None else (found[0][:1], found[1][:1])

        each = cache(partial(self._replica.written, point, Pass(point, block, 0, np.float32(step))))
        x, y = (torch.cat([t, t[:1]]) for t in (chunk.x, chunk.y))
        try:
            self._replica.forward(x, y, Stack(self._replica.index, 1, len(x), plain, factors, lambda i: each(i)[None]))
        except ModelError as error:
            raise NotStackable(str(error)) from error
        self._told_apart.add(tuple(chunk.x.shape))

    def _factors(self, point: Point, block: Block, steps: Sequence[float], tensor: int) -> tuple[Tensor, Tensor] | None:
        """The rank-1 factors of a stack, the left ones times the step; None where a product would not do."""
        found = block.factors(tensor)
        if found is None or tensor in point.masks:
            return None
        a = torch.from_numpy(np.concatenate([found[0] * np.float32(step) for step in steps]))
        b = torch.from_numpy(np.concatenate([found[1]] * len(steps)))
        axes = point.slots[tensor].axes
        if axes is not None:
            shape = self._replica.table[tensor].shape
            b = b.view(-1, *[shape[a] for a in axes[1:]]).permute(0, *[axes.index(d) for d in range(1, len(axes))])
        return a.to(self._replica.device, self._replica.dtype), b.to(self._replica.device, self._replica.dtype)

    def _each(self, point: Point, block: Block, steps: Sequence[float], tensor: int) -> Tensor:
        """A tensor's weights of every pass of a stack: [passes, *shape]."""
        made, view = self._replica.memory(point.slots[tensor], tensor, len(steps) * block.size)
        for step, part in zip(steps, np.split(as_bits(made), len(steps)), strict=True):
            Pass(point, block, slice(0, block.size), np.float32(step)).write(tensor, part)
        return view.to(self._replica.device)


def only_baseline(part: Perturbations) -> Perturbations:
    """The unperturbed passes of a portion."""
    return Perturbations(part.directions, 0, (), part.baseline, part.first, part.lattice)
