"""A copy of the model for one thread, and three strategies to evaluate it under perturbed weights.

* ``copies`` (materialised): every trained tensor has a buffer that the kernels read, and a pass first writes them all;
* ``streaming`` (layer-wise): a layer's perturbed weight is made just before the layer runs and freed after it, so that
  a pass needs the memory of an inference and of one layer's weight;
* ``stacked`` (batched over directions): several directions in one batch (``baffle.runtimes.pytorch.stacked``).
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
from baffle.runtimes.perturb import AnyArray, Layout, Pass, Perturbations, Point
from baffle.runtimes.pytorch.frozen_prefix import Memo, memoise_frozen_prefix
from baffle.runtimes.pytorch.intercept import Substitution
from baffle.runtimes.pytorch.stack import NotStackable

CHANNELS_LAST = (0, 2, 3, 1)
_BITS = {torch.float32: torch.float32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
LOOSE = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 1e-2}
"""Tolerance between results of the same function computed in two ways; those of different functions differ by more."""
_WORDS = {torch.float32: np.float32, torch.bfloat16: np.uint16, torch.float16: np.uint16}


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Examples of a batch that go through the model together: inputs and targets."""

    x: Tensor
    y: Tensor


class Replica:
    """One thread's copy of a model.

    Args:
        model: The model to copy; never changed.
        table: Its trainable tensors.
        loss: ``loss(output, target)`` gives one number per example.
        dtype: What the copy computes in.
        frozen: The frozen tensors, which all replicas share, by the ``id`` of the model's own.

    Raises:
        ModelError: If the model cannot be copied.
    """

    def __init__(
        self, model: nn.Module, table: Table, loss: Callable[..., Tensor], dtype: torch.dtype, frozen: dict[int, Tensor]
    ) -> None:
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        # one number each, expanded to the shape: only the strategy copies gives them memory (_fill_parameters)
        self._parameters = [
            nn.Parameter(torch.zeros((), dtype=dtype, device=p.device).expand(p.shape), requires_grad=False)
            for p in trained.values()
        ]
        instead: dict[int, Any] = dict(frozen)
        instead |= {id(b): b.to(dtype, copy=True) if b.is_floating_point() else b.clone() for b in model.buffers()}
        instead |= {id(p): own for p, own in zip(trained.values(), self._parameters, strict=True)}
        try:
            with torch.no_grad():
                self.model: nn.Module = copy.deepcopy(model, instead)
        except Exception as error:  # from the user's own code, or from PyTorch about it
            raise ModelError(f"the model cannot be copied for a thread: {error}") from error
        scripts = [m for m in self.model.modules() if isinstance(m, torch.jit.ScriptModule)]
        if scripts:  # TorchScript copies its own tensors and ignores the ones given to deepcopy
            for tensor in (t for m in scripts for t in (*m.parameters(), *m.buffers()) if t.is_floating_point()):
                tensor.data = tensor.data.to(dtype)
            copied = dict(self.model.named_parameters())
            self._parameters = [copied[name] for name in trained]
        self.index = {id(p): i for i, p in enumerate(self._parameters)}
        self.table, self._loss, self.dtype = table, loss, dtype
        self.device = self._parameters[0].device
        self._memo: Memo | None = None
        self._looked_for_prefix = not frozen
        self._buffers: list[Tensor] = []
        self._bits: list[AnyArray] = []
        self._seen = set[int]()
        self._writes: bool | None = None  # whether the model writes to its inputs; known after the first pass

    # the strategies

    def copies(self, point: Point, part: Perturbations, batches: Sequence[MicroBatch], budget: int) -> Iterator[Tensor]:
        """Losses [examples] of each pass; weights are written into buffers that are the model's parameters."""
        self._fill_parameters(point)
        for evaluated in point.passes(part, budget):
            self._fill(evaluated)
            yield torch.cat([self.forward(c.x, c.y)[1] for c in self.remembering(batches)])

    def streaming(
        self, point: Point, part: Perturbations, batches: Sequence[MicroBatch], budget: int
    ) -> Iterator[Tensor]:
        """Losses [examples] of each pass; each weight is made just before the function that reads it."""
        for evaluated in point.passes(part, budget):
            yield torch.cat([self.streamed(point, evaluated, c) for c in batches])
            self.require_seen()

    def evaluate(
        self, point: Point, batches: Sequence[MicroBatch], in_buffers: bool
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Outputs and losses of each micro-batch under unperturbed weights."""
        plain = point.unperturbed
        if not in_buffers:
            with Substitution(self.index, partial(self.written, point, plain)):
                yield from [self.forward(c.x, c.y) for c in batches]
            self.require_seen()
            return
        self._fill_parameters(point)
        self._fill(plain)
        yield from [self.forward(c.x, c.y) for c in batches]

    def outputs(self, point: Point, x: Tensor) -> object:
        """The model's output under unperturbed weights."""
        plain = point.unperturbed
        with Substitution(self.index, partial(self.written, point, plain)):
            return self._called(x)

    # common parts

    def streamed(self, point: Point, evaluated: Pass, micro_batch: MicroBatch) -> Tensor:
        """Losses [examples] of one pass, each weight made just before the function that reads it."""
        with Substitution(self.index, partial(self.written, point, evaluated)):
            return self.forward(micro_batch.x, micro_batch.y)[1]

    def plain(self, point: Point, tensor: int) -> Tensor:
        """A tensor's unperturbed weights in newly allocated memory."""
        return self.written(point, point.unperturbed, tensor)

    def written(self, point: Point, evaluated: Pass, tensor: int) -> Tensor:
        """A tensor's perturbed weights in newly allocated memory."""
        made, view = self.memory(point.layouts[tensor], tensor)
        evaluated.write(tensor, as_bits(made))
        self._seen.add(tensor)
        return view.to(self.device)

    def memory(self, layout: Layout, tensor: int, *lead: int) -> tuple[Tensor, Tensor]:
        """Allocate memory for a tensor [*lead, *shape] in a layout: (that memory, its view in the tensor's shape)."""
        shape = self.table[tensor].shape
        axes = layout.axes or tuple(range(len(shape)))
        made = torch.empty([*lead, *[shape[a] for a in axes]], dtype=self.dtype)
        if layout.axes is None:
            return made, made
        return made, made.permute([*range(len(lead)), *[len(lead) + axes.index(d) for d in range(len(shape))]])

    def _fill_parameters(self, point: Point) -> None:
        """Allocate memory for the parameters, once."""
        if self._bits:
            return
        for i, p in enumerate(self._parameters):
            made, view = self.memory(point.layouts[i], i)
            self._bits.append(as_bits(made))
            self._buffers.append(view)
            p.data = view if self.device.type == "cpu" else view.to(self.device)

    def require_seen(self) -> None:
        """Raise ModelError if a tensor was never read visibly: hidden from Python it would never be perturbed."""
        if missing := [spec.name for i, spec in enumerate(self.table) if i not in self._seen]:
            raise ModelError(
                f"{missing[0]}: no function was seen to use it (does TorchScript?): expected strategy copies"
            )

    def _fill(self, evaluated: Pass) -> None:
        """Write a pass's weights into the buffers, and copy them to the device."""
        for i, bits in enumerate(self._bits):
            evaluated.write(i, bits)
        if self.device.type != "cpu":
            for p, host in zip(self._parameters, self._buffers, strict=True):
                p.data.copy_(host)

    def remembering(self, batches: Sequence[MicroBatch]) -> Iterator[MicroBatch]:
        """Iterate over the micro-batches of the batch, with cached outputs of the frozen prefix."""
        for number, micro_batch in enumerate(batches):
            if self._memo is not None:
                self._memo.at(number)
            yield micro_batch
        if self._memo is not None:
            self._memo.at(None)

    def start(self, batches: Sequence[MicroBatch], most: int) -> None:
        """Start a new batch, for which at most ``most`` bytes of the frozen prefix's outputs are cached."""
        if not self._looked_for_prefix:
            self._looked_for_prefix = True
            self._memo = memoise_frozen_prefix(self.model, self.index, self._cast(batches[0].x[:1]))
        if self._memo is not None:
            self._memo.start(most)

    def finish(self) -> None:
        """Free what is cached for the batch."""
        if self._memo is not None:
            self._memo.start()

    def _cast(self, x: Tensor) -> Tensor:
        return x.to(self.dtype) if x.is_floating_point() else x

    def _called(self, x: Tensor) -> Any:
        """The model's output; inputs are copied if it may write to them, and its errors become ModelError."""
        inputs = self._cast(x)
        if inputs is x and self._writes is not False:
            with torch.inference_mode(False):  # inference tensors do not count the writes to them
                inputs = x.clone()
        try:
            output = self.model(inputs)
            if self._writes is None and not inputs.is_inference():
                self._writes = inputs._version > 0
            return output
        except NotStackable:
            raise
        except Exception as error:  # from the user's own code
            raise ModelError(f"the model failed on inputs {tuple(x.shape)} of {x.dtype}: {error}") from error

    def forward(
        self, x: Tensor, y: Tensor, mode: AbstractContextManager[Any] | None = None, passes: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Outputs, and losses [examples], or of a stack of several passes [passes * examples].

        ``mode`` intercepts the model's functions, but not those of the loss.
        """
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
                f"the loss has shape {tuple(loss.shape)} for {passes * len(x)} examples: expected one number per "
                "example (reduction='none', averaged over any further dimension)"
            )
        return output, loss.to(torch.float32)


def as_bits(made: Tensor) -> AnyArray:
    """A tensor's memory as a numpy array; 16-bit floats as their bits, since numpy has no bfloat16."""
    return made.view(_BITS[made.dtype]).numpy().view(_WORDS[made.dtype])


def frozen_tensors(model: nn.Module, dtype: torch.dtype) -> dict[int, Tensor]:
    """Parameters that are not trained, in the given precision, by their ``id``."""
    frozen: dict[int, Tensor] = {}
    for p in model.parameters():
        if not p.requires_grad:
            same = dtype is torch.float32 or not p.is_floating_point()
            frozen[id(p)] = p if same else nn.Parameter(p.detach().to(dtype), requires_grad=False)
    return frozen


def stack_losses(rows: Iterator[Tensor], passes: int, examples: int, device: torch.device) -> Losses:
    """Collect the losses [examples] of all passes in one array: float32[passes, examples]."""
    out = torch.empty((passes, examples), dtype=torch.float32, device=device)
    for row, losses in zip(out, rows, strict=True):
        row.copy_(losses)
    return np.asarray(out.cpu().numpy())


def layouts_of(table: Table, dtype: torch.dtype, channels_last: bool) -> list[Layout]:
    """The layout that PyTorch's kernels expect for each tensor."""
    kind = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    return [
        Layout(kind, CHANNELS_LAST if channels_last and len(spec.shape) == 4 and math.prod(spec.shape) else None)  # type: ignore[arg-type]
        for spec in table
    ]
