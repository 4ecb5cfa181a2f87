"""Perturbed weights, W + step * d, written pass by pass into the buffers that kernels read.

A perturbed copy is always made from the unperturbed weights (never undone in place: W + d - d drifts), in a buffer
that the caller owns, in the memory order and precision in which it is read (:class:`Layout`). Everything that the
passes of a call have in common is prepared once, in a :class:`Point` that all lanes share:

* in float32 an entry is w + step * d, one product and one sum;
* in fewer bits an entry of a sign direction has only two possible values, so both are rounded once, and a pass merely
  selects one of them.

Directions are drawn in blocks, so memory stays bounded whatever their number.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from baffle.core.directions import Directions
from baffle.core.quantize import encode, lattice_steps, on_lattice
from baffle.core.types import Table, Weights, table_size
from baffle.errors import PlanError
from baffle.runtimes.rounding import Bits, mask_of, to_bfloat16, to_float16
from baffle.runtimes.rounding import Float32 as Float32

BUDGET = 4 * 2**20
"""Bytes of directions drawn at once, by default."""
_KEPT = 2**16  # a block whose directions have at most this many entries keeps them in float32
_WHOLE = 2**18  # a matrix with at most this many entries is perturbed in one step

AnyArray = npt.NDArray[Any]
"""An array of whatever type a layout holds; unlike ``baffle.core.types.Array`` it can be computed with."""
Factors = Mapping[int, tuple[Float32, Float32]]
Kind = Literal["fp32", "bf16", "fp16", "int8", "branch"]


@dataclass(frozen=True)
class Layout:
    """Memory layout and precision that a kernel expects for a tensor."""

    kind: Kind = "fp32"
    """float32; bfloat16 or float16 (as bits); int8 codes; or ``branch``: unperturbed, with the rank-1 perturbation
    computed in a side branch of the layer (as LoRA does)."""
    axes: tuple[int, ...] | None = None
    """Order of the dimensions in memory, if it is not the usual one; the first always stays first."""
    scales: Float32 | None = None
    """float32[out]: if present, the tensor is held as int8 codes, one scale per row."""


@dataclass(frozen=True)
class Perturbations:
    """The forward passes that one client makes at one point: W itself ``baseline`` times, then W + step * d_k.

    The order of passes is: baseline, then direction by direction, and within a direction step by step.

    Examples:
        >>> from baffle.core.types import make_table
        >>> d = Directions(make_table({"w": (2, 2)}), "rank1", key=(7, 1))
        >>> p = Perturbations(d, num_directions=1, steps=(0.5, -0.5), baseline=True)
        >>> scratch = np.empty(4, np.float32)
        >>> [w.tolist() for w in p.weights(np.zeros(4, np.float32), scratch)]
        [[0.0, 0.0, 0.0, 0.0], [-0.5, -0.5, 0.5, 0.5], [0.5, 0.5, -0.5, -0.5]]
    """

    directions: Directions
    """Where the directions d_k come from."""
    num_directions: int
    steps: tuple[float, ...]
    """(sigma,) for forward differences, (sigma, -sigma) for central ones."""
    baseline: int
    """How many passes evaluate the unperturbed weights."""
    first: int = 0
    """Number of the first direction."""
    lattice: int = 0
    """m > 0: matrices are rounded to their int8 lattice (the grid of values that int8 codes represent) and perturbed
    by m codes instead of sigma."""

    def split(self, parts: int) -> list[Perturbations]:
        """Divide the passes, in their order, into at most ``parts`` non-empty parts, one per lane."""
        if not self.num_directions:
            ends = [self.baseline * i // parts for i in range(parts + 1)]
            return [replace(self, baseline=e - s) for s, e in itertools.pairwise(ends) if e > s]
        ends = [self.num_directions * i // parts for i in range(parts + 1)]
        shares = [
            replace(self, num_directions=end - start, baseline=self.baseline * (i == 0), first=self.first + start)
            for i, (start, end) in enumerate(itertools.pairwise(ends))
        ]
        return [share for share in shares if len(share)]

    def __len__(self) -> int:
        """Number of passes."""
        return self.baseline + self.num_directions * len(self.steps)

    def weights(self, weights: Weights, scratch: Weights, branches: Factors | None = None) -> Iterator[Weights]:
        """Write the weights of each pass into ``scratch`` and yield it.

        Args:
            weights: The unperturbed weights, float32[n]; never changed.
            scratch: Memory for the perturbed weights, float32[n].
            branches: For tensors that stay unperturbed: memory for the factors (step * a [out], b [rest]) of their
                rank-1 perturbation, by the tensor's number.

        Yields:
            ``scratch``, once per pass.

        Raises:
            PlanError: If a tensor with a branch is pruned: a product cannot leave entries out.
        """
        branches, table = branches or {}, self.directions.table
        point = Point(self, weights, [Layout("branch" if i in branches else "fp32") for i in range(len(table))])
        for evaluated in point.passes(self):
            for i, spec in enumerate(table):
                evaluated.write(i, scratch[spec.slice])
                if i in branches:
                    evaluated.branch(i, *branches[i])
            yield scratch


def unperturbed(table: Table) -> Perturbations:
    """A single pass with the weights as they are."""
    return Perturbations(Directions(table, "rank1", (0, 0)), 0, (), baseline=1)


class Point:
    """Weights prepared to be perturbed: all that the passes of a call have in common. Lanes may share it.

    Args:
        perturbations: The passes of the call.
        weights: float32[n].
        layouts: How each tensor is to be written, one layout per tensor.
        select: Whether to precompute the rounded values that a sign direction can take. Without, every pass rounds
            for itself: slower, with the same bits, and with no more memory than the weights.

    Raises:
        PlanError: For weights of another type or number, and for a branch of a pruned tensor: a product cannot leave
            entries out.
    """

    @np.errstate(over="ignore", invalid="ignore", divide="ignore")  # NaN and infinity are allowed
    def __init__(
        self, perturbations: Perturbations, weights: Weights, layouts: Sequence[Layout], *, select: bool = True
    ) -> None:
        directions, table = perturbations.directions, perturbations.directions.table
        if weights.dtype != np.float32 or weights.shape != (table_size(table),):
            raise PlanError(f"weights: {weights.dtype}{list(weights.shape)}: expected float32[{table_size(table)}]")
        self.directions, self.layouts = directions, tuple(layouts)
        self.rows: Mapping[int, Float32] = {}  # by how many times the step each row of a matrix moves
        if perturbations.lattice and perturbations.steps:
            self.rows = lattice_steps(table, weights, max(perturbations.steps), perturbations.lattice)
        if perturbations.lattice:
            weights = on_lattice(table, weights)
        self.masks: dict[int, npt.NDArray[np.bool_]] = {}
        self._plain: dict[int, AnyArray] | None = {} if select else None
        self._flat = weights
        self.base: list[Float32] = []  # unperturbed weights in the layout's order
        self.pairs: dict[tuple[int, np.float32], tuple[Bits, Bits]] = {}
        for i, (spec, layout) in enumerate(zip(table, self.layouts, strict=True)):
            if layout.kind == "branch" and spec.kept:
                raise PlanError(f"{spec.name}: pruned, with a rank-1 branch: expected one or the other")
            if (mask := spec.mask) is not None:
                self.masks[i] = self.order(i, mask)
            values, cast = self.order(i, weights[spec.slice]), self.cast(i)
            self.base.append(values)
            if select and layout.kind not in ("fp32", "branch") and directions.family != "gaussian":
                for step in {abs(np.float32(s)) for s in perturbations.steps}:
                    self.pairs[i, step] = self._pair(i, values, step, cast)

    def plain(self, tensor: int) -> AnyArray:
        """A tensor's unperturbed weights in the order and precision of its layout."""
        if self._plain is None:
            return self.cast(tensor)(self.base[tensor])
        if tensor not in self._plain:
            self._plain[tensor] = self.cast(tensor)(self.base[tensor])
        return self._plain[tensor]

    def weights(self, tensor: int) -> npt.NDArray[np.float64]:
        """A tensor's unperturbed weights in its own shape and order, not rounded further."""
        spec = self.directions.table[tensor]
        return self._flat[spec.slice].reshape(spec.shape).astype(np.float64)

    @property
    def unperturbed(self) -> Pass:
        """The pass with the weights as they are."""
        return Pass(self, None, 0, np.float32(0))

    def passes(self, part: Perturbations, budget: int | None = None) -> Iterator[Pass]:
        """The passes of one part of the call, in order; directions are drawn in blocks of ``budget`` bytes."""
        for _ in range(part.baseline):
            yield self.unperturbed
        for block in self.blocks(part, budget):
            for k, step in itertools.product(range(block.size), part.steps):
                yield Pass(self, block, k, np.float32(step))

    def blocks(self, part: Perturbations, budget: int | None = None, most: int | None = None) -> Iterator[Block]:
        """The directions of one part, in blocks that fit ``budget`` bytes and have at most ``most`` directions."""
        fit = max(1, int((budget or BUDGET) // max(self._direction_bytes(), 1)))
        size, end = min(fit, most or fit), part.first + part.num_directions
        for start in range(part.first, end, size):
            yield Block(self, slice(start, min(start + size, end)))

    def order(self, tensor: int, values: AnyArray) -> AnyArray:
        """Bring flat values [..., size] of a tensor into its layout's order: [..., out, rest] if it is a matrix."""
        spec, axes = self.directions.table[tensor], self.layouts[tensor].axes
        lead = values.shape[:-1]
        if axes is not None:
            axes = (*range(len(lead)), *(len(lead) + a for a in axes))
            values = np.ascontiguousarray(values.reshape(*lead, *spec.shape).transpose(axes))
        return values.reshape(*lead, *(spec.matrix or (spec.size,)))

    def order_columns(self, tensor: int, columns: AnyArray) -> AnyArray:
        """Bring right factors [K, rest] into the order of the tensor's layout."""
        spec, axes = self.directions.table[tensor], self.layouts[tensor].axes
        if axes is None:
            return columns
        return columns.reshape(-1, *spec.shape[1:]).transpose(0, *axes[1:]).reshape(columns.shape)

    def cast(self, tensor: int) -> Callable[[Float32], AnyArray]:
        """The conversion of float32 values, in layout order, to what the layout holds."""
        layout = self.layouts[tensor]
        if layout.scales is not None:
            return partial(_codes, layout.scales)
        return {"bf16": to_bfloat16, "fp16": to_float16}.get(layout.kind, _itself)

    def _pair(
        self, tensor: int, values: Float32, step: np.float32, cast: Callable[[Float32], AnyArray]
    ) -> tuple[Bits, Bits]:
        """The value of each entry moved up by the step, and the bits in which the value moved down differs from it."""
        move: Any = step
        if tensor in self.rows:
            move = (self.rows[tensor] * step)[:, None]
        if tensor in self.masks:
            move = move * self.masks[tensor]
        up, down = cast(values + move), cast(values - move)
        return up, np.bitwise_xor(up, down)

    def _direction_bytes(self) -> float:
        """Memory of one direction: float32 factors of rank-1 ones, packed signs, Gaussian grid integers in int16."""
        size = 0.0
        for i, spec in enumerate(self.directions.table):
            if self.directions.is_rank1(i):
                size += 4 * sum(spec.matrix or ())
            elif self.directions.family == "gaussian":
                size += 2 * spec.size
            else:
                size += spec.size / 8
        return size


class Block:
    """Some directions that were drawn together: signs for rank-1 tensors, packed bits or grid integers for others."""

    def __init__(self, point: Point, ks: slice) -> None:
        directions = point.directions
        self.size, self._point = ks.stop - ks.start, point
        self._signs = {i: (a, point.order_columns(i, b)) for i, (a, b) in directions.factors(ks).items()}
        self._floats: dict[int, tuple[Float32, Float32]] = {}
        self._bits: dict[int, tuple[Bits, Bits]] = {}
        self._drawn: dict[int, AnyArray] = {}
        self._entries: dict[int, Float32] = {}
        for i, spec in enumerate(directions.table):
            if directions.family == "gaussian":
                self._drawn[i] = directions.entries(i, ks)
            elif i not in self._signs:
                self._drawn[i] = directions.sign_bits(i, ks, 0, -(-spec.size // 256))

    def factors(self, tensor: int) -> tuple[Float32, Float32] | None:
        """Factors (a float32[K, out], b float32[K, rest] in layout order) of rank-1 directions; None for others."""
        if tensor in self._signs and tensor not in self._floats:
            a, b = (f.astype(np.float32) for f in self._signs[tensor])
            self._floats[tensor] = a * self._point.rows[tensor] if tensor in self._point.rows else a, b
        return self._floats.get(tensor)

    def entries(self, tensor: int, k: int | slice) -> Float32:
        """Entries of directions that are not rank-1, in layout order: [(K,) out, rest] or [(K,) size]."""
        point = self._point
        if not isinstance(k, slice) and self.size * point.directions.table[tensor].size <= _KEPT:
            if tensor not in self._entries:
                self._entries[tensor] = self.entries(tensor, slice(0, self.size))
            selected: Float32 = self._entries[tensor][k]
            return selected
        if point.directions.family == "gaussian":
            values = self._drawn[tensor][k] * np.float32(point.directions.unit)
        else:
            values = self._unpacked(tensor, k) * np.float32(2)
            values -= np.float32(1)
        ordered: Float32 = point.order(tensor, values)
        return ordered * point.rows[tensor][:, None] if tensor in point.rows else ordered

    def select(self, tensor: int, k: int | slice, step: np.float32, out: Bits) -> None:
        """Write each entry moved up or down, according to its sign, from the precomputed pair of values."""
        up, differ = self._point.pairs[tensor, abs(step)]
        out = out.view(up.dtype)
        word = out.dtype.type
        if tensor in self._signs:
            if tensor not in self._bits:
                a, b = self._signs[tensor]
                self._bits[tensor] = mask_of(a, word), mask_of(b, word)
            left, right = self._bits[tensor][0][k], self._bits[tensor][1][k]
            np.bitwise_xor((left if step > 0 else ~left)[..., None], right[..., None, :], out=out)
        else:
            bits = self._point.order(tensor, self._unpacked(tensor, k))
            np.subtract(bits, word(1 if step > 0 else 0), out=out, dtype=word, casting="unsafe")
            if step < 0:
                np.negative(out, out=out)
        np.bitwise_and(out, differ, out=out)
        np.bitwise_xor(out, up, out=out)

    def _unpacked(self, tensor: int, k: int | slice) -> npt.NDArray[np.uint8]:
        """Sign bits as an array of 0 and 1."""
        size = self._point.directions.table[tensor].size
        return np.unpackbits(self._drawn[tensor][k], axis=-1, count=size, bitorder="little")


@dataclass(frozen=True)
class Pass:
    """One forward pass: it writes the perturbed weights of any tensor when they are needed."""

    point: Point
    block: Block | None
    """The directions that the pass's own is one of; None for the unperturbed weights."""
    k: int | slice
    """Number of the direction within the block. With a slice this stands for several passes, whose arrays have an
    additional first dimension."""
    step: np.float32

    def write(self, tensor: int, out: AnyArray) -> None:
        """Write a tensor's weights into ``out``, memory in its layout; each entry is rounded once, after the sum."""
        point, layout = self.point, self.point.layouts[tensor]
        base = point.base[tensor]
        out = out.reshape(*out.shape[:1] if isinstance(self.k, slice) else (), *base.shape)
        if self.block is None or layout.kind == "branch":
            plain = point.plain(tensor)
            np.copyto(out.view(plain.dtype), plain)
        elif (tensor, abs(self.step)) in point.pairs:
            self.block.select(tensor, self.k, self.step, out)
        elif layout.kind == "fp32":
            self._add(tensor, base, out)
        else:
            values = np.empty(out.shape, np.float32)
            self._add(tensor, base, values)
            rounded = point.cast(tensor)(values)
            np.copyto(out.view(rounded.dtype), rounded)

    def branch(self, tensor: int, left: Float32, right: Float32) -> None:
        """Write the factors (step * a, b) of a tensor's rank-1 branch; (0, 1) for the unperturbed pass."""
        factors = None if self.block is None else self.block.factors(tensor)
        if factors is None:
            left[:], right[:] = 0, 1
        else:
            np.multiply(factors[0][self.k], self.step, out=left)
            right[:] = factors[1][self.k]

    def _add(self, tensor: int, base: Float32, out: Float32) -> None:
        assert self.block is not None
        mask = self.point.masks.get(tensor)
        factors = self.block.factors(tensor)
        if factors is None:
            np.multiply(self.block.entries(tensor, self.k), self.step, out=out)
            if mask is not None:
                np.multiply(out, mask, out=out)
            np.add(base, out, out=out)
            return
        # a slab of rows at a time, so that it is still in the cache when the base is added
        a, b = (factors[0][self.k] * self.step)[..., None], factors[1][self.k][..., None, :]
        height = max(1, _WHOLE // out[..., :1, :].size)
        for start in range(0, len(base), height):
            rows = slice(start, start + height)
            part = out[..., rows, :]
            np.multiply(a[..., rows, :], b, out=part)
            if mask is not None:
                np.multiply(part, mask[rows], out=part)
            np.add(base[rows], part, out=part)


def _itself(values: Float32) -> AnyArray:
    return values


def _codes(scales: Float32, values: Float32) -> Bits:
    codes = np.empty(values.shape, np.int8)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        encode(values, scales, codes)
    return codes.view(np.uint8)
