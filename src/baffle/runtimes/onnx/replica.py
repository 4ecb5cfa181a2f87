"""What one thread owns of an exported graph: its input buffers, and the programs that read them.

Losses that are computed outside the graph are computed for many passes at once, in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from baffle.core.quantize import row_scales
from baffle.core.types import Array, Losses, Weights
from baffle.errors import ModelError
from baffle.runtimes.onnx.bundle import Bundle
from baffle.runtimes.perturb import Float32, Kind, Layout, Pass, Perturbations, Point, unperturbed

_KEPT_OUTPUTS = 2**18  # numbers in the outputs of passes whose losses are computed together
_DTYPES: dict[str, type[np.generic]] = {
    "fp32": np.float32,
    "branch": np.float32,
    "fp16": np.float16,
    "bf16": np.uint16,
    "codes": np.int8,
}

Buffers = Mapping[str, Array]
"""Arrays by the names of the graph's inputs."""


class Program(Protocol):
    """A graph loaded into an engine and bound to input buffers of its own."""

    def run(self) -> Mapping[str, Array]:
        """Evaluate the graph on the buffers' current contents.

        Returns:
            The outputs by name. The next run may overwrite them.
        """
        ...


Loader = Callable[[str, Buffers], Program]
"""``load(file, buffers)``: load a graph of the bundle, to read these buffers (called once per shape)."""


@dataclass(frozen=True)
class MicroBatch:
    """Examples of a batch that go through the graph together, padded to the size for which programs are made."""

    x: Array
    y: Array
    size: int
    """Number of actual examples; the rest is padding."""


class Replica:
    """One thread's input buffers and programs.

    Args:
        bundle: The exported model.
        load: Loads a graph into the engine.
        kinds: In which precision each tensor enters the graph.
    """

    def __init__(self, bundle: Bundle, load: Loader, kinds: Sequence[Kind]) -> None:
        self.bundle, self.load, self.kinds = bundle, load, kinds
        manifest = bundle.manifest
        self.buffers: dict[str, Array] = {}
        self.written: list[Array] = []  # for each tensor, the buffer that its perturbed weights are written to
        self.branches: dict[int, tuple[Float32, Float32]] = {}
        for i, (spec, feed, kind) in enumerate(zip(manifest.table, manifest.feeds, kinds, strict=True)):
            out, rest = spec.matrix or (0, 0)
            memory = aligned(spec.size, _DTYPES["codes" if "codes" in feed else kind]).reshape(spec.shape)
            self.written.append(memory)
            self.buffers[f"{spec.name}.codes" if "codes" in feed else spec.name] = memory
            if "codes" in feed:
                self.buffers[f"{spec.name}.scale"] = np.ones(out, np.float32)
            if "branch" in feed:
                left, right = np.zeros(out, np.float32), np.ones(rest, np.float32)
                self.branches[i] = (left, right)
                self.buffers[f"{spec.name}.left"] = left
                self.buffers[f"{spec.name}.right"] = right
        blocks = manifest.blocks
        for name in (*manifest.activations, *(blocks.activations if blocks is not None else ())):
            self.buffers[f"{name}.scale"] = np.ones((), np.float32)
            self.buffers[f"{name}.zero"] = np.zeros((), np.uint8)
        self.programs: dict[tuple[str, int], tuple[Program, Array, Array]] = {}
        self.blocks: dict[tuple[str, int], Program] = {}  # of a credited model, by file and number of examples
        self.values: dict[tuple[str, int], Array] = {}  # what its blocks hand on

    def point(self, perturbations: Perturbations, weights: Weights) -> Point:
        """Weights prepared to be written into the buffers."""
        layouts = []
        with unchecked():
            for spec, feed, kind in zip(
                self.bundle.manifest.table, self.bundle.manifest.feeds, self.kinds, strict=True
            ):
                layouts.append(Layout(kind, scales=row_scales(spec, weights) if "codes" in feed else None))
        return Point(perturbations, weights, layouts)

    def losses(
        self, point: Point, part: Perturbations, batches: list[MicroBatch], ranges: Mapping[str, tuple[float, float]]
    ) -> Losses:
        """Losses of one part of the passes: float32[passes, examples]."""
        losses = np.empty((len(part), sum(c.size for c in batches)), np.float32)
        outputs: list[list[Array]] = []  # of passes whose losses are still to be computed
        self.fix(point, ranges)
        first = 0
        for done, evaluated in enumerate(point.passes(part), 1):
            self.write(evaluated)
            outputs.append([self._copied_outputs(micro_batch) for micro_batch in batches])
            if done == len(part) or len(outputs) * sum(o.size for o in outputs[0]) >= _KEPT_OUTPUTS:
                losses[first:done] = self._losses_of(outputs, batches)
                outputs, first = [], done
        return losses

    def evaluate(
        self, weights: Weights, batches: list[MicroBatch], ranges: Mapping[str, tuple[float, float]]
    ) -> tuple[Losses, npt.NDArray[np.bool_] | None]:
        """Losses and correct predictions under unperturbed weights."""
        self._unperturbed(weights, ranges)
        losses, correct = [], []
        for micro_batch in batches:
            results = self._outputs("model.onnx", micro_batch)
            outputs = results["outputs"]
            losses.append(self._losses_of([[outputs if self._outside else results["losses"]]], [micro_batch])[0])
            if outputs.ndim == 2 and micro_batch.y.ndim == 1 and micro_batch.y.dtype.kind == "i":
                correct.append((outputs.argmax(axis=1) == micro_batch.y)[: micro_batch.size])
        return np.concatenate(losses), np.concatenate(correct) if len(correct) == len(batches) else None

    def ranges(
        self, weights: Weights, batches: list[MicroBatch], names: tuple[str, ...]
    ) -> dict[str, tuple[float, float]]:
        """The smallest and the largest value of each quantised activation over a batch, by the activation's name."""
        self._unperturbed(weights, {})
        ranges: dict[str, tuple[float, float]] = {}
        for micro_batch in batches:
            outputs = self._outputs("ranges.onnx", micro_batch)
            for name in names:
                low, high = ranges.get(name, (0.0, 0.0))
                smallest, largest = outputs[f"{name}.min"], outputs[f"{name}.max"]
                ranges[name] = float(np.minimum(low, smallest)), float(np.maximum(high, largest))  # NaN stays NaN
        return ranges

    def classes(self, x: Array) -> int:
        """The number of classes, that is of the model's outputs per example."""
        y = np.zeros((1, *self.bundle.manifest.y.shape), self.bundle.manifest.y.dtype)
        return int(self._outputs("model.onnx", MicroBatch(np.ascontiguousarray(x), y, 1))["outputs"].shape[-1])

    @property
    def _outside(self) -> bool:
        """Whether losses are computed from the outputs, outside the graph."""
        return self.bundle.manifest.loss != "graph"

    def _unperturbed(self, weights: Weights, ranges: Mapping[str, tuple[float, float]]) -> None:
        point = self.point(unperturbed(self.bundle.manifest.table), weights)
        self.fix(point, ranges)
        self.write(point.unperturbed)

    def fix(self, point: Point, ranges: Mapping[str, tuple[float, float]]) -> None:
        """Set the inputs that are the same for all passes of a call: scales and activation ranges."""
        for spec, layout in zip(self.bundle.manifest.table, point.layouts, strict=True):
            if layout.scales is not None:
                self.buffers[f"{spec.name}.scale"][:] = layout.scales
        for name, (low, high) in ranges.items():
            with unchecked():
                scale = np.float32(max((high - low) / 255, 1e-12))
                self.buffers[f"{name}.scale"][...] = scale
                self.buffers[f"{name}.zero"][...] = np.uint8(np.clip(np.rint(-low / scale), 0, 255))

    def write(self, evaluated: Pass) -> None:
        """Write a pass's perturbed weights into the input buffers."""
        for i in range(len(self.written)):
            self.write_tensor(evaluated, i)

    def write_tensor(self, evaluated: Pass, tensor: int) -> None:
        """Write a tensor's weights, as they are in a pass, into its input buffers."""
        evaluated.write(tensor, self.written[tensor])
        if tensor in self.branches:
            evaluated.branch(tensor, *self.branches[tensor])

    def _copied_outputs(self, micro_batch: MicroBatch) -> Array:
        """A copy of the outputs, or of the graph's own losses, since the next run may overwrite them."""
        results = self._outputs("model.onnx", micro_batch)
        return np.array(results["outputs" if self._outside else "losses"])

    def _losses_of(self, outputs: list[list[Array]], batches: list[MicroBatch]) -> npt.NDArray[np.float32]:
        """Losses of some passes over all micro-batches: float32[passes, examples]."""
        parts = []
        for number, micro_batch in enumerate(batches):
            losses = np.stack([of_pass[number] for of_pass in outputs])
            if self._outside:
                losses = host_loss(self.bundle.manifest.loss, losses, micro_batch.y)
            parts.append(losses[:, : micro_batch.size].astype(np.float32))
        return np.concatenate(parts, axis=1)

    def _outputs(self, file: str, micro_batch: MicroBatch) -> Mapping[str, Array]:
        program, x, y = self.program(file, micro_batch.x, micro_batch.y)
        x[...], y[...] = micro_batch.x, micro_batch.y
        return program.run()

    def program(self, file: str, x: Array, y: Array) -> tuple[Program, Array, Array]:
        """A graph's program for inputs of these shapes, and the buffers that it reads them from."""
        key = file, len(x)
        if key not in self.programs:
            own_x, own_y = (aligned(a.size, a.dtype).reshape(a.shape) for a in (x, y))
            self.programs[key] = self.load(file, self.buffers | {"x": own_x, "y": own_y}), own_x, own_y
        return self.programs[key]


def unchecked() -> np.errstate:
    """A context without numpy's warnings, in which weights may be infinite or NaN."""
    return np.errstate(over="ignore", invalid="ignore", divide="ignore")


@contextmanager
def explained(what: str) -> Iterator[None]:
    """A context in which any error of an engine becomes a ModelError that starts with ``what``."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # engines raise types of their own
        raise ModelError(f"{what} failed: {' '.join(str(error).split())}") from error


def host_loss(loss: str, outputs: Array, y: Array) -> npt.NDArray[np.float64]:
    """Losses of outputs [passes, examples, ...] in float64, so that only the model computes in low precision."""
    z = outputs.astype(np.float64)
    if loss == "mse":
        return np.asarray(np.square(z - y.astype(np.float64)).reshape(*z.shape[:2], -1).mean(axis=2))
    if z.ndim == 3 and y.ndim == 1:
        with np.errstate(over="ignore", invalid="ignore"):
            z -= z.max(axis=2, keepdims=True)
            right = np.take_along_axis(z, y.astype(np.int64)[None, :, None], axis=2)[..., 0]
            return np.asarray(np.log(np.exp(z).sum(axis=2)) - right)
    raise ModelError(f"outputs {outputs.shape[1:]} and targets {y.shape}: expected [examples, classes] and [examples]")


def aligned(size: int, dtype: npt.DTypeLike) -> Array:
    """An array that starts at a multiple of 64 bytes, which engines read without copying it."""
    bytes_ = size * np.dtype(dtype).itemsize
    raw = np.zeros(bytes_ + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + bytes_].view(dtype)
