"""A model's copy for one thread, and three ways to evaluate it under perturbed weights.

* copies: every trained tensor has a buffer that the kernels read, and a pass writes all of them first;
* streaming: a layer's perturbed weight is made just before the layer runs and gone after it, so that a pass needs an
  inference's memory and one layer's weight;
* stacked: several directions in one batch (``baffle.runtimes.pytorch.stacked``).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from baffle.core.types import Losses, Table
from baffle.errors import ModelError
from baffle.runtimes.perturb import Array, Pass, Perturbations, Point, Slot
from baffle.runtimes.pytorch.frozen_prefix import Memo, memoise_frozen_prefix
from baffle.runtimes.pytorch.intercept import Exchange
from baffle.runtimes.pytorch.stack import NotStackable

CHANNELS_LAST = (0, 2, 3, 1)
_BITS = {torch.float32: torch.float32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
LOOSE = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 1e-2}
"""How far results computed in another way may be from the usual ones; another function's are further."""
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
        exchanged |= {id(b): b.to(dtype, copy=True) if b.is_floating_point() else b.clone() for b in model.buffers()}
        exchanged |= {id(p): own for p, own in zip(trained.values(), self._parameters, strict=True)}
        try:
            with torch.no_grad():
                self.model: nn.Module = copy.deepcopy(model, exchanged)
        except Exception as error:  # of the user's own code, or of PyTorch about it
            raise ModelError(f"the model cannot be copied for a thread: {error}") from error
        scripts = [m for m in self.model.modules() if isinstance(m, torch.jit.ScriptModule)]
        if scripts:  # they copy what they have themselves
            for tensor in (t for m in scripts for t in (*m.parameters(), *m.buffers()) if t.is_floating_point()):
                tensor.data = tensor.data.to(dtype)
            found = dict(self.model.named_parameters())
            self._parameters = [found[name] for name in trained]
        self.index = {id(p): i for i, p in enumerate(self._parameters)}
        self.table, self._loss, self.dtype = table, loss, dtype
        self.device = self._parameters[0].device
        self._memo: Memo | None = None
        self._looked_for_prefix = not frozen
        self._buffers: list[Tensor] = []
        self._bits: list[Array] = []
        self._seen = set[int]()
        self._writes: bool | None = None  # on its inputs; known from the first pass on

    # the three ways

    def copies(self, point: Point, part: Perturbations, chunks: Sequence[Chunk], budget: int) -> Iterator[Tensor]:
        """Losses [examples] of each pass; weights are written into buffers that the model's parameters are."""
        self._fill_parameters(point)
        for evaluated in point.passes(part, budget):
            self._fill(evaluated)
            yield torch.cat([self.forward(c.x, c.y)[1] for c in self.remembering(chunks)])

    def streaming(self, point: Point, part: Perturbations, chunks: Sequence[Chunk], budget: int) -> Iterator[Tensor]:
        """The same; weights are made where they are used."""
        for evaluated in point.passes(part, budget):
            yield torch.cat([self.streamed(point, evaluated, c) for c in chunks])
            self.require_seen()

    def evaluate(self, point: Point, chunks: Sequence[Chunk], in_buffers: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """Outputs and losses of each chunk under unperturbed weights."""
        plain = point.unperturbed
        if not in_buffers:
            with Exchange(self.index, partial(self.written, point, plain)):
                yield from [self.forward(c.x, c.y) for c in chunks]
            self.require_seen()
            return
        self._fill_parameters(point)
        self._fill(plain)
        yield from [self.forward(c.x, c.y) for c in chunks]

    def outputs(self, point: Point, x: Tensor) -> object:
        """What the model makes of inputs under unperturbed weights."""
        plain = point.unperturbed
        with Exchange(self.index, partial(self.written, point, plain)):
            return self._called(x)

    # what they have in common

    def streamed(self, point: Point, evaluated: Pass, chunk: Chunk) -> Tensor:
        """Losses [examples] of one pass, whose weights are made where they are used."""
        with Exchange(self.index, partial(self.written, point, evaluated)):
            return self.forward(chunk.x, chunk.y)[1]

    def plain(self, point: Point, tensor: int) -> Tensor:
        """A tensor's unperturbed weights in memory of their own."""
        return self.written(point, point.unperturbed, tensor)

    def written(self, point: Point, evaluated: Pass, tensor: int) -> Tensor:
        """A tensor's perturbed weights in memory of their own."""
        made, view = self.memory(point.slots[tensor], tensor)
        evaluated.write(tensor, as_bits(made))
        self._seen.add(tensor)
        return view.to(self.device)

    def memory(self, slot: Slot, tensor: int, *lead: int) -> tuple[Tensor, Tensor]:
        """Memory of a slot, as many times as ``lead`` says, and it as the tensor that the model sees."""
        shape = self.table[tensor].shape
        axes = slot.axes or tuple(range(len(shape)))
        made = torch.empty([*lead, *[shape[a] for a in axes]], dtype=self.dtype)
        if slot.axes is None:
            return made, made
        return made, made.permute([*range(len(lead)), *[len(lead) + axes.index(d) for d in range(len(shape))]])

    def _fill_parameters(self, point: Point) -> None:
        """Give the parameters memory, once."""
        if self._bits:
            return
        for i, p in enumerate(self._parameters):
            made, view = self.memory(point.slots[i], i)
            self._bits.append(as_bits(made))
            self._buffers.append(view)
            p.data = view if self.device.type == "cpu" else view.to(self.device)

    def require_seen(self) -> None:
        """A tensor whose use is hidden from Python would never be perturbed."""
        if missing := [spec.name for i, spec in enumerate(self.table) if i not in self._seen]:
            raise ModelError(
                f"{missing[0]}: no function was seen to use it (does TorchScript?): expected strategy copies"
            )

    def _fill(self, evaluated: Pass) -> None:
        """Write a pass's weights into the buffers, and bring them to the device."""
        for i, bits in enumerate(self._bits):
            evaluated.write(i, bits)
        if self.device.type != "cpu":
            for p, host in zip(self._parameters, self._buffers, strict=True):
                p.data.copy_(host)

    def remembering(self, chunks: Sequence[Chunk]) -> Iterator[Chunk]:
        """The chunks of the batch, for passes that may take what the frozen beginning made of them before."""
        for number, chunk in enumerate(chunks):
            if self._memo is not None:
                self._memo.at(number)
            yield chunk
        if self._memo is not None:
            self._memo.at(None)

    def start(self, chunks: Sequence[Chunk], most: int) -> None:
        """A new batch: what is frozen at the beginning of the model is evaluated once for it, and kept within so many
        bytes."""
        if not self._looked_for_prefix:
            self._looked_for_prefix = True
            self._memo = memoise_frozen_prefix(self.model, self.index, self._cast(chunks[0].x[:1]))
        if self._memo is not None:
            self._memo.start(most)

    def finish(self) -> None:
        """Let go of what was kept for the batch."""
        if self._memo is not None:
            self._memo.start()

    def _cast(self, x: Tensor) -> Tensor:
        return x.to(self.dtype) if x.is_floating_point() else x

    def _called(self, x: Tensor) -> Any:
        """What the model makes of inputs, which it may write on; whatever it raises is told."""
        given = self._cast(x)
        if given is x and self._writes is not False:
            with torch.inference_mode(False):  # where writes are counted
                given = x.clone()
        try:
            output = self.model(given)
            if self._writes is None and not given.is_inference():
                self._writes = given._version > 0
            return output
        except NotStackable:
            raise
        except Exception as error:  # of the user's own code
            raise ModelError(f"the model failed on inputs {tuple(x.shape)} of {x.dtype}: {error}") from error

    def forward(
        self, x: Tensor, y: Tensor, mode: AbstractContextManager[Any] | None = None, passes: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Outputs and losses, one an example, or one an example and pass of a stack."""
        with mode or nullcontext():
            output = self._called(x)
        if not isinstance(output, Tensor):
            raise ModelError(f"the model gives a {type(output).__name__}: expected one tensor of outputs")
        if passes > 1:
            if len(output) != passes * len(x):
                raise NotStackable(f"outputs {tuple(output.shape)} of {passes} x {len(x)} examples")
            y = y.repeat(passes, *[1] * (y.ndim - 1))
        output = output if self.dtype is torch.float32 else output.float()
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


def slots_of(table: Table, dtype: torch.dtype, channels_last: bool) -> list[Slot]:
    """How the kernels want each tensor."""
    kind = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    return [
        Slot(kind, CHANNELS_LAST if channels_last and len(spec.shape) == 4 and math.prod(spec.shape) else None)  # type: ignore[arg-type]
        for spec in table
    ]
