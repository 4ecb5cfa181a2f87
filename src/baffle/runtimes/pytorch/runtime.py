"""Forward passes of any ``torch.nn.Module``, without ever building an autograd graph.

Each thread has a replica of the model (``baffle.runtimes.pytorch.replica``); the caller's model, its buffers and its
frozen parameters are never changed.

Convolutions are fastest in the channels-last memory format: four-dimensional weights and inputs are laid out so, if
the model tolerates it (one that calls ``view`` on a convolution's output does not).

On the CPU there is one replica per core, and every pass runs on one thread: passes side by side share nothing and
never wait for each other (PyTorch's threads inside a pass spin while they wait). With strategy ``copies`` a loss has
the same bits whatever the number of threads. The size of a stack and, with ``streaming``, of a micro-batch depends on
the number of threads, so there losses may differ in their last bits.
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
from baffle.runtimes.perturb import BUDGET, Layout, Perturbations, Point, unperturbed
from baffle.runtimes.pytorch.allocator import give_back_freed_memory, keep_freed_memory

try:
    import torch
    from torch import Tensor, nn
except ImportError as error:
    raise MissingExtraError("PyTorch is not installed: pip install 'baffle[torch]'") from error

from baffle.runtimes.pytorch.budget import Sizes, activation_bytes, weight_bytes, within
from baffle.runtimes.pytorch.module_checks import check_modules, frozen_sha256
from baffle.runtimes.pytorch.module_checks import per_example as per_example
from baffle.runtimes.pytorch.replica import LOOSE, MicroBatch, Replica, frozen_tensors, layouts_of, stack_losses
from baffle.runtimes.pytorch.stack import NotStackable
from baffle.runtimes.pytorch.stacked import Stacks
from baffle.runtimes.pytorch.threads import one_thread

_ACTIVATIONS = 2**23  # bytes of activations of one forward pass: larger batches are cut into micro-batches
_STACKED_ROWS = 2**12  # examples times passes that go through the model together as a stack
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Correct: TypeAlias = npt.NDArray[np.bool_]
Result = TypeVar("Result")


class TorchRuntime:
    """Evaluates the losses of a PyTorch model under perturbed weights.

    Args:
        model: Any module. Its parameters with ``requires_grad`` are perturbed and trained; they must be float32. The
            module itself is never changed.
        loss: ``loss(output, target)`` must give one number per example, float[examples]. The losses of
            ``torch.nn.functional`` and ``torch.nn`` are switched to ``reduction="none"``.
        threads: How many passes are evaluated side by side on a CPU; None for one per core. On a GPU it is 1.
        precision: What the model computes in: ``fp32``, ``bf16`` or ``fp16``. The loss is computed in float32.
        masks: Pruning masks, bool arrays by the names of the tensors: True where an entry was kept.
        strategy: How perturbed weights are evaluated:

            * ``copies`` (materialised weights): each pass writes all of its perturbed weights into buffers;
            * ``stacked`` (batched over directions, as ``vmap`` does): several directions in one batch, linear layers
              by the rank-1 form, so that no perturbed weight is written;
            * ``streaming`` (layer-wise): a layer's perturbed weight is made just before the layer runs and freed
              after it, which needs the least memory.
        memory: Upper limit in bytes of what an evaluation adds to the model's own memory. It bounds how many
            examples, and how many directions of a stack, are evaluated at once. None for sizes that favour speed.

    Raises:
        ModelError: For BatchNorm or dropout in training mode; for trainable parameters that are not float32, or if
            there are none; and for tensors on the device ``meta``.
        PlanError: While evaluating, if ``memory`` is too small for one example.
        OptionError: If an option is out of range.

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
        self._channels_last: bool | None = None  # whether the model tolerates it; known after the first images
        self._sizes: dict[tuple[int, ...], Sizes] = {}
        self._trying = Lock()

    @property
    def table(self) -> Table:
        """The trainable tensors, in ``named_parameters`` order."""
        return self._table

    @property
    def lanes(self) -> tuple[Lane[Replica], ...]:
        """The runtime divided into threads: each lane evaluates losses alone, and all may do so at the same time."""
        # made on each access: if the runtime held them, it would be part of a reference cycle and freed late
        return tuple(Lane(self.losses_on, r) for r in self._replicas)

    @property
    def plan(self) -> dict[str, str | int]:
        """How passes are evaluated, as it is recorded with a run."""
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
        """The model's weights at the time the runtime was made: float32[n]."""
        return self._initial.copy()

    def losses(self, weights: Weights, perturbations: Perturbations, batch: Dataset) -> Losses:
        """Losses of every pass, divided among all lanes: float32[passes, examples]."""
        return self.losses_on(self.lanes, weights, perturbations, batch)

    def losses_on(
        self, lanes: Sequence[Lane[Replica]], weights: Weights, perturbations: Perturbations, batch: Dataset
    ) -> Losses:
        """Losses of every pass, divided among some lanes: float32[passes, examples]."""
        together = len(perturbations.steps) if self._strategy == "stacked" else 1
        sizes, batches = self._prepare(batch, lanes[0].replica, together)
        point = Point(perturbations, weights, self._layouts(), select=self._strategy != "streaming")
        parts = perturbations.split(len(lanes))

        def run(i: int) -> Losses:
            replica, part = lanes[i].replica, parts[i]
            replica.start(batches, sizes.kept)
            try:
                if self._strategy == "copies":
                    rows = replica.copies(point, part, batches, sizes.directions)
                elif self._strategy == "streaming":
                    rows = replica.streaming(point, part, batches, sizes.directions)
                else:
                    rows = self._stacks[replica].losses(point, part, batches, sizes.directions, sizes.rows)
                return stack_losses(rows, len(part), len(batch), self._device)
            except NotStackable as error:
                raise ModelError(f"strategy stacked: {error}: expected copies or streaming for this model") from error
            finally:
                replica.finish()

        return np.concatenate(self._run(run, len(parts)))

    def evaluate(self, weights: Weights, data: Dataset) -> Evaluation:
        """Losses and correct predictions of the unperturbed model on a whole data set.

        Predictions are the largest outputs, where outputs are [examples, classes] and targets integer labels.
        """
        _, batches = self._prepare(data, self._replicas[0])
        none = unperturbed(self._table)
        point = Point(none, weights, self._layouts())
        parts = [list(p) for p in np.array_split(np.arange(len(batches)), len(self._replicas)) if len(p)]

        def run(i: int) -> list[tuple[Losses, Correct | None]]:
            mine = [batches[c] for c in parts[i]]
            results = self._replicas[i].evaluate(point, mine, self._strategy == "copies")
            return [_judged(output, loss, batch.y) for (output, loss), batch in zip(results, mine, strict=True)]

        losses, correct = zip(*itertools.chain.from_iterable(self._run(run, len(parts))), strict=True)
        known = [c for c in correct if c is not None]
        return Evaluation(np.concatenate(losses), np.concatenate(known) if len(known) == len(losses) else None)

    def _run(self, work: Callable[[int], Result], parts: int) -> list[Result]:
        """Call ``work(i)`` for each part on a thread of its own, to which PyTorch's kernels are confined."""

        def call(i: int) -> Result:
            with torch.inference_mode(), one_thread(self._device.type == "cpu"):
                return work(i)

        with one_thread(self._device.type == "cpu"):
            return side_by_side(call, parts)

    def _layouts(self) -> list[Layout]:
        return layouts_of(self._table, self._dtype, bool(self._channels_last))

    def _prepare(self, batch: Dataset, replica: Replica, together: int = 1) -> tuple[Sizes, list[MicroBatch]]:
        """Decide how much to evaluate at once, and cut the batch into micro-batches laid out for the kernels.

        ``together`` is the least number of passes that go through the model at once.
        """
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
        return sizes, [MicroBatch(x[part], y[part]) for part in cut]

    def _choose_sizes(self, x: Tensor, replica: Replica) -> Sizes:
        point = Point(unperturbed(self._table), self._initial, self._layouts())
        an_example = self._run(lambda _: activation_bytes(replica, point, x), 1)[0]
        examples = max(16, min(128, _ACTIVATIONS // an_example))
        usual = Sizes(examples, _STACKED_ROWS if self._strategy == "stacked" else examples, BUDGET)
        if self._strategy == "streaming":  # all lanes together may use the activations of a single usual one
            share = -(-examples // len(self._replicas))
            usual = Sizes(share, share, BUDGET // 16)
        if self._memory is None:
            return usual
        weights = weight_bytes(self._table, self._dtype.itemsize, self._strategy)
        return within(self._memory // len(self._replicas), usual, an_example, weights)

    def _takes_channels_last(self, shape: Sequence[int], replica: Replica) -> bool:
        """Whether the model has convolutions and computes the same in the channels-last format; tried once."""
        if self._channels_last is None:
            none = unperturbed(self._table)

            def outputs(x: Tensor, memory_format: torch.memory_format) -> object:
                last = memory_format is torch.channels_last
                return replica.outputs(Point(none, self._initial, layouts_of(self._table, self._dtype, last)), x)

            self._channels_last = any(len(spec.shape) == 4 for spec in self._table) and takes_channels_last(
                outputs, shape, self._device
            )
        return self._channels_last


def _judged(output: Tensor, loss: Tensor, y: Tensor) -> tuple[Losses, Correct | None]:
    """Losses, and whether the largest output is the label, where there are labels."""
    labels = output.ndim == 2 and y.ndim == 1 and not y.is_floating_point()
    return loss.cpu().numpy(), (output.argmax(dim=1) == y).cpu().numpy() if labels else None


def load_into(model: nn.Module, table: Table, weights: Weights) -> None:
    """Copy flat weights into the trainable parameters of a model, in place.

    Args:
        model: The model to change.
        table: The tensors of ``weights``; the model's trainable parameters must have the same names and shapes.
        weights: float32[n].

    Raises:
        ModelError: If the model's trainable parameters are not those of the table.

    Examples:
        >>> model = nn.Linear(2, 1)
        >>> load_into(model, make_table({"weight": (1, 2), "bias": (1,)}), np.array([1, 2, 3], np.float32))
        >>> model.weight.tolist(), model.bias.tolist()
        ([[1.0, 2.0]], [3.0])
    """
    trainable = trainable_parameters(model)
    own = [(name, tuple(p.shape)) for name, p in trainable]
    expected = [(spec.name, spec.shape) for spec in table]
    if own != expected:
        raise ModelError(f"trainable parameters {own}: expected {expected}")
    with torch.no_grad():
        for spec, (_, p) in zip(table, trainable, strict=True):
            p.copy_(torch.from_numpy(weights[spec.slice].copy()).view(spec.shape))


def to_tensors(batch: Dataset, device: torch.device) -> tuple[Tensor, Tensor]:
    """Copy the inputs and targets of a batch into PyTorch's own memory, with contiguous strides.

    The copy makes losses reproducible: PyTorch's memory starts at a multiple of 64 bytes, and some kernels add in
    another order where memory does not. Strides are set anew because numpy's are arbitrary along dimensions of size 1.
    """

    def own(array: Array) -> Tensor:
        made = torch.empty(array.shape, dtype=torch.from_numpy(array[:0]).dtype, device=device)
        return made.copy_(torch.from_numpy(np.ascontiguousarray(array)))

    return own(batch.inputs()), own(batch.y)


def takes_channels_last(
    outputs: Callable[[Tensor, torch.memory_format], object], shape: Sequence[int], device: torch.device
) -> bool:
    """Whether a model gives the same outputs for images in the channels-last format; tried on two fixed images."""
    usual = torch.randn((2, *shape), generator=torch.Generator().manual_seed(0)).to(device)
    last = usual.contiguous(memory_format=torch.channels_last)
    try:
        with torch.inference_mode():
            a, b = outputs(usual, torch.contiguous_format), outputs(last, torch.channels_last)
            if not isinstance(a, Tensor) or not isinstance(b, Tensor):
                return False
            loose = LOOSE.get(a.dtype, LOOSE[torch.float32])
            return torch.allclose(a, b, max(loose, 1e-3), loose, equal_nan=True)
    except Exception:  # a model may raise anything; an error in every layout will be raised by the first pass
        return False


def trainable_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The trainable parameters with their names, in ``named_parameters`` order."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]
