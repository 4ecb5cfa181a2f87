"""A model's copy for one thread, and three ways to evaluate it under perturbed weights.

* copies: every trained tensor has a buffer that the kernels read, and a pass writes all of them first;
* streaming: a layer's perturbed weight is made just before the layer runs and gone after it, so that a pass needs an
  inference's memory and one layer's weight;
* stacked: several directions in one batch (``baffle.runtimes.stacked``).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from baffle.errors import ModelError
from baffle.perturb import Array, Block, Pass, Perturbations, Point, Slot
from baffle.runtimes.intercept import Exchange, Memo, memoise_frozen_prefix
from baffle.runtimes.stacked import NotStackable, Stack
from baffle.types import Losses, Table

CHANNELS_LAST = (0, 2, 3, 1)
_BITS = {torch.float32: torch.float32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
_WORDS = {torch.float32: np.float32, torch.bfloat16: np.uint16, torch.float16: np.uint16}


@dataclass(frozen=True, eq=False)
class Chunk:
    """Some examples of a batch."""

    x: Tensor
    y: Tensor


class Replica:
    """A copy of a model whose frozen tensors are those of ``frozen`` (by id of the original) and shared.

    ``loss(output, target)`` gives one number an example. The model that was handed over is never changed.
    """

    def __init__(
        self, model: nn.Module, table: Table, loss: Callable[..., Tensor], dtype: torch.dtype, frozen: dict[int, Tensor]
    ) -> None:
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._parameters = [
            nn.Parameter(torch.zeros((), dtype=dtype, device=p.device).expand(p.shape), requires_grad=False)
            for p in trained.values()
        ]
        exchanged: dict[int, Any] = dict(frozen)
        exchanged |= {id(b): b.to(dtype) if b.is_floating_point() else b.clone() for b in model.buffers()}
        exchanged |= {id(p): own for p, own in zip(trained.values(), self._parameters, strict=True)}
        self.model: nn.Module = copy.deepcopy(model, exchanged)
        self._index = {id(p): i for i, p in enumerate(self._parameters)}
        self._table, self._loss, self._dtype = table, loss, dtype
        self._device = self._parameters[0].device
        self._memo: Memo | None = None
        self._looked_for_prefix = not frozen
        self._buffers: list[Tensor] = []
        self._bits: list[Array] = []
        self._stackable: dict[tuple[int, ...], bool] = {}
        self._seen = set[int]()

    # the three ways

    def copies(self, point: Point, part: Perturbations, chunks: Sequence[Chunk], budget: int) -> Iterator[Tensor]:
        """Losses [examples] of each pass; weights are written into buffers that the model's parameters are."""
        self._fill_parameters(point)
        for evaluated in point.passes(part, budget):
            for i, bits in enumerate(self._bits):
                evaluated.write(i, bits)
            self._upload()
            yield torch.cat([self._forward(c.x, c.y)[1] for c in self._remembering(chunks)])

    def streaming(self, point: Point, part: Perturbations, chunks: Sequence[Chunk], budget: int) -> Iterator[Tensor]:
        """The same; weights are made where they are used."""
        for evaluated in point.passes(part, budget):
            yield torch.cat([self._streamed(point, evaluated, c) for c in chunks])
            self._require_seen()

    def stacked(
        self, point: Point, part: Perturbations, chunks: Sequence[Chunk], budget: int, rows: int
    ) -> Iterator[Tensor]:
        """The same, several passes at once: as many as have ``rows`` examples together. Raises NotStackable."""
        most = max(1, rows // (len(chunks[0].x) * max(1, len(part.steps))))
        for evaluated in point.passes(only_baseline(part)):
            yield torch.cat([self._streamed(point, evaluated, c) for c in chunks])
        plain = cache(partial(self._plain, point))
        for block in point.blocks(part, budget, most):
            found = [self._stack(point, block, part.steps, c, plain) for c in self._remembering(chunks)]
            yield from torch.cat(found, dim=1)

    def evaluate(self, point: Point, chunks: Sequence[Chunk], in_buffers: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """Outputs and losses of each chunk under unperturbed weights."""
        plain = point.unperturbed
        if not in_buffers:
            with Exchange(self._index, cache(partial(self._written, point, plain))):
                yield from [self._forward(c.x, c.y) for c in chunks]
            return
        self._fill_parameters(point)
        for i, bits in enumerate(self._bits):
            plain.write(i, bits)
        self._upload()
        yield from [self._forward(c.x, c.y) for c in chunks]

    def outputs(self, point: Point, x: Tensor) -> object:
        """What the model makes of inputs under unperturbed weights."""
        plain = point.unperturbed
        with Exchange(self._index, partial(self._written, point, plain)):
            return self.model(x.to(self._dtype))

    # what they have in common

    def _streamed(self, point: Point, evaluated: Pass, chunk: Chunk) -> Tensor:
        with Exchange(self._index, partial(self._written, point, evaluated)):
            return self._forward(chunk.x, chunk.y)[1]

    def _stack(
        self, point: Point, block: Block, steps: Sequence[float], chunk: Chunk, plain: Callable[[int], Tensor]
    ) -> Tensor:
        """Losses [passes, examples] of a block of directions."""
        s, b = block.size * len(steps), len(chunk.x)
        shape = (s, *chunk.x.shape)
        passes = [Pass(point, block, k, np.float32(step)) for k in range(block.size) for step in steps]
        if not self._stackable.get(shape, True):
            return torch.stack([self._streamed(point, p, chunk) for p in passes])
        each = cache(partial(self._each, point, block, steps))
        mode = Stack(self._index, s, b, plain, cache(partial(self._factors, point, block, steps)), each)
        try:
            losses = self._forward(chunk.x, chunk.y, mode, s)[1].view(len(steps), block.size, b)
        except (NotStackable, ModelError) as error:
            if not any(self._stackable.values()):
                raise NotStackable(str(error)) from error
            self._stackable[shape] = False
            return self._stack(point, block, steps, chunk, plain)
        losses = losses.transpose(0, 1).reshape(s, b)
        if shape not in self._stackable:  # once, that it is what passes alone give
            alone = torch.stack([self._streamed(point, passes[i], chunk) for i in (0, -1)])
            close = torch.allclose(losses[[0, -1]], alone, 1e-3, _LOOSE[self._dtype], equal_nan=True)
            if not close and not any(self._stackable.values()):
                raise NotStackable("a stack gives other losses than its examples alone")
            self._stackable[shape] = close
            if not close:
                return self._stack(point, block, steps, chunk, plain)
        return losses

    def _factors(self, point: Point, block: Block, steps: Sequence[float], tensor: int) -> tuple[Tensor, Tensor] | None:
        """The rank-1 factors of a stack, the left ones times the step; None where a product would not do."""
        found = block.factors(tensor)
        if found is None or tensor in point.masks:
            return None
        a = torch.from_numpy(np.concatenate([found[0] * np.float32(step) for step in steps]))
        b = torch.from_numpy(np.concatenate([found[1]] * len(steps)))
        axes = point.slots[tensor].axes
        if axes is not None:
            shape = self._table[tensor].shape
            b = b.view(-1, *[shape[a] for a in axes[1:]]).permute(0, *[axes.index(d) for d in range(1, len(axes))])
        return a.to(self._device, self._dtype), b.to(self._device, self._dtype)

    def _each(self, point: Point, block: Block, steps: Sequence[float], tensor: int) -> Tensor:
        """A tensor's weights of every pass of a stack: [passes, *shape]."""
        made, view = self._memory(point.slots[tensor], tensor, len(steps) * block.size)
        for step, part in zip(steps, np.split(as_bits(made), len(steps)), strict=True):
            Pass(point, block, slice(0, block.size), np.float32(step)).write(tensor, part)
        return view.to(self._device)

    def _plain(self, point: Point, tensor: int) -> Tensor:
        return self._written(point, point.unperturbed, tensor)

    def _written(self, point: Point, evaluated: Pass, tensor: int) -> Tensor:
        """A tensor's perturbed weights in memory of their own."""
        made, view = self._memory(point.slots[tensor], tensor)
        evaluated.write(tensor, as_bits(made))
        self._seen.add(tensor)
        return view.to(self._device)

    def _memory(self, slot: Slot, tensor: int, *lead: int) -> tuple[Tensor, Tensor]:
        """Memory of a slot, as many times as ``lead`` says, and it as the tensor that the model sees."""
        shape = self._table[tensor].shape
        axes = slot.axes or tuple(range(len(shape)))
        made = torch.empty([*lead, *[shape[a] for a in axes]], dtype=self._dtype)
        if slot.axes is None:
            return made, made
        return made, made.permute([*range(len(lead)), *[len(lead) + axes.index(d) for d in range(len(shape))]])

    def _fill_parameters(self, point: Point) -> None:
        """Give the parameters memory, once."""
        if self._bits:
            return
        for i, p in enumerate(self._parameters):
            made, view = self._memory(point.slots[i], i)
            self._bits.append(as_bits(made))
            self._buffers.append(view)
            p.data = view if self._device.type == "cpu" else view.to(self._device)

    def _require_seen(self) -> None:
        """A tensor whose use is hidden from Python would never be perturbed."""
        if missing := [spec.name for i, spec in enumerate(self._table) if i not in self._seen]:
            raise ModelError(
                f"{missing[0]}: no function was seen to use it (does TorchScript?): expected strategy copies"
            )

    def _upload(self) -> None:
        if self._device.type != "cpu":
            for p, host in zip(self._parameters, self._buffers, strict=True):
                p.data.copy_(host)

    def _remembering(self, chunks: Sequence[Chunk]) -> Iterator[Chunk]:
        for number, chunk in enumerate(chunks):
            if self._memo is not None:
                self._memo.at(number)
            yield chunk
        if self._memo is not None:
            self._memo.at(None)

    def start(self, chunks: Sequence[Chunk]) -> None:
        """A new batch: what is frozen at the beginning of the model is evaluated once for it."""
        if not self._looked_for_prefix:
            self._looked_for_prefix = True
            self._memo = memoise_frozen_prefix(self.model, self._index, self._cast(chunks[0].x[:1]))
        if self._memo is not None:
            self._memo.start()

    def finish(self) -> None:
        """Let go of what was kept for the batch."""
        if self._memo is not None:
            self._memo.start()

    def _cast(self, x: Tensor) -> Tensor:
        return x.to(self._dtype) if x.is_floating_point() else x

    def _forward(
        self, x: Tensor, y: Tensor, mode: AbstractContextManager[Any] | None = None, passes: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Outputs and losses, one an example, or one an example and pass of a stack."""
        try:
            with mode or nullcontext():
                output = self.model(self._cast(x))
        except NotStackable:
            raise
        except Exception as error:  # of the user's own code
            raise ModelError(f"the model failed on inputs {tuple(x.shape)} of {x.dtype}: {error}") from error
        if not isinstance(output, Tensor):
            raise ModelError(f"the model gives a {type(output).__name__}: expected one tensor of outputs")
        if passes > 1:
            if len(output) != passes * len(x):
                raise NotStackable(f"outputs {tuple(output.shape)} of {passes} x {len(x)} examples")
            y = y.repeat(passes, *[1] * (y.ndim - 1))
        output = output if self._dtype is torch.float32 else output.float()
        try:
            loss = self._loss(output, y)
        except (IndexError, RuntimeError, TypeError) as error:
            raise ModelError(
                f"the loss failed on outputs {tuple(output.shape)} and targets {tuple(y.shape)} of {y.dtype}: {error}"
            ) from error
        if loss.shape != (passes * len(x),):
            raise ModelError(
                f"the loss has shape {tuple(loss.shape)} for {passes * len(x)} examples: expected one number an "
                "example (reduction='none', averaged over any further dimension)"
            )
        return output, loss.to(torch.float32)


_LOOSE = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 1e-2}
"""How far losses of a stack may be from those of its examples alone; another function is further."""


def as_bits(made: Tensor) -> Array:
    """Memory of a tensor as numpy sees it; two-byte floats as their bits."""
    return made.view(_BITS[made.dtype]).numpy().view(_WORDS[made.dtype])


def frozen_tensors(model: nn.Module, dtype: torch.dtype) -> dict[int, Tensor]:
    """Parameters that are not trained, by id, in the precision of the model."""
    kept: dict[int, Tensor] = {}
    for p in model.parameters():
        if not p.requires_grad:
            same = dtype is torch.float32 or not p.is_floating_point()
            kept[id(p)] = p if same else nn.Parameter(p.detach().to(dtype), requires_grad=False)
    return kept


def stack_losses(rows: Iterator[Tensor], passes: int, examples: int, device: torch.device) -> Losses:
    """Rows of losses as one array: float32[passes, examples]."""
    out = torch.empty((passes, examples), dtype=torch.float32, device=device)
    for row, losses in zip(out, rows, strict=True):
        row.copy_(losses)
    return np.asarray(out.cpu().numpy())


def only_baseline(part: Perturbations) -> Perturbations:
    """The unperturbed passes of a portion."""
    return Perturbations(part.directions, 0, (), part.baseline, part.first, part.lattice)


def slots_of(table: Table, dtype: torch.dtype, channels_last: bool) -> list[Slot]:
    """How the kernels want each tensor."""
    kind = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    return [
        Slot(kind, CHANNELS_LAST if channels_last and len(spec.shape) == 4 and math.prod(spec.shape) else None)  # type: ignore[arg-type]
        for spec in table
    ]
