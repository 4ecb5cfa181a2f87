"""Weights plus a multiple of a direction, one evaluation after another, out of place.

A perturbed copy is always made from the unperturbed weights (never undone in place: W + d - d drifts), into
one scratch buffer that the caller owns. Directions are drawn a block of them at a time, so memory stays
bounded whatever their number.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from baffle.directions import Bytes, Directions, Entries
from baffle.errors import PlanError
from baffle.quantize import lattice_steps, on_lattice
from baffle.types import Weights

_BUDGET = 16 * 2**20  # bytes of directions drawn at once

Float32 = npt.NDArray[np.float32]
Factors = Mapping[int, tuple[Float32, Float32]]


@dataclass(frozen=True)
class Perturbations:
    """The evaluations that one client makes at one point: W itself if ``baseline``, then W + step * d_k.

    ``steps`` are (sigma,) for forward and (sigma, -sigma) for central differences; the order of passes is
    baseline, then direction by direction, step by step.

    Examples:
        >>> from baffle.types import make_table
        >>> d = Directions(make_table({"w": (2, 2)}), "rank1", key=(7, 1))
        >>> p = Perturbations(d, num_directions=1, steps=(0.5, -0.5), baseline=True)
        >>> scratch = np.empty(4, np.float32)
        >>> [w.tolist() for w in p.weights(np.zeros(4, np.float32), scratch)]
        [[0.0, 0.0, 0.0, 0.0], [-0.5, -0.5, 0.5, 0.5], [0.5, 0.5, -0.5, -0.5]]
    """

    directions: Directions
    num_directions: int
    steps: tuple[float, ...]
    baseline: bool
    first: int = 0
    """Number of the first direction."""
    lattice: int = 0
    """m > 0: matrices are rounded to their int8 lattice and perturbed by m codes instead of sigma."""

    def split(self, parts: int) -> list[Perturbations]:
        """The same passes in the same order, in at most ``parts`` portions for as many workers."""
        ends = [self.num_directions * i // parts for i in range(parts + 1)]
        portions = [
            replace(self, num_directions=end - start, baseline=self.baseline and i == 0, first=self.first + start)
            for i, (start, end) in enumerate(itertools.pairwise(ends))
        ]
        return [p for p in portions if len(p)]

    def __len__(self) -> int:
        """Number of passes."""
        return self.baseline + self.num_directions * len(self.steps)

    def weights(self, weights: Weights, scratch: Weights, branches: Factors | None = None) -> Iterator[Weights]:
        """Write each evaluation's weights into ``scratch`` (float32[n]) and yield it; never change ``weights``.

        Tensors in ``branches`` stay as they are, and the factors (step * a, b) of their rank-1 perturbation are
        written there. Raises PlanError if one of them is pruned: a product cannot leave entries out.
        """
        branches, table = branches or {}, self.directions.table
        for i in branches:
            if table[i].kept:
                raise PlanError(f"{table[i].name}: pruned, with a rank-1 branch: expected one or the other")
        relative: dict[int, Float32] = {}
        if self.lattice and self.steps:
            relative = lattice_steps(table, weights, max(self.steps), self.lattice)
        if self.lattice:
            weights = on_lattice(table, weights)
        scratch[:] = weights
        for left, right in branches.values():
            left[:], right[:] = 0, 1
        if self.baseline:
            yield scratch
        per_block = _directions_per_block(self.directions)
        end = self.first + self.num_directions
        for start in range(self.first, end, per_block):
            block = _Block(self.directions, slice(start, min(start + per_block, end)), relative)
            for k in range(block.size):
                for step in self.steps:
                    block.perturb(k, np.float32(step), weights, scratch, branches)
                    yield scratch


def _directions_per_block(directions: Directions) -> int:
    """How many directions fit the budget as they are kept: factors in float32, signs packed, grid in int16."""
    size = 0.0
    for i, spec in enumerate(directions.table):
        if directions.is_rank1(i):
            size += 4 * sum(spec.matrix or ())
        else:
            size += spec.size * (2 if directions.family == "gaussian" else 1 / 8)
    return max(1, int(_BUDGET // max(size, 1)))


class _Block:
    """Some directions, drawn: factors for rank-1 tensors, packed bits or grid integers for the rest."""

    def __init__(self, directions: Directions, ks: slice, relative: Mapping[int, Float32]) -> None:
        self.directions, self.size, self.relative = directions, ks.stop - ks.start, relative
        self.masks = {i: mask for i, spec in enumerate(directions.table) if (mask := spec.mask) is not None}
        self.factors: dict[int, tuple[Float32, Float32]] = {
            i: (a.astype(np.float32), b.astype(np.float32)) for i, (a, b) in directions.factors(ks).items()
        }
        for i, rows in relative.items():
            if i in self.factors:
                self.factors[i] = (self.factors[i][0] * rows, self.factors[i][1])
        self.bits: dict[int, Bytes] = {}
        self.grid: dict[int, Entries] = {}
        for i, spec in enumerate(directions.table):
            if directions.family == "gaussian":
                self.grid[i] = directions.entries(i, ks)
            elif i not in self.factors:
                self.bits[i] = directions.sign_bits(i, ks, 0, -(-spec.size // 256))

    def perturb(self, k: int, step: np.float32, weights: Weights, out: Weights, branches: Factors) -> None:
        """out = weights + step * direction k. Sign entries are rounded once, in the sum."""
        for i, spec in enumerate(self.directions.table):
            w, o = weights[spec.slice], out[spec.slice]
            if i in branches:
                left, right = branches[i]
                np.multiply(self.factors[i][0][k], step, out=left)
                right[:] = self.factors[i][1][k]
                continue
            if i in self.factors:
                a, b = self.factors[i][0][k], self.factors[i][1][k]
                matrix = o.reshape(len(a), len(b))
                np.multiply((a * step)[:, None], b, out=matrix)
            elif i in self.bits:
                bits = np.unpackbits(self.bits[i][k], count=spec.size, bitorder="little")
                np.multiply(bits, 2 * step, out=o, casting="unsafe")
                np.subtract(o, step, out=o)
                if i in self.relative:
                    o.reshape(spec.matrix or (0, 0))[:] *= self.relative[i][:, None]
            else:
                np.multiply(self.grid[i][k], step * np.float32(self.directions.unit), out=o)
            if i in self.masks:
                np.multiply(o, self.masks[i], out=o)
            np.add(w, o, out=o)
