"""Forward passes of any ``torch.nn.Module``, without ever building an autograd graph.

A replica is a copy of the model whose trainable parameters are views of one flat scratch buffer, so writing
perturbed weights into the buffer is all it takes to evaluate them. The model that was handed over, its buffers
and its frozen parameters stay untouched.

Convolutions are fastest with channels last: four-dimensional weights and inputs are laid out so, if the model
stands it (one that calls ``view`` on a convolution's output does not).

On the CPU there is a replica a core and every pass runs on one thread: passes side by side share nothing, wait for
nobody (threads inside a pass spin while they wait), and a loss has the same bits whatever
the number of threads.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from baffle.checks import require_count
from baffle.data import Dataset
from baffle.errors import MissingExtraError, ModelError
from baffle.perturb import Perturbations
from baffle.runtimes import Evaluation
from baffle.runtimes.bundle import require_precision
from baffle.runtimes.cores import cores
from baffle.types import Losses, Masks, Table, Weights, make_table, table_size

try:
    import torch
    from torch import Tensor, nn
    from torch.nn.modules.batchnorm import _BatchNorm
    from torch.nn.modules.dropout import _DropoutNd
    from torch.nn.modules.instancenorm import _InstanceNorm
except ImportError as error:
    raise MissingExtraError("PyTorch is not installed: pip install 'baffle[torch]'") from error

_CHUNK_INPUTS = 2**15  # numbers in the inputs of one forward pass, so that activations stay in the cache
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Chunk: TypeAlias = tuple[Tensor, Tensor]
Hits: TypeAlias = npt.NDArray[np.bool_]
Result = TypeVar("Result")


class TorchRuntime:
    """Losses of a PyTorch model under perturbed weights.

    ``loss(output, target)`` must give one number an example; the losses of ``torch.nn.functional`` and
    ``torch.nn`` are switched to ``reduction="none"``. ``precision`` is that in which the model computes, fp32, bf16
    or fp16; the loss is taken in float32. ``masks`` say where entries of pruned tensors were kept. ``threads`` is the
    number of passes evaluated side by side on a CPU, by default one a core. Raises ModelError for BatchNorm or
    dropout in training mode, for trainable parameters that are not float32, and if there are none.

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
    ) -> None:
        require_precision(precision, "torch", tuple(_DTYPES))
        _check_modules(model)
        if threads is not None:
            require_count("threads", threads, 1, 1024)
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        for name, p in trainable.items():
            if p.dtype != torch.float32:
                raise ModelError(f"{name}: dtype {p.dtype}: expected float32; convert it, or freeze it")
        if not trainable:
            raise ModelError("the model has no trainable parameter: expected at least one with requires_grad=True")
        self._loss = per_example(loss)
        self._table = make_table({name: tuple(p.shape) for name, p in trainable.items()}, masks)
        flat = [p.detach().to("cpu").reshape(-1) for p in trainable.values()]
        self._initial: Weights = torch.cat(flat).numpy().copy()
        for spec in self._table:
            if spec.mask is not None:
                self._initial[spec.slice][~spec.mask] = 0
        self._precision, self._frozen = precision, _frozen_sha256(model)
        self._device = next(iter(trainable.values())).device
        count = (threads or cores()) if self._device.type == "cpu" else 1
        self._replicas = [
            _Replica(model, self._table, self._loss, self._device, _DTYPES[precision]) for _ in range(count)
        ]
        self._channels_last: bool | None = None  # known from the first images on

    @property
    def table(self) -> Table:
        """The trainable tensors, in ``named_parameters`` order."""
        return self._table

    @property
    def plan(self) -> dict[str, str | int]:
        """How passes are evaluated."""
        frozen: dict[str, str | int] = {"frozen": self._frozen} if self._frozen else {}
        return frozen | {
            "runtime": "torch",
            "torch": str(torch.__version__),
            "device": str(self._device),
            "precision": self._precision,
            "chunk_inputs": _CHUNK_INPUTS,
            "threads": len(self._replicas),
        }

    def initial_weights(self) -> Weights:
        """The model's weights when the runtime was made: float32[n]."""
        return self._initial.copy()

    def losses(self, weights: Weights, perturbations: Perturbations, batch: Dataset) -> Losses:
        """Losses of every pass: float32[passes, examples]."""
        chunks = self._chunks(batch)
        parts = perturbations.split(len(self._replicas))
        return np.concatenate(self._run(lambda replica, i: replica.losses(weights, parts[i], chunks), len(parts)))

    def evaluate(self, weights: Weights, data: Dataset) -> Evaluation:
        """Losses, and hits of the largest output where targets are integer labels of a 2-D output."""
        chunks = self._chunks(data)
        parts = [list(p) for p in np.array_split(np.arange(len(chunks)), len(self._replicas)) if len(p)]
        done = self._run(lambda replica, i: replica.evaluate(weights, [chunks[c] for c in parts[i]]), len(parts))
        losses, correct = zip(*itertools.chain.from_iterable(done), strict=True)
        hits = [c for c in correct if c is not None]
        return Evaluation(np.concatenate(losses), np.concatenate(hits) if len(hits) == len(losses) else None)

    def _run(self, work: Callable[[_Replica, int], Result], parts: int) -> list[Result]:
        """Let replica i do part i, each on one thread of its own."""

        def call(i: int) -> Result:
            with torch.inference_mode():
                if self._device.type == "cpu":
                    torch.set_num_threads(1)
                return work(self._replicas[i], i)

        before = torch.get_num_threads()
        try:
            if parts == 1:
                return [call(0)]
            with ThreadPoolExecutor(parts) as pool:
                return list(pool.map(call, range(parts)))
        finally:
            torch.set_num_threads(before)

    def _chunks(self, batch: Dataset) -> list[Chunk]:
        x, y = to_tensors(batch, self._device)
        if x.ndim == 4 and x.is_floating_point() and self._takes_channels_last(x.shape[1:]):
            x = x.contiguous(memory_format=torch.channels_last)
        size = max(32, min(128, _CHUNK_INPUTS // max(1, x[:1].numel())))
        return [(x[s : s + size], y[s : s + size]) for s in range(0, len(x), size)]

    def _takes_channels_last(self, shape: Sequence[int]) -> bool:
        """Whether the model has convolutions and computes the same with channels last; tried once."""
        if self._channels_last is None:
            self._channels_last = any(len(spec.shape) == 4 for spec in self._table)
            if self._channels_last:
                outputs = partial(self._replicas[0].outputs, self._initial)
                self._channels_last = takes_channels_last(outputs, shape, self._device)
            layout = torch.channels_last if self._channels_last else torch.contiguous_format
            for replica in self._replicas:
                replica.lay_out(layout)
        return self._channels_last


class _Replica:
    """A copy of the model on a scratch buffer of its own."""

    def __init__(
        self,
        model: nn.Module,
        table: Table,
        loss: Callable[..., Tensor],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        # torch aligns its memory, so the kernels see the same addresses modulo a cache line in every process
        self._host = torch.empty(table_size(table), dtype=torch.float32)
        self._scratch: Weights = self._host.numpy()
        self._flat = self._host if device.type == "cpu" else self._host.to(device)
        self._loss = loss
        frozen = {id(p): p for p in model.parameters() if not p.requires_grad}
        self._dtype = dtype
        self._model = copy.deepcopy(model, frozen)
        if dtype is not torch.float32:
            self._model = copy.deepcopy(self._model).to(dtype)  # frozen tensors too
        self._parameters = [p.requires_grad_(False) for _, p in trainable_parameters(self._model)]
        self._views = [self._flat[spec.slice].view(spec.shape) for spec in table]
        self._copies: list[tuple[Tensor, Tensor]] = []
        self.lay_out(torch.contiguous_format)

    def lay_out(self, layout: torch.memory_format) -> None:
        """Point parameters at the scratch buffer, or, where their layout differs from it, at memory of their own."""
        self._copies = []
        for p, view in zip(self._parameters, self._views, strict=True):
            p.data = view
            channels_last = view.ndim == 4 and layout is not torch.contiguous_format
            if channels_last or self._dtype is not torch.float32:
                kept = layout if channels_last else torch.contiguous_format
                p.data = torch.empty_like(view, dtype=self._dtype, memory_format=kept)
                self._copies.append((p, view))

    def outputs(self, weights: Weights, x: Tensor, layout: torch.memory_format) -> object:
        """What the model makes of inputs, itself and they laid out so."""
        self.lay_out(layout)
        np.copyto(self._scratch, weights)
        self._upload()
        return self._model(x.to(self._dtype))

    def losses(self, weights: Weights, perturbations: Perturbations, chunks: list[Chunk]) -> Losses:
        examples = sum(len(x) for x, _ in chunks)
        out = torch.empty((len(perturbations), examples), dtype=torch.float32, device=self._flat.device)
        for row, _ in zip(out, perturbations.weights(weights, self._scratch), strict=True):
            self._upload()
            row.copy_(torch.cat([self._forward(x, y)[1] for x, y in chunks]))
        return np.asarray(out.cpu().numpy())

    def evaluate(self, weights: Weights, chunks: list[Chunk]) -> list[tuple[Losses, Hits | None]]:
        np.copyto(self._scratch, weights)
        self._upload()
        results: list[tuple[Losses, Hits | None]] = []
        for x, y in chunks:
            output, loss = self._forward(x, y)
            labels = output.ndim == 2 and y.ndim == 1 and not y.is_floating_point()
            hits = (output.argmax(dim=1) == y).cpu().numpy() if labels else None
            results.append((loss.cpu().numpy(), hits))
        return results

    def _upload(self) -> None:
        """Bring the scratch weights to the model's device and layout."""
        if self._flat is not self._host:
            self._flat.copy_(self._host)
        for p, view in self._copies:
            p.data.copy_(view)

    def _forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        try:
            output = self._model(x.to(self._dtype) if x.is_floating_point() else x)
        except Exception as error:  # of the user's own code
            raise ModelError(f"the model failed on inputs {tuple(x.shape)} of {x.dtype}: {error}") from error
        if not isinstance(output, Tensor):
            raise ModelError(f"the model gives a {type(output).__name__}: expected one tensor of outputs")
        output = output if self._dtype is torch.float32 else output.float()
        try:
            loss = self._loss(output, y)
        except (IndexError, RuntimeError, TypeError) as error:
            raise ModelError(
                f"the loss failed on outputs {tuple(output.shape)} and targets {tuple(y.shape)} of {y.dtype}: {error}"
            ) from error
        if loss.shape != (len(x),):
            raise ModelError(
                f"the loss has shape {tuple(loss.shape)} for {len(x)} examples: expected one number an example "
                "(reduction='none', averaged over any further dimension)"
            )
        return output, loss.to(torch.float32)


def _frozen_sha256(model: nn.Module) -> str:
    """Hash of what a model has besides trainable parameters; empty if nothing."""
    digest = hashlib.sha256()
    kept = [(n, p) for n, p in model.named_parameters() if not p.requires_grad] + list(model.named_buffers())
    for name, tensor in kept:
        digest.update(name.encode() + tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest() if kept else ""


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


def to_tensors(batch: Dataset, device: torch.device) -> Chunk:
    """Inputs and targets as tensors of their own, with the usual strides (numpy's, where a size is 1, are any)."""
    x, y = (torch.from_numpy(np.array(a, order="C")).to(device) for a in (batch.inputs(), batch.y))
    return x, y


def takes_channels_last(
    outputs: Callable[[Tensor, torch.memory_format], object], shape: Sequence[int], device: torch.device
) -> bool:
    """Whether a model gives the same outputs for images with channels last: tried on two that never change."""
    usual = torch.randn((2, *shape), generator=torch.Generator().manual_seed(0)).to(device)
    last = usual.contiguous(memory_format=torch.channels_last)
    try:
        with torch.inference_mode():
            a, b = outputs(usual, torch.contiguous_format), outputs(last, torch.channels_last)
            return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.allclose(a, b, 1e-3, 1e-4, equal_nan=True)
    except Exception:  # a model may raise anything; what is wrong in any layout is told when it trains
        return False


def trainable_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Names and parameters that are trained, in ``named_parameters`` order."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def _check_modules(model: nn.Module) -> None:
    for name, module in model.named_modules():
        where = f"{name or 'model'} ({type(module).__name__})"
        if isinstance(module, (_BatchNorm, _InstanceNorm)) and module.training and module.track_running_stats:
            raise ModelError(
                f"{where} is in training mode: its running statistics would change with every perturbed pass. "
                "Use GroupNorm, or put it in eval mode with .eval()"
            )
        if isinstance(module, _BatchNorm) and not module.track_running_stats:
            raise ModelError(
                f"{where} normalises by the batch: an example's loss would depend on its neighbours. "
                "Use GroupNorm, or track_running_stats=True in eval mode"
            )
        rate = module.p if isinstance(module, _DropoutNd) else getattr(module, "dropout", 0.0)  # attention, LSTM, ...
        if module.training and isinstance(rate, float) and rate > 0:
            raise ModelError(
                f"{where} is in training mode: each pass would drop other units and hide the difference. "
                "Put it in eval mode with .eval(), or set its rate to 0"
            )


def per_example(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The loss with one number an example, where it can be asked for that."""
    if isinstance(loss, nn.Module):
        reduction: Any = getattr(loss, "reduction", "none")
        if reduction != "none":
            loss = copy.deepcopy(loss)
            loss.reduction = "none"  # type: ignore[assignment]  # torch types attributes of modules as tensors
            return _mean_of_each(loss)
        return loss
    try:
        parameters = inspect.signature(loss).parameters
    except (TypeError, ValueError):
        return loss
    return _mean_of_each(partial(loss, reduction="none")) if "reduction" in parameters else loss


def _mean_of_each(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Average over any dimension behind the first."""

    def mean(output: Tensor, target: Tensor) -> Tensor:
        values = loss(output, target)
        return values.flatten(1).mean(1) if values.ndim > 1 else values

    return mean
