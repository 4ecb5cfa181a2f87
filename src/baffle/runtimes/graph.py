"""What all runtimes of exported graphs share: feeding perturbed weights, batches of one shape, losses, threads.

A worker owns one set of input buffers, bound once. The perturbed weights of a pass are written straight into them
(float32), or through one scratch array (float16, int8 codes). Batches are cut to chunks of one size and the last is
padded, so that no engine ever plans for a new shape within a call.

Int8 scales come from the unperturbed weights, and activation ranges from an unperturbed pass over the same batch:
both are fixed for all passes of a call, or their own jumps would drown the differences.

Weights that are not all finite have losses of NaN, whatever an engine would make of them: int8 codes have no NaN, and
kernels of maxima and activations may lose it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from baffle.checks import require_count
from baffle.data import Dataset
from baffle.errors import ModelError, PlanError
from baffle.perturb import Perturbations
from baffle.quantize import Float32, encode, row_scales
from baffle.runtimes import Evaluation
from baffle.runtimes.bundle import Bundle
from baffle.runtimes.cores import cores
from baffle.types import Array, Losses, Table, Weights, table_size

_CHUNK_INPUTS = 2**15  # numbers in the inputs of one forward pass, so that activations stay in the cache

Buffers = Mapping[str, Array]
Result = TypeVar("Result")


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
class _Chunk:
    x: Array
    y: Array
    size: int
    """Examples that count; the rest is padding."""


class GraphRuntime:
    """Losses of an exported model; the engines' runtimes differ in ``load`` alone."""

    def __init__(self, bundle: Bundle, load: Loader, plan: dict[str, str | int], threads: int | None) -> None:
        if threads is not None:
            require_count("threads", threads, 1, 1024)
        self._bundle, self._engine = bundle, plan
        self._classes: int | None = None
        lock = Lock()

        def one_at_a_time(file: str, buffers: Buffers) -> Program:
            with lock:
                return load(file, buffers)

        self._workers = [_Worker(bundle, one_at_a_time) for _ in range(threads or cores())]

    @property
    def table(self) -> Table:
        """The trainable tensors."""
        return self._bundle.manifest.table

    @property
    def plan(self) -> dict[str, str | int]:
        """How passes are evaluated."""
        frozen = self._bundle.manifest.frozen
        found = self._engine | {
            "bundle": self._bundle.sha256,
            "chunk_inputs": _CHUNK_INPUTS,
            "threads": len(self._workers),
        }
        return found | ({"frozen": frozen} if frozen else {})

    def initial_weights(self) -> Weights:
        """The weights that the bundle came with: float32[n]."""
        return self._bundle.initial.copy()

    def losses(self, weights: Weights, perturbations: Perturbations, batch: Dataset) -> Losses:
        """Losses of every pass: float32[passes, examples]."""
        self._bundle.check_data(batch)
        branches = [i for i, feed in enumerate(self._bundle.manifest.feeds) if "branch" in feed]
        if any(not perturbations.directions.is_rank1(i) for i in branches):
            raise PlanError(
                f"family {perturbations.directions.family!r} with a bundle of rank-1 branches: expected rank1"
            )
        chunks = self._chunks(batch)
        ranges = self._ranges(weights, chunks)
        if not _finite(weights, ranges):
            return np.full((len(perturbations), len(batch)), np.nan, np.float32)
        parts = perturbations.split(len(self._workers))
        return np.concatenate(self._run(lambda worker, i: worker.losses(weights, parts[i], chunks, ranges), len(parts)))

    def evaluate(self, weights: Weights, data: Dataset) -> Evaluation:
        """Losses, and hits of the largest output where targets are integer labels of a 2-D output."""
        self._bundle.check_data(data)
        chunks = self._chunks(data)
        ranges = self._ranges(weights, chunks)
        shares = [list(s) for s in np.array_split(np.arange(len(chunks)), len(self._workers)) if len(s)]
        found = self._run(
            lambda worker, i: worker.evaluate(weights, [chunks[c] for c in shares[i]], ranges), len(shares)
        )
        hits = [h for _, h in found if h is not None]
        losses = np.concatenate([part for part, _ in found])
        if not _finite(weights, ranges):
            losses[:] = np.nan
        return Evaluation(losses, np.concatenate(hits) if len(hits) == len(found) else None)

    def _run(self, work: Callable[[_Worker, int], Result], parts: int) -> list[Result]:
        if parts == 1:
            return [work(self._workers[0], 0)]
        with ThreadPoolExecutor(parts) as pool:
            return list(pool.map(lambda i: work(self._workers[i], i), range(parts)))

    def _chunks(self, data: Dataset) -> list[_Chunk]:
        x, y = data.inputs(), data.y
        if y.dtype.kind == "i" and self._bundle.manifest.loss == "cross-entropy":
            if self._classes is None:  # of any example the same: a pass that is taken once
                self._classes = self._workers[0].classes(x[:1])
            data.check_labels(self._classes)
        size = min(len(x), max(32, min(128, _CHUNK_INPUTS // max(1, x[:1].size))))
        chunks = []
        for start in range(0, len(x), size):
            a, b = x[start : start + size], y[start : start + size]
            missing = size - len(a)
            if missing:
                a, b = (np.concatenate([v, np.repeat(v[:1], missing, axis=0)]) for v in (a, b))
            chunks.append(_Chunk(np.ascontiguousarray(a), np.ascontiguousarray(b), size - missing))
        return chunks

    def _ranges(self, weights: Weights, chunks: list[_Chunk]) -> dict[str, tuple[float, float]]:
        """The least and the largest value of each quantised activation over a batch."""
        names = self._bundle.manifest.activations
        if not names:
            return {}
        return self._workers[0].ranges(weights, chunks, names)


class _Worker:
    """Buffers of one thread, and the programs that read them."""

    def __init__(self, bundle: Bundle, load: Loader) -> None:
        self.bundle, self.load = bundle, load
        manifest = bundle.manifest
        # a flat array that the float32 inputs are views of: perturbed weights land where the engine reads them
        self.scratch: Weights = _aligned(table_size(manifest.table))
        self.buffers: dict[str, Array] = {}
        self.branches: dict[int, tuple[Float32, Float32]] = {}
        for i, (spec, feed) in enumerate(zip(manifest.table, manifest.feeds, strict=True)):
            out, rest = spec.matrix or (0, 0)
            if feed in ("float32", "branch"):
                self.buffers[spec.name] = self.scratch[spec.slice].reshape(spec.shape)
            elif feed == "float16":
                self.buffers[spec.name] = np.zeros(spec.shape, np.float16)
            else:
                self.buffers[f"{spec.name}.codes"] = np.zeros(spec.shape, np.int8)
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

    def losses(
        self,
        weights: Weights,
        perturbations: Perturbations,
        chunks: list[_Chunk],
        ranges: Mapping[str, tuple[float, float]],
    ) -> Losses:
        out = np.empty((len(perturbations), sum(c.size for c in chunks)), np.float32)
        self._prepare(weights, ranges)
        for row, perturbed in zip(out, perturbations.weights(weights, self.scratch, self.branches), strict=True):
            self._write(perturbed)
            row[:] = np.concatenate([loss for loss, _ in self._forward(chunks)])
        return out

    def evaluate(
        self, weights: Weights, chunks: list[_Chunk], ranges: Mapping[str, tuple[float, float]]
    ) -> tuple[Losses, npt.NDArray[np.bool_] | None]:
        self._unperturbed(weights, ranges)
        found = list(self._forward(chunks, hits=True))
        hits = [h for _, h in found if h is not None]
        return np.concatenate([loss for loss, _ in found]), np.concatenate(hits) if len(hits) == len(found) else None

    def ranges(self, weights: Weights, chunks: list[_Chunk], names: tuple[str, ...]) -> dict[str, tuple[float, float]]:
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
        return int(self._outputs("model.onnx", _Chunk(np.ascontiguousarray(x), y, 1))["outputs"].shape[-1])

    def _unperturbed(self, weights: Weights, ranges: Mapping[str, tuple[float, float]]) -> None:
        self._prepare(weights, ranges)
        self.scratch[:] = weights
        for left, right in self.branches.values():
            left[:], right[:] = 0, 1
        self._write(self.scratch)

    def _prepare(self, weights: Weights, ranges: Mapping[str, tuple[float, float]]) -> None:
        """Fix what all passes of a call share: scales, codes beside a branch, activation ranges."""
        with _unchecked():
            self._fix(weights, ranges)

    def _fix(self, weights: Weights, ranges: Mapping[str, tuple[float, float]]) -> None:
        for spec, feed in zip(self.bundle.manifest.table, self.bundle.manifest.feeds, strict=True):
            if "codes" in feed:
                scales = row_scales(spec, weights)
                self.buffers[f"{spec.name}.scale"][:] = scales
                if feed == "codes+branch":
                    self._encode(spec.name, weights[spec.slice], scales)
        for name, (low, high) in ranges.items():
            scale = np.float32(max((high - low) / 255, 1e-12))
            self.buffers[f"{name}.scale"][...] = scale
            self.buffers[f"{name}.zero"][...] = np.uint8(np.clip(np.rint(-low / scale), 0, 255))

    def _write(self, perturbed: Weights) -> None:
        """Bring perturbed weights from the scratch to the inputs that are not views of it."""
        with _unchecked():
            for spec, feed in zip(self.bundle.manifest.table, self.bundle.manifest.feeds, strict=True):
                if feed == "float16":
                    np.copyto(self.buffers[spec.name], perturbed[spec.slice].reshape(spec.shape), casting="unsafe")
                elif feed == "codes":
                    self._encode(spec.name, perturbed[spec.slice], self.buffers[f"{spec.name}.scale"])

    def _encode(self, name: str, weights: Weights, scales: Array) -> None:
        codes = self.buffers[f"{name}.codes"].view(np.int8).reshape(len(scales), -1)
        encode(weights.reshape(len(scales), -1), scales.astype(np.float32, copy=False), codes)

    def _forward(
        self, chunks: list[_Chunk], hits: bool = False
    ) -> Iterator[tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_] | None]]:
        for chunk in chunks:
            found = self._outputs("model.onnx", chunk)
            outputs = found["outputs"]
            losses = found["losses"] if "losses" in found else _host_loss(self.bundle.manifest.loss, outputs, chunk.y)
            labels = hits and outputs.ndim == 2 and chunk.y.ndim == 1 and chunk.y.dtype.kind == "i"
            correct = (outputs.argmax(axis=1) == chunk.y)[: chunk.size] if labels else None
            yield losses[: chunk.size].astype(np.float32), correct

    def _outputs(self, file: str, chunk: _Chunk) -> Mapping[str, Array]:
        key = file, len(chunk.x)
        if key not in self.programs:
            x, y = np.empty_like(chunk.x), np.empty_like(chunk.y)
            self.programs[key] = (self.load(file, self.buffers | {"x": x, "y": y}), x, y)
        program, x, y = self.programs[key]
        x[...], y[...] = chunk.x, chunk.y
        return program.run()


def _unchecked() -> np.errstate:
    """Weights that are not finite are fed as whatever they become."""
    return np.errstate(over="ignore", invalid="ignore", divide="ignore")


def _finite(weights: Weights, ranges: Mapping[str, tuple[float, float]]) -> bool:
    return bool(np.isfinite(weights).all()) and bool(np.isfinite(list(ranges.values())).all())


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
    """Losses of outputs in float64, so that low precision ends before the loss: [examples]."""
    z = outputs.astype(np.float64)
    if loss == "mse":
        return np.asarray(np.square(z - y.astype(np.float64)).reshape(len(z), -1).mean(axis=1))
    if z.ndim == 2 and y.ndim == 1:
        with np.errstate(over="ignore", invalid="ignore"):
            z = z - z.max(axis=1, keepdims=True)
            return np.asarray(np.log(np.exp(z).sum(axis=1)) - z[np.arange(len(z)), y.astype(np.int64)])
    raise ModelError(f"outputs {outputs.shape} and targets {y.shape}: expected [examples, classes] and [examples]")


def _aligned(size: int) -> Weights:
    """An array that starts at a multiple of 64 bytes, as engines like them."""
    raw = np.empty(size * 4 + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size * 4].view(np.float32)
