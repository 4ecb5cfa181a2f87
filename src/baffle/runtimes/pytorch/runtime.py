"""Forward passes of any ``torch.nn.Module``, without ever building an autograd graph.

Each thread has a replica of the model (``baffle.runtimes.pytorch.replica``); the model that was handed over, its
buffers and its frozen parameters stay untouched.

Convolutions are fastest with channels last: four-dimensional weights and inputs are laid out so, if the model
stands it (one that calls ``view`` on a convolution's output does not).

On the CPU there is a replica a core and every pass runs on one thread: passes side by side share nothing, wait for
nobody (threads inside a pass spin while they wait). By copies a loss has the same bits whatever the number of
threads; a stack has as many directions as a thread is given, and streaming cuts a batch the more, the more threads
there are, so there they may differ in the last ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from threading import Lock
from typing import TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from baffle.core.checks import require_count
from baffle.core.cores import cores
from baffle.core.types import Array, Losses, Masks, Table, Weights, make_table, table_size
from baffle.data import Dataset
from baffle.errors import MissingExtraError, ModelError, require_choice
from baffle.runtimes import Evaluation
from baffle.runtimes.choose import STRATEGIES as STRATEGIES
from baffle.runtimes.lanes import Lane, side_by_side
from baffle.runtimes.onnx.bundle import require_precision
from baffle.runtimes.perturb import BUDGET, Perturbations, Point, Slot, unperturbed
from baffle.runtimes.pytorch.allocator import give_back_freed_memory, keep_freed_memory

try:
    import torch
    from torch import Tensor, nn
except ImportError as error:
    raise MissingExtraError("PyTorch is not installed: pip install 'baffle[torch]'") from error

from baffle.runtimes.pytorch.budget import Sizes, activation_bytes, weight_bytes, within
from baffle.runtimes.pytorch.module_checks import check_modules, frozen_sha256
from baffle.runtimes.pytorch.module_checks import per_example as per_example
from baffle.runtimes.pytorch.replica import LOOSE, Chunk, Replica, frozen_tensors, slots_of, stack_losses
from baffle.runtimes.pytorch.stack import NotStackable
from baffle.runtimes.pytorch.stacked import Stacks
from baffle.runtimes.pytorch.threads import one_thread

_ACTIVATIONS = 2**23  # bytes of activations of one forward pass: larger batches are cut
_STACKED_ROWS = 2**12  # examples times directions that go through the model at once
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Hits: TypeAlias = npt.NDArray[np.bool_]
Result = TypeVar("Result")


class TorchRuntime:
    """Losses of a PyTorch model under perturbed weights.

    ``loss(output, target)`` must give one number an example; the losses of ``torch.nn.functional`` and
    ``torch.nn`` are switched to ``reduction="none"``. ``precision`` is that in which the model computes, fp32, bf16
    or fp16; the loss is taken in float32. ``masks`` say where entries of pruned tensors were kept. ``threads`` is the
    number of passes evaluated side by side on a CPU, by default one a core.

    ``strategy``: "copies" writes all perturbed weights into buffers; "stacked" evaluates several directions in one
    batch, linear layers by the rank-1 form; "streaming" makes a layer's perturbed weight just before it runs.
    ``memory`` bounds the bytes that an evaluation adds to the model: examples, and directions of a stack, evaluated
    at once.

    Raises ModelError for BatchNorm or dropout in training mode, for trainable parameters that are not float32, and
    if there are none, or one is on the device meta; PlanError if ``memory`` is too small for one example.

    Examples:
        >>> import torch.nn.functional as F
        >>> from baffle.data import load
        >>> train, _ = load("digits")
        >>> runtime = TorchRuntime(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), F.cross_entropy)
        >>> [p.name for p in runtime.table], runtime.evaluate(runtime.initial_weights(), train).losses.shape
        (['1.weight', '1.bias'], (1438,))
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[..., Tensor],
        threads: int | None = None,
        *,
        precision: str = "fp32",
        masks: Masks | None = None,
        strategy: str = "copies",
        memory: int | None = None,
    ) -> None:
        require_precision(precision, "torch", tuple(_DTYPES))
        require_choice("strategy", strategy, STRATEGIES)
        check_modules(model)
        if threads is not None:
            require_count("threads", threads, 1, 1024)
        if memory is not None:
            require_count("memory", memory)
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        for name, p in trainable.items():
            if p.dtype != torch.float32:
                raise ModelError(f"{name}: dtype {p.dtype}: expected float32; convert it, or freeze it")
        if not trainable:
            raise ModelError("the model has no trainable parameter: expected at least one with requires_grad=True")
        self._table = make_table({name: tuple(p.shape) for name, p in trainable.items()}, masks)
        self._initial: Weights = np.empty(table_size(self._table), np.float32)
        for spec, p in zip(self._table, trainable.values(), strict=True):
            self._initial[spec.slice] = p.detach().cpu().reshape(-1).numpy()
            if spec.mask is not None:
                self._initial[spec.slice][~spec.mask] = 0
        self._precision, self._strategy, self._memory = precision, strategy, memory
        self._dtype, self._frozen = _DTYPES[precision], frozen_sha256(model)
        self._device = next(iter(trainable.values())).device
        on_cpu = self._device.type == "cpu"
        if on_cpu:
            small = strategy == "streaming" or memory is not None
            (give_back_freed_memory if small else keep_freed_memory)()
        count = (threads or cores()) if on_cpu else 1
        each, frozen = per_example(loss), frozen_tensors(model, self._dtype)
        self._replicas = tuple(Replica(model, self._table, each, self._dtype, frozen) for _ in range(count))
        self._stacks = {replica: Stacks(replica) for replica in self._replicas}
        self._channels_last: bool | None = None  # known from the first images on
        self._sizes: dict[tuple[int, ...], Sizes] = {}
        self._trying = Lock()

    @property
    def table(self) -> Table:
        """The trainable tensors, in ``named_parameters`` order."""
        return self._table

    @property
    def lanes(self) -> tuple[Lane[Replica], ...]:
        """The runtime one thread at a time: each evaluates losses alone, and all may do so at once."""
        return tuple(Lane(self.losses_on, r) for r in self._replicas)  # not kept: lanes have the runtime

    @property
    def plan(self) -> dict[str, str | int]:
        """How passes are evaluated."""
        frozen: dict[str, str | int] = {"frozen": self._frozen} if self._frozen else {}
        budget: dict[str, str | int] = {} if self._memory is None else {"memory": self._memory}
        return (
            frozen
            | budget
            | {
                "runtime": "torch",
                "torch": str(torch.__version__),
                "device": str(self._device),
                "precision": self._precision,
                "strategy": self._strategy,
                "activations": _ACTIVATIONS,
                "threads": len(self._replicas),
            }
        )

    def initial_weights(self) -> Weights:
        """The model's weights when the runtime was made: float32[n]."""
        return self._initial.copy()

    def losses(self, weights: Weights, perturbations: Perturbations, batch: Dataset) -> Losses:
        """Losses of every pass: float32[passes, examples]."""
        return self.losses_on(self.lanes, weights, perturbations, batch)

    def losses_on(
        self, lanes: Sequence[Lane[Replica]], weights: Weights, perturbations: Perturbations, batch: Dataset
    ) -> Losses:
        """Losses of every pass, shared by some lanes: float32[passes, examples]."""
        together = len(perturbations.steps) if self._strategy == "stacked" else 1
        sizes, chunks = self._prepare(batch, lanes[0].worker, together)
        point = Point(perturbations, weights, self._slots(), select=self._strategy != "streaming")
        parts = perturbations.split(len(lanes))

        def run(i: int) -> Losses:
            replica, part = lanes[i].worker, parts[i]
            replica.start(chunks, sizes.kept)
            try:
                if self._strategy == "copies":
                    rows = replica.copies(point, part, chunks, sizes.directions)
                elif self._strategy == "streaming":
                    rows = replica.streaming(point, part, chunks, sizes.directions)
                else:
                    rows = self._stacks[replica].losses(point, part, chunks, sizes.directions, sizes.rows)
                return stack_losses(rows, len(part), len(batch), self._device)
            except NotStackable as error:
                raise ModelError(f"strategy stacked: {error}: expected copies or streaming for this model") from error
            finally:
                replica.finish()

        return np.concatenate(self._run(run, len(parts)))

    def evaluate(self, weights: Weights, data: Dataset) -> Evaluation:
        """Losses, and hits of the largest output where targets are integer labels of a 2-D output."""
        _, chunks = self._prepare(data, self._replicas[0])
        none = unperturbed(self._table)
        point = Point(none, weights, self._slots())
        parts = [list(p) for p in np.array_split(np.arange(len(chunks)), len(self._replicas)) if len(p)]

        def run(i: int) -> list[tuple[Losses, Hits | None]]:
            mine = [chunks[c] for c in parts[i]]
            found = self._replicas[i].evaluate(point, mine, self._strategy == "copies")
            return [_judged(output, loss, chunk.y) for (output, loss), chunk in zip(found, mine, strict=True)]

        losses, correct = zip(*itertools.chain.from_iterable(self._run(run, len(parts))), strict=True)
        hits = [c for c in correct if c is not None]
        return Evaluation(np.concatenate(losses), np.concatenate(hits) if len(hits) == len(losses) else None)

    def _run(self, work: Callable[[int], Result], parts: int) -> list[Result]:
        """Do part i on one thread of its own, which PyTorch's kernels do not leave."""

        def call(i: int) -> Result:
            with torch.inference_mode(), one_thread(self._device.type == "cpu"):
                return work(i)

        with one_thread(self._device.type == "cpu"):
            return side_by_side(call, parts)

    def _slots(self) -> list[Slot]:
        return slots_of(self._table, self._dtype, bool(self._channels_last))

    def _prepare(self, batch: Dataset, replica: Replica, together: int = 1) -> tuple[Sizes, list[Chunk]]:
        """How much to evaluate at once, and the batch cut so that as many passes together fit, laid out as the
        kernels like it."""
        batch.require_examples()
        x, y = to_tensors(batch, self._device)
        shape = tuple(x.shape[1:])
        with self._trying:
            if x.ndim == 4 and x.is_floating_point() and self._takes_channels_last(shape, replica):
                x = x.contiguous(memory_format=torch.channels_last)
            if shape not in self._sizes:
                self._sizes[shape] = self._choose_sizes(x[:1], replica)
            sizes = self._sizes[shape]
        examples = min(sizes.examples, max(1, sizes.rows // max(1, together)))
        cut = [slice(s, s + examples) for s in range(0, len(x), examples)]
        return sizes, [Chunk(x[part], y[part]) for part in cut]

    def _choose_sizes(self, x: Tensor, replica: Replica) -> Sizes:
        point = Point(unperturbed(self._table), self._initial, self._slots())
        an_example = self._run(lambda _: activation_bytes(replica, point, x), 1)[0]
        examples = max(16, min(128, _ACTIVATIONS // an_example))
        usual = Sizes(examples, _STACKED_ROWS if self._strategy == "stacked" else examples, BUDGET)
        if self._strategy == "streaming":  # all lanes together need the activations of one
            share = -(-examples // len(self._replicas))
            usual = Sizes(share, share, BUDGET // 16)
        if self._memory is None:
            return usual
        weights = weight_bytes(self._table, self._dtype.itemsize, self._strategy)
        return within(self._memory // len(self._replicas), usual, an_example, weights)

    def _takes_channels_last(self, shape: Sequence[int], replica: Replica) -> bool:
        """Whether the model has convolutions and computes the same with channels last; tried once."""
        if self._channels_last is None:
            none = unperturbed(self._table)

            def outputs(x: Tensor, layout: torch.memory_format) -> object:
                last = layout is torch.channels_last
                return replica.outputs(Point(none, self._initial, slots_of(self._table, self._dtype, last)), x)

            self._channels_last = any(len(spec.shape) == 4 for spec in self._table) and takes_channels_last(
                outputs, shape, self._device
            )
        return self._channels_last


def _judged(output: Tensor, loss: Tensor, y: Tensor) -> tuple[Losses, Hits | None]:
    """Losses, and where the largest output is the label."""
    labels = output.ndim == 2 and y.ndim == 1 and not y.is_floating_point()
    return loss.cpu().numpy(), (output.argmax(dim=1) == y).cpu().numpy() if labels else None


def load_into(model: nn.Module, table: Table, weights: Weights) -> None:
    """Copy flat weights into the trainable parameters of a model with the same table."""
    trainable = trainable_parameters(model)
    found = [(name, tuple(p.shape)) for name, p in trainable]
    expected = [(spec.name, spec.shape) for spec in table]
    if found != expected:
        raise ModelError(f"trainable parameters {found}: expected {expected}")
    with torch.no_grad():
        for spec, (_, p) in zip(table, trainable, strict=True):
            p.copy_(torch.from_numpy(weights[spec.slice].copy()).view(spec.shape))


def to_tensors(batch: Dataset, device: torch.device) -> tuple[Tensor, Tensor]:
    """Inputs and targets as tensors of their own, with the usual strides (numpy's, where a size is 1, are any).

    In memory of PyTorch's, which starts at a multiple of 64 bytes: some kernels add in another order where it does not.
    """

    def own(array: Array) -> Tensor:
        made = torch.empty(array.shape, dtype=torch.from_numpy(array[:0]).dtype, device=device)
        return made.copy_(torch.from_numpy(np.ascontiguousarray(array)))

    return own(batch.inputs()), own(batch.y)


def takes_channels_last(
    outputs: Callable[[Tensor, torch.memory_format], object], shape: Sequence[int], device: torch.device
) -> bool:
    """Whether a model gives the same outputs for images with channels last: tried on two that never change."""
    usual = torch.randn((2, *shape), generator=torch.Generator().manual_seed(0)).to(device)
    last = usual.contiguous(memory_format=torch.channels_last)
    try:
        with torch.inference_mode():
            a, b = outputs(usual, torch.contiguous_format), outputs(last, torch.channels_last)
            if not isinstance(a, Tensor) or not isinstance(b, Tensor):
                return False
            loose = LOOSE.get(a.dtype, LOOSE[torch.float32])
            return torch.allclose(a, b, max(loose, 1e-3), loose, equal_nan=True)
    except Exception:  # a model may raise anything; what is wrong in any layout is told when it trains
        return False


def trainable_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Names and parameters that are trained, in ``named_parameters`` order."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]
