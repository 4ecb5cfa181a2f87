"""Common parts of all runtimes of exported graphs: feeding perturbed weights, micro-batches, losses, threads.

A replica owns one set of input buffers, bound once. The perturbed weights of a pass are written straight into them.
Batches are cut into micro-batches of one size, and the last one is padded, so that an engine never compiles for a new
shape within a call. Losses that are computed outside the graph are computed for many passes at once.

Int8 scales come from the unperturbed weights, and activation ranges from an unperturbed pass over the same batch:
both are fixed for all passes of a call; otherwise changes in the scales would swamp the differences of the losses.

Weights that are not all finite have losses of NaN, whatever an engine would compute: int8 codes have no NaN, and
kernels for maxima and activations may drop it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from threading import Lock

import numpy as np
import numpy.typing as npt

from baffle.core.checks import require_count
from baffle.core.cores import cores
from baffle.core.credit import sizes_of
from baffle.core.types import Losses, ParamSpec, Table, Weights
from baffle.data import Dataset
from baffle.errors import PlanError
from baffle.runtimes import Evaluation
from baffle.runtimes.credit import LARGEST_PART, Float64, credits_of
from baffle.runtimes.lanes import Lane, side_by_side
from baffle.runtimes.onnx.blocks import GraphBlocks, plan_of_bundle
from baffle.runtimes.onnx.bundle import Bundle, Feed
from baffle.runtimes.onnx.replica import Buffers as Buffers
from baffle.runtimes.onnx.replica import Loader, MicroBatch, Program, Replica
from baffle.runtimes.onnx.replica import explained as explained
from baffle.runtimes.perturb import Kind, Perturbations

_MICRO_BATCH_INPUTS = 2**15  # numbers in the inputs of one forward pass, so that activations stay in the cache
KINDS: dict[Feed, Kind] = {
    "float32": "fp32",
    "float16": "fp16",
    "codes": "int8",
    "branch": "branch",
    "codes+branch": "branch",
}


class GraphRuntime:
    """Evaluates the losses of an exported model; the runtimes of the engines differ only in ``load``.

    Args:
        bundle: The exported model.
        load: Loads a graph of the bundle into the engine.
        plan: What the engine adds to ``plan``.
        threads: How many passes are evaluated side by side; None for one per core.
        kinds: In which precision a tensor enters the graph, given how the bundle feeds it.
    """

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
        self._classes: int | None = None  # outputs of the model; known after the first batch with labels
        lock = Lock()

        def one_at_a_time(file: str, buffers: Buffers) -> Program:
            with lock:
                return load(file, buffers)

        chosen = [kinds(spec, feed) for spec, feed in zip(bundle.manifest.table, bundle.manifest.feeds, strict=True)]
        self._replicas = tuple(Replica(bundle, one_at_a_time, chosen) for _ in range(threads or cores()))
        self._credit_plan = None if bundle.manifest.blocks is None else plan_of_bundle(bundle)

    @property
    def table(self) -> Table:
        """The trainable tensors of the bundle."""
        return self._bundle.manifest.table

    @property
    def lanes(self) -> tuple[Lane[Replica], ...]:
        """The runtime divided into threads: each lane evaluates losses alone, and all may do so at the same time."""
        # made on each access: if the runtime held them, it would be part of a reference cycle and freed late
        return tuple(Lane(self.losses_on, r) for r in self._replicas)

    @property
    def plan(self) -> dict[str, str | int]:
        """How passes are evaluated, as it is recorded with a run."""
        frozen = self._bundle.manifest.frozen
        plan = self._engine | {
            "bundle": self._bundle.sha256,
            "chunk_inputs": _MICRO_BATCH_INPUTS,
            "threads": len(self._replicas),
        }
        return plan | ({"frozen": frozen} if frozen else {})

    def initial_weights(self) -> Weights:
        """The weights stored in the bundle: float32[n]."""
        return self._bundle.initial.copy()

    def losses(self, weights: Weights, perturbations: Perturbations, batch: Dataset) -> Losses:
        """Losses of every pass, divided among all lanes: float32[passes, examples]."""
        return self.losses_on(self.lanes, weights, perturbations, batch)

    def losses_on(
        self, lanes: Sequence[Lane[Replica]], weights: Weights, perturbations: Perturbations, batch: Dataset
    ) -> Losses:
        """Losses of every pass, divided among some lanes: float32[passes, examples]."""
        self._bundle.check_data(batch)
        self._check_family(perturbations)
        batches = self._cut(batch, lanes[0].replica)
        ranges = self._ranges(lanes[0].replica, weights, batches)
        if not _finite(weights, ranges):
            return np.full((len(perturbations), len(batch)), np.nan, np.float32)
        point = lanes[0].replica.point(perturbations, weights)
        parts = perturbations.split(len(lanes))

        def run(i: int) -> Losses:
            return lanes[i].replica.losses(point, parts[i], batches, ranges)

        return np.concatenate(side_by_side(run, len(parts)))

    def credits(
        self,
        weights: Weights,
        perturbations: Perturbations,
        batch: Dataset,
        groups: npt.NDArray[np.int64],
        bounds: Sequence[int],
    ) -> Float64:
        """The numbers of each unit of a credited model; see ``runtimes.CreditEvaluator``.

        Raises:
            PlanError: If the bundle was exported without credit.
        """
        if self._bundle.manifest.blocks is None or self._credit_plan is None:
            raise PlanError("a bundle without blocks gives one scalar per direction: export it with credit")
        self._bundle.check_data(batch)
        self._check_family(perturbations)
        self._check_labels(batch, self._replicas[0])
        plan, x, y = self._credit_plan, batch.inputs(), batch.y
        point = self._replicas[0].point(perturbations, weights)
        size = min(LARGEST_PART, int(np.diff(bounds).max()))
        parts = [slice(start, min(start + size, len(x))) for start in range(0, len(x), size)]
        ranges: dict[str, tuple[float, float]] = {}
        if self._bundle.manifest.blocks.activations:
            ranges = GraphBlocks(self._replicas[0], point, x, y, size, None).measure(parts)
        if not _finite(weights, ranges):
            directions = perturbations.num_directions * (len(bounds) - 1)
            return np.full((int(groups.max()) + 1, sum(sizes_of(plan.table, directions))), np.nan)
        lanes = [GraphBlocks(replica, point, x, y, size, ranges) for replica in self._replicas]
        return credits_of(plan, lanes, point, perturbations, groups, bounds)

    def evaluate(self, weights: Weights, data: Dataset) -> Evaluation:
        """Losses and correct predictions of the unperturbed model on a whole data set.

        Predictions are the largest outputs, where outputs are [examples, classes] and targets integer labels.
        """
        self._bundle.check_data(data)
        batches = self._cut(data, self._replicas[0])
        ranges = self._ranges(self._replicas[0], weights, batches)
        shares = [list(s) for s in np.array_split(np.arange(len(batches)), len(self._replicas)) if len(s)]

        def run(i: int) -> tuple[Losses, npt.NDArray[np.bool_] | None]:
            return self._replicas[i].evaluate(weights, [batches[c] for c in shares[i]], ranges)

        results = side_by_side(run, len(shares))
        correct = [c for _, c in results if c is not None]
        losses = np.concatenate([part for part, _ in results])
        if not _finite(weights, ranges):
            losses[:] = np.nan
        return Evaluation(losses, np.concatenate(correct) if len(correct) == len(results) else None)

    def _check_family(self, perturbations: Perturbations) -> None:
        perturbed = [spec.credit.kind != "exact" for spec in self.table]
        branches = [i for i, feed in enumerate(self._bundle.manifest.feeds) if "branch" in feed and perturbed[i]]
        if perturbations.num_directions and any(not perturbations.directions.is_rank1(i) for i in branches):
            raise PlanError(
                f"family {perturbations.directions.family!r} with a bundle of rank-1 branches: expected rank1"
            )

    def _check_labels(self, data: Dataset, replica: Replica) -> None:
        if data.y.dtype.kind == "i" and self._bundle.manifest.loss == "cross-entropy":
            if self._classes is None:  # the same for any example, so one pass is enough
                self._classes = replica.classes(data.take(np.arange(1)).inputs())
            data.check_labels(self._classes)

    def _cut(self, data: Dataset, replica: Replica) -> list[MicroBatch]:
        self._check_labels(data, replica)
        x, y = data.inputs(), data.y
        size = min(len(x), max(32, min(128, _MICRO_BATCH_INPUTS // max(1, x[:1].size))))
        batches = []
        for start in range(0, len(x), size):
            a, b = x[start : start + size], y[start : start + size]
            missing = size - len(a)
            if missing:
                a, b = (np.concatenate([v, np.repeat(v[:1], missing, axis=0)]) for v in (a, b))
            batches.append(MicroBatch(np.ascontiguousarray(a), np.ascontiguousarray(b), size - missing))
        return batches

    def _ranges(self, replica: Replica, weights: Weights, batches: list[MicroBatch]) -> dict[str, tuple[float, float]]:
        """The smallest and the largest value of each quantised activation over a batch, by the activation's name."""
        names = self._bundle.manifest.activations
        if not names:
            return {}
        return replica.ranges(weights, batches, names)


def _finite(weights: Weights, ranges: Mapping[str, tuple[float, float]]) -> bool:
    return bool(np.isfinite(weights).all()) and bool(np.isfinite(list(ranges.values())).all())
