"""One thread of an exported graph: its input buffers, the programs that read them, and the losses of their outputs.

Losses that are taken outside the graph are taken of many passes at once, in float64.
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
from baffle.runtimes.perturb import Float32, Kind, Pass, Perturbations, Point, Slot, unperturbed

_KEPT_OUTPUTS = 2**18  # numbers in the outputs of passes whose losses are taken together
_DTYPES: dict[str, type[np.generic]] = {
    "fp32": np.float32,
    "branch": np.float32,
    "fp16": np.float16,
    "bf16": np.uint16,
    "codes": np.int8,
}

Buffers = Mapping[str, Array]


class Program(Protocol):
    """A graph loaded into an engine, with input buffers of its own.

    ``run`` reads the buffers as they are then and gives the outputs by name; they may be overwritten by the next run.
    """

    def run(self) -> Mapping[str, Array]:
        """Evaluate the graph on the buffers."""
        ...


Loader = Callable[[str, Buffers], Program]
"""Load the graph of a file of the bundle (once for each shape), reading these inputs."""


@dataclass(frozen=True)
class Chunk:
    """Examples of a batch, padded to the size for which programs are made."""

    x: Array
    y: Array
    size: int
    """Examples that count; the rest is padding."""


class Worker:
    """Buffers of one thread, and the programs that read them."""

    def __init__(self, bundle: Bundle, load: Loader, kinds: Sequence[Kind]) -> None:
        self.bundle, self.load, self.kinds = bundle, load, kinds
        manifest = bundle.manifest
        self.buffers: dict[str, Array] = {}
        self.written: list[Array] = []  # by tensor, as perturbed weights are written there
        self.branches: dict[int, tuple[Float32, Float32]] = {}
        for i, (spec, feed, kind) in enumerate(zip(manifest.table, manifest.feeds, kinds, strict=True)):
            out, rest = spec.matrix or (0, 0)
            memory = _aligned(spec.size, _DTYPES["codes" if "codes" in feed else kind]).reshape(spec.shape)
            self.written.append(memory)
            self.buffers[f"{spec.name}.codes" if "codes" in feed else spec.name] = memory
            if "codes" in feed:
                self.buffers[f"{spec.name}.scale"] = np.ones(out, np.float32)
            if "branch" in feed:
                left, right = np.zeros(out, np.float32), np.ones(rest, np.float32)
                self.branches[i] = (left, right)
                self.buffers[f"{spec.name}.left"] = left
                self.buffers[f"{spec.name}.right"] = right
        for name in manifest.activations:
            self.buffers[f"{name}.scale"] = np.ones((), np.float32)
            self.buffers[f"{name}.zero"] = np.zeros((), np.uint8)
        self.programs: dict[tuple[str, int], tuple[Program, Array, Array]] = {}

    def point(self, asked: Perturbations, weights: Weights) -> Point:
        """Weights ready to be written into the buffers."""
        slots = []
        with unchecked():
            for spec, feed, kind in zip(
                self.bundle.manifest.table, self.bundle.manifest.feeds, self.kinds, strict=True
            ):
                slots.append(Slot(kind, scales=row_scales(spec, weights) if "codes" in feed else None))
        return Point(asked, weights, slots)

    def losses(
        self, point: Point, part: Perturbations, chunks: list[Chunk], ranges: Mapping[str, tuple[float, float]]
    ) -> Losses:
        """Losses of a portion of the passes: float32[passes, examples]."""
        losses = np.empty((len(part), sum(c.size for c in chunks)), np.float32)
        outputs: list[list[Array]] = []  # of passes whose losses are still to be taken
        self._fix(point, ranges)
        first = 0
        for done, evaluated in enumerate(point.passes(part), 1):
            self._write(evaluated)
            outputs.append([self._kept(chunk) for chunk in chunks])
            if done == len(part) or len(outputs) * sum(o.size for o in outputs[0]) >= _KEPT_OUTPUTS:
                losses[first:done] = self._losses_of(outputs, chunks)
                outputs, first = [], done
        return losses

    def evaluate(
        self, weights: Weights, chunks: list[Chunk], ranges: Mapping[str, tuple[float, float]]
    ) -> tuple[Losses, npt.NDArray[np.bool_] | None]:
        """Losses and hits of unperturbed weights."""
        self._unperturbed(weights, ranges)
        losses, hits = [], []
        for chunk in chunks:
            found = self._outputs("model.onnx", chunk)
            outputs = found["outputs"]
            losses.append(self._losses_of([[outputs if self._outside else found["losses"]]], [chunk])[0])
            if outputs.ndim == 2 and chunk.y.ndim == 1 and chunk.y.dtype.kind == "i":
                hits.append((outputs.argmax(axis=1) == chunk.y)[: chunk.size])
        return np.concatenate(losses), np.concatenate(hits) if len(hits) == len(chunks) else None

    def ranges(self, weights: Weights, chunks: list[Chunk], names: tuple[str, ...]) -> dict[str, tuple[float, float]]:
        """The least and the largest value of each quantised activation over a batch."""
        self._unperturbed(weights, {})
        found: dict[str, tuple[float, float]] = {}
        for chunk in chunks:
            outputs = self._outputs("ranges.onnx", chunk)
            for name in names:
                low, high = found.get(name, (0.0, 0.0))
                least, largest = outputs[f"{name}.min"], outputs[f"{name}.max"]
                found[name] = float(np.minimum(low, least)), float(np.maximum(high, largest))  # NaN stays
        return found

    def classes(self, x: Array) -> int:
        """The number of outputs of the model."""
        y = np.zeros((1, *self.bundle.manifest.y.shape), self.bundle.manifest.y.dtype)
        return int(self._outputs("model.onnx", Chunk(np.ascontiguousarray(x), y, 1))["outputs"].shape[-1])

    @property
    def _outside(self) -> bool:
        """Whether losses are taken of the outputs."""
        return self.bundle.manifest.loss != "graph"

    def _unperturbed(self, weights: Weights, ranges: Mapping[str, tuple[float, float]]) -> None:
        point = self.point(unperturbed(self.bundle.manifest.table), weights)
        self._fix(point, ranges)
        self._write(point.unperturbed)

    def _fix(self, point: Point, ranges: Mapping[str, tuple[float, float]]) -> None:
        """Fix what all passes of a call share: scales and activation ranges."""
        for spec, slot in zip(self.bundle.manifest.table, point.slots, strict=True):
            if slot.scales is not None:
                self.buffers[f"{spec.name}.scale"][:] = slot.scales
        for name, (low, high) in ranges.items():
            with unchecked():
                scale = np.float32(max((high - low) / 255, 1e-12))
                self.buffers[f"{name}.scale"][...] = scale
                self.buffers[f"{name}.zero"][...] = np.uint8(np.clip(np.rint(-low / scale), 0, 255))

    def _write(self, evaluated: Pass) -> None:
        """Bring perturbed weights to the inputs."""
        for i, memory in enumerate(self.written):
            evaluated.write(i, memory)
        for i, branch in self.branches.items():
            evaluated.branch(i, *branch)

    def _kept(self, chunk: Chunk) -> Array:
        """What losses are taken of, or are: a copy, since the next run may overwrite it."""
        found = self._outputs("model.onnx", chunk)
        return np.array(found["outputs" if self._outside else "losses"])

    def _losses_of(self, outputs: list[list[Array]], chunks: list[Chunk]) -> npt.NDArray[np.float32]:
        """Losses of some passes over all chunks: float32[passes, examples]."""
        parts = []
        for number, chunk in enumerate(chunks):
            of_chunk = np.stack([kept[number] for kept in outputs])
            losses = _host_loss(self.bundle.manifest.loss, of_chunk, chunk.y) if self._outside else of_chunk
            parts.append(losses[:, : chunk.size].astype(np.float32))
        return np.concatenate(parts, axis=1)

    def _outputs(self, file: str, chunk: Chunk) -> Mapping[str, Array]:
        key = file, len(chunk.x)
        if key not in self.programs:
            x, y = (_aligned(a.size, a.dtype).reshape(a.shape) for a in (chunk.x, chunk.y))
            self.programs[key] = (self.load(file, self.buffers | {"x": x, "y": y}), x, y)
        program, x, y = self.programs[key]
        x[...], y[...] = chunk.x, chunk.y
        return program.run()


def unchecked() -> np.errstate:
    """Weights that are not finite are fed as whatever they become."""
    return np.errstate(over="ignore", invalid="ignore", divide="ignore")


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Errors of an engine, whatever their kind, as ModelError."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # engines raise kinds of their own
        raise ModelError(f"{what} failed: {' '.join(str(error).split())}") from error


def _host_loss(loss: str, outputs: Array, y: Array) -> npt.NDArray[np.float64]:
    """Losses of outputs [passes, examples, ...] in float64, so that low precision ends before the loss."""
    z = outputs.astype(np.float64)
    if loss == "mse":
        return np.asarray(np.square(z - y.astype(np.float64)).reshape(*z.shape[:2], -1).mean(axis=2))
    if z.ndim == 3 and y.ndim == 1:
        with np.errstate(over="ignore", invalid="ignore"):
            z -= z.max(axis=2, keepdims=True)
            right = np.take_along_axis(z, y.astype(np.int64)[None, :, None], axis=2)[..., 0]
            return np.asarray(np.log(np.exp(z).sum(axis=2)) - right)
    raise ModelError(f"outputs {outputs.shape[1:]} and targets {y.shape}: expected [examples, classes] and [examples]")


def _aligned(size: int, dtype: npt.DTypeLike) -> Array:
    """An array that starts at a multiple of 64 bytes, as engines like them."""
    bytes_ = size * np.dtype(dtype).itemsize
    raw = np.zeros(bytes_ + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + bytes_].view(dtype)
