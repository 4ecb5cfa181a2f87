"""What all runtimes of exported graphs share: feeding perturbed weights, batches of one shape, losses, threads.

A worker owns one set of input buffers, bound once. The perturbed weights of a pass are written straight into them.
Batches are cut to chunks of one size and the last is padded, so that no engine ever plans for a new shape within a
call. Losses that are taken outside the graph are taken of many passes at once.

Int8 scales come from the unperturbed weights, and activation ranges from an unperturbed pass over the same batch:
both are fixed for all passes of a call, or their own jumps would drown the differences.

Weights that are not all finite have losses of NaN, whatever an engine would make of them: int8 codes have no NaN, and
kernels of maxima and activations may lose it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from threading import Lock

import numpy as np
import numpy.typing as npt

from baffle.core.checks import require_count
from baffle.core.cores import cores
from baffle.core.types import Losses, ParamSpec, Table, Weights
from baffle.data import Dataset
from baffle.errors import PlanError
from baffle.runtimes import Evaluation
from baffle.runtimes.lanes import Lane, side_by_side
from baffle.runtimes.onnx.bundle import Bundle, Feed
from baffle.runtimes.onnx.worker import Buffers as Buffers
from baffle.runtimes.onnx.worker import Chunk, Loader, Program, Worker
from baffle.runtimes.onnx.worker import explained as explained
from baffle.runtimes.perturb import Kind, Perturbations

_CHUNK_INPUTS = 2**15  # numbers in the inputs of one forward pass, so that activations stay in the cache
KINDS: dict[Feed, Kind] = {
    "float32": "fp32",
    "float16": "fp16",
    "codes": "int8",
    "branch": "branch",
    "codes+branch": "branch",
}


class GraphRuntime:
    """Losses of an exported model; the engines' runtimes differ in ``load`` alone."""

    def __init__(
        self,
        bundle: Bundle,
        load: Loader,
        plan: dict[str, str | int],
        threads: int | None,
        kinds: Callable[[ParamSpec, Feed], Kind] = lambda _, feed: KINDS[feed],
    ) -> None:
        if threads is not None:
            require_count("threads", threads, 1, 1024)
        self._bundle, self._engine = bundle, plan
        self._classes: int | None = None
        lock = Lock()

        def one_at_a_time(file: str, buffers: Buffers) -> Program:
            with lock:
                return load(file, buffers)

        chosen = [kinds(spec, feed) for spec, feed in zip(bundle.manifest.table, bundle.manifest.feeds, strict=True)]
        self._workers = tuple(Worker(bundle, one_at_a_time, chosen) for _ in range(threads or cores()))

    @property
    def table(self) -> Table:
        """The trainable tensors."""
        return self._bundle.manifest.table

    @property
    def lanes(self) -> tuple[Lane[Worker], ...]:
        """The runtime one thread at a time: each evaluates losses alone, and all may do so at once."""
        return tuple(Lane(self.losses_on, w) for w in self._workers)  # not kept: lanes have the runtime

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
        return self.losses_on(self.lanes, weights, perturbations, batch)

    def losses_on(
        self, lanes: Sequence[Lane[Worker]], weights: Weights, perturbations: Perturbations, batch: Dataset
    ) -> Losses:
        """Losses of every pass, shared by some lanes: float32[passes, examples]."""
        self._bundle.check_data(batch)
        branches = [i for i, feed in enumerate(self._bundle.manifest.feeds) if "branch" in feed]
        if perturbations.num_directions and any(not perturbations.directions.is_rank1(i) for i in branches):
            raise PlanError(
                f"family {perturbations.directions.family!r} with a bundle of rank-1 branches: expected rank1"
            )
        chunks = self._chunks(batch, lanes[0].worker)
        ranges = self._ranges(lanes[0].worker, weights, chunks)
        if not _finite(weights, ranges):
            return np.full((len(perturbations), len(batch)), np.nan, np.float32)
        point = lanes[0].worker.point(perturbations, weights)
        parts = perturbations.split(len(lanes))

        def run(i: int) -> Losses:
            return lanes[i].worker.losses(point, parts[i], chunks, ranges)

        return np.concatenate(side_by_side(run, len(parts)))

    def evaluate(self, weights: Weights, data: Dataset) -> Evaluation:
        """Losses, and hits of the largest output where targets are integer labels of a 2-D output."""
        self._bundle.check_data(data)
        chunks = self._chunks(data, self._workers[0])
        ranges = self._ranges(self._workers[0], weights, chunks)
        shares = [list(s) for s in np.array_split(np.arange(len(chunks)), len(self._workers)) if len(s)]

        def run(i: int) -> tuple[Losses, npt.NDArray[np.bool_] | None]:
            return self._workers[i].evaluate(weights, [chunks[c] for c in shares[i]], ranges)

        found = side_by_side(run, len(shares))
        hits = [h for _, h in found if h is not None]
        losses = np.concatenate([part for part, _ in found])
        if not _finite(weights, ranges):
            losses[:] = np.nan
        return Evaluation(losses, np.concatenate(hits) if len(hits) == len(found) else None)

    def _chunks(self, data: Dataset, worker: Worker) -> list[Chunk]:
        x, y = data.inputs(), data.y
        if y.dtype.kind == "i" and self._bundle.manifest.loss == "cross-entropy":
            if self._classes is None:  # of any example the same: a pass that is taken once
                self._classes = worker.classes(x[:1])
            data.check_labels(self._classes)
        size = min(len(x), max(32, min(128, _CHUNK_INPUTS // max(1, x[:1].size))))
        chunks = []
        for start in range(0, len(x), size):
            a, b = x[start : start + size], y[start : start + size]
            missing = size - len(a)
            if missing:
                a, b = (np.concatenate([v, np.repeat(v[:1], missing, axis=0)]) for v in (a, b))
            chunks.append(Chunk(np.ascontiguousarray(a), np.ascontiguousarray(b), size - missing))
        return chunks

    def _ranges(self, worker: Worker, weights: Weights, chunks: list[Chunk]) -> dict[str, tuple[float, float]]:
        """The least and the largest value of each quantised activation over a batch."""
        names = self._bundle.manifest.activations
        if not names:
            return {}
        return worker.ranges(weights, chunks, names)


def _finite(weights: Weights, ranges: Mapping[str, tuple[float, float]]) -> bool:
    return bool(np.isfinite(weights).all()) and bool(np.isfinite(list(ranges.values())).all())
