"""The blocks of a credited model (``runtimes.credit``) as exported graphs, one per head and one per unit of rows.

The graphs share a replica's weight buffers. A value that one graph gives and others read lies in a buffer of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from baffle.core.credit import units_of
from baffle.core.types import Array
from baffle.runtimes.credit import CreditPlan, Float64, plan_of
from baffle.runtimes.onnx.bundle import Bundle
from baffle.runtimes.onnx.replica import Program, Replica, aligned, host_loss
from baffle.runtimes.perturb import Pass, Point

_STEP = 1e-5
_STEP_OF_GRAPHS = 2.0**-6  # of a loss that a graph takes in float32


def plan_of_bundle(bundle: Bundle) -> CreditPlan:
    """Which numbers come from which features of a bundle's blocks."""
    blocks = bundle.manifest.blocks
    assert blocks is not None
    return plan_of(
        bundle.manifest.table,
        ((head.weight, head.bias) for head in blocks.heads),
        ((rows.unit, rows.head, np.asarray(rows.owners, np.int64)) for rows in blocks.rows),
    )


class GraphBlocks:
    """One thread's way through the blocks (``runtimes.credit.Blocks``).

    Args:
        replica: the thread's buffers.
        point: the weights of the call.
        x: the inputs of all examples.
        y: their targets.
        size: how many examples go through a graph together; fewer are padded.
        ranges: of int8 activations; None while they are measured, by the graphs that do so.
    """

    def __init__(
        self,
        replica: Replica,
        point: Point,
        x: Array,
        y: Array,
        size: int,
        ranges: Mapping[str, tuple[float, float]] | None,
    ) -> None:
        blocks = replica.bundle.manifest.blocks
        assert blocks is not None
        self._replica, self._point, self._x, self._y, self._blocks = replica, point, x, y, blocks
        self._examples, self._size, self._done = slice(0, 0), size, 0
        self._prefix = "" if ranges is not None else "ranges-"
        self.measured: dict[str, tuple[float, float]] = {}
        units = units_of(point.directions.table)
        self._tensors = {rows.unit: units[rows.unit].tensors for rows in blocks.rows}
        replica.fix(point, ranges or {})
        replica.write(point.unperturbed)

    @property
    def step(self) -> float:
        """Step of the finite differences of the loss."""
        return _STEP_OF_GRAPHS if self._blocks.loss else _STEP

    def start(self, examples: slice, evaluated: Pass | None = None) -> None:
        """Begin to run some examples."""
        for i, spec in enumerate(self._point.directions.table):
            if spec.credit.kind == "loss":  # the others are as they were
                self._replica.write_tensor(evaluated or self._point.unperturbed, i)
        self._value("x", _padded(self._x[examples], self._size))
        self._examples, self._done = examples, 0

    def features(self, head: int) -> Float64:
        """Run on to a head."""
        features: Array = np.zeros(0)
        for i in range(self._done, head + 1):
            given = self._run(f"head-{i}.onnx", self._blocks.heads[i].reads)
            for name in self._blocks.heads[i].gives:
                self._value(name, given[name])
            features = given["features"]
        self._done = head + 1
        return self._of_examples(features)

    def again(self, rows: int, evaluated: Pass) -> Float64:
        """The features of a unit with its tensors perturbed."""
        graph = self._blocks.rows[rows]
        for i in self._tensors[graph.unit]:
            self._replica.write_tensor(evaluated, i)
        features = self._of_examples(self._run(f"rows-{rows}.onnx", graph.reads)["features"])
        for i in self._tensors[graph.unit]:
            self._replica.write_tensor(self._point.unperturbed, i)
        return features

    def losses(self, outputs: Float64) -> Float64:
        """The loss of outputs of the last layer."""
        y = self._y[self._examples]
        if not self._blocks.loss:
            return host_loss(self._replica.bundle.manifest.loss, outputs, y)
        copies, count = outputs.shape[:2]
        repeated = np.tile(y, (copies, *[1] * (y.ndim - 1)))
        made = outputs.reshape(copies * count, -1).astype(np.float32)
        program, x, targets = self._replica.program("loss.onnx", made, repeated)
        x[...], targets[...] = made, repeated
        return np.array(program.run()["losses"], np.float64).reshape(copies, count)

    def measure(self, parts: Sequence[slice]) -> dict[str, tuple[float, float]]:
        """The smallest and the largest value of each quantised activation of clean passes over parts of the batch."""
        for part in parts:
            self.start(part)
            for head in range(len(self._blocks.heads)):
                self.features(head)
                for place, rows in enumerate(self._blocks.rows):
                    if rows.head == head:
                        self.again(place, self._point.unperturbed)
        return self.measured

    def _run(self, file: str, reads: Sequence[str]) -> Mapping[str, Array]:
        given = self._bound(self._prefix + file, reads).run()
        if self._prefix:
            for name in self._blocks.activations:
                if f"{name}.min" in given:
                    low, high = self.measured.get(name, (0.0, 0.0))
                    smallest, largest = given[f"{name}.min"], given[f"{name}.max"]
                    self.measured[name] = float(np.minimum(low, smallest)), float(np.maximum(high, largest))
        return given

    def _bound(self, file: str, reads: Sequence[str]) -> Program:
        """The program of a graph for examples of the current size, bound to the values that it reads."""
        key = file, self._size
        if key not in self._replica.blocks:
            values = {name: self._replica.values[name, self._size] for name in {*reads, "x"}}
            self._replica.blocks[key] = self._replica.load(file, self._replica.buffers | values)
        return self._replica.blocks[key]

    def _value(self, name: str, array: Array) -> None:
        key = name, self._size
        if key not in self._replica.values:
            self._replica.values[key] = aligned(array.size, array.dtype).reshape(array.shape)
        self._replica.values[key][...] = array

    def _of_examples(self, features: Array) -> Float64:
        return np.array(features[: self._examples.stop - self._examples.start], np.float64)


def _padded(x: Array, size: int) -> Array:
    missing = size - len(x)
    return x if not missing else np.concatenate([x, np.repeat(x[:1], missing, axis=0)])
