"""Weights plus a multiple of a direction, one evaluation after another, out of place, where a kernel wants them.

A perturbed copy is always made from the unperturbed weights (never undone in place: W + d - d drifts), in a buffer
that the caller owns, in the order and precision in which it is read (:class:`Slot`). What all passes of a call have
in common is prepared once, in a :class:`Point` that its workers share:

* in float32 an entry is w + step * d, one product and one sum;
* in fewer bits an entry of a sign direction has two values, so both are rounded once, and a pass only selects.

Directions are drawn a block of them at a time, so memory stays bounded whatever their number.
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
"""Bytes of directions drawn at once, unless told otherwise."""
_KEPT = 2**16  # entries of a block's directions up to which they are kept in float32
_WHOLE = 2**18  # entries of a matrix up to which it is perturbed in one go

Array = npt.NDArray[Any]
Factors = Mapping[int, tuple[Float32, Float32]]
Kind = Literal["fp32", "bf16", "fp16", "int8", "branch"]


@dataclass(frozen=True)
class Slot:
    """How a tensor is wanted: ``kind`` float32, bfloat16 or float16 (as bits), int8 codes, or unperturbed beside its
    rank-1 branch. With ``scales`` (float32[out]) it is held in int8 codes.

    ``axes`` is the order of its dimensions in memory, where that is another; the first stays the first.
    """

    kind: Kind = "fp32"
    axes: tuple[int, ...] | None = None
    scales: Float32 | None = None


@dataclass(frozen=True)
class Perturbations:
    """The evaluations that one client makes at one point: W itself ``baseline`` times, then W + step * d_k.

    ``steps`` are (sigma,) for forward and (sigma, -sigma) for central differences; the order of passes is
    baseline, then direction by direction, step by step.

    Examples:
        >>> from baffle.core.types import make_table
        >>> d = Directions(make_table({"w": (2, 2)}), "rank1", key=(7, 1))
        >>> p = Perturbations(d, num_directions=1, steps=(0.5, -0.5), baseline=True)
        >>> scratch = np.empty(4, np.float32)
        >>> [w.tolist() for w in p.weights(np.zeros(4, np.float32), scratch)]
        [[0.0, 0.0, 0.0, 0.0], [-0.5, -0.5, 0.5, 0.5], [0.5, 0.5, -0.5, -0.5]]
    """

    directions: Directions
    num_directions: int
    steps: tuple[float, ...]
    baseline: int
    first: int = 0
    """Number of the first direction."""
    lattice: int = 0
    """m > 0: matrices are rounded to their int8 lattice and perturbed by m codes instead of sigma."""

    def split(self, parts: int) -> list[Perturbations]:
        """The same passes in the same order, in at most ``parts`` portions for as many workers."""
        if not self.num_directions:
            ends = [self.baseline * i // parts for i in range(parts + 1)]
            return [replace(self, baseline=e - s) for s, e in itertools.pairwise(ends) if e > s]
        ends = [self.num_directions * i // parts for i in range(parts + 1)]
        portions = [
            replace(self, num_directions=end - start, baseline=self.baseline * (i == 0), first=self.first + start)
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
        point = Point(self, weights, [Slot("branch" if i in branches else "fp32") for i in range(len(table))])
        for evaluated in point.passes(self):
            for i, spec in enumerate(table):
                evaluated.write(i, scratch[spec.slice])
                if i in branches:
                    evaluated.branch(i, *branches[i])
            yield scratch


def unperturbed(table: Table) -> Perturbations:
    """One evaluation of the weights as they are."""
    return Perturbations(Directions(table, "rank1", (0, 0)), 0, (), baseline=1)


class Point:
    """Weights (float32[n]) ready to be perturbed as asked, into ``slots``, one a tensor; workers may share it.

    Without ``select`` nothing is kept in low precision, and every pass rounds for itself: slower, the same bits, and
    no more memory than the weights.

    Raises PlanError for weights of another kind or number, and for the branch of a pruned tensor: a product cannot
    leave entries out.
    """

    @np.errstate(over="ignore", invalid="ignore", divide="ignore")  # weights that are not finite become what they may
    def __init__(self, asked: Perturbations, weights: Weights, slots: Sequence[Slot], *, select: bool = True) -> None:
        directions, table = asked.directions, asked.directions.table
        if weights.dtype != np.float32 or weights.shape != (table_size(table),):
            raise PlanError(f"weights: {weights.dtype}{list(weights.shape)}: expected float32[{table_size(table)}]")
        self.directions, self.slots = directions, tuple(slots)
        self.rows: Mapping[int, Float32] = {}  # how many times the step a row of a matrix moves
        if asked.lattice and asked.steps:
            self.rows = lattice_steps(table, weights, max(asked.steps), asked.lattice)
        if asked.lattice:
            weights = on_lattice(table, weights)
        self.masks: dict[int, npt.NDArray[np.bool_]] = {}
        self._plain: dict[int, Array] | None = {} if select else None
        self.base: list[Float32] = []  # unperturbed, in the slot's order
        self.pairs: dict[tuple[int, np.float32], tuple[Bits, Bits]] = {}
        for i, (spec, slot) in enumerate(zip(table, self.slots, strict=True)):
            if slot.kind == "branch" and spec.kept:
                raise PlanError(f"{spec.name}: pruned, with a rank-1 branch: expected one or the other")
            if (mask := spec.mask) is not None:
                self.masks[i] = self.order(i, mask)
            values, cast = self.order(i, weights[spec.slice]), self.cast(i)
            self.base.append(values)
            if select and slot.kind not in ("fp32", "branch") and directions.family != "gaussian":
                for step in {abs(np.float32(s)) for s in asked.steps}:
                    self.pairs[i, step] = self._pair(i, values, step, cast)

    def plain(self, tensor: int) -> Array:
        """A tensor's unperturbed weights, in the slot's order and precision."""
        if self._plain is None:
            return self.cast(tensor)(self.base[tensor])
        if tensor not in self._plain:
            self._plain[tensor] = self.cast(tensor)(self.base[tensor])
        return self._plain[tensor]

    @property
    def unperturbed(self) -> Pass:
        """The evaluation of the weights as they are."""
        return Pass(self, None, 0, np.float32(0))

    def passes(self, part: Perturbations, budget: int | None = None) -> Iterator[Pass]:
        """The passes of a portion of what was asked, in order; directions in blocks of ``budget`` bytes."""
        for _ in range(part.baseline):
            yield self.unperturbed
        for block in self.blocks(part, budget):
            for k, step in itertools.product(range(block.size), part.steps):
                yield Pass(self, block, k, np.float32(step))

    def blocks(self, part: Perturbations, budget: int | None = None, most: int | None = None) -> Iterator[Block]:
        """The directions of a portion, so many at a time as fit ``budget`` bytes, and at most ``most``."""
        fit = max(1, int((budget or BUDGET) // max(self._direction_bytes(), 1)))
        size, end = min(fit, most or fit), part.first + part.num_directions
        for start in range(part.first, end, size):
            yield Block(self, slice(start, min(start + size, end)))

    def order(self, tensor: int, values: Array) -> Array:
        """Flat values [..., size] of a tensor in the order of its slot: [..., out, rest] if it is a matrix."""
        spec, axes = self.directions.table[tensor], self.slots[tensor].axes
        lead = values.shape[:-1]
        if axes is not None:
            axes = (*range(len(lead)), *(len(lead) + a for a in axes))
            values = np.ascontiguousarray(values.reshape(*lead, *spec.shape).transpose(axes))
        return values.reshape(*lead, *(spec.matrix or (spec.size,)))

    def order_columns(self, tensor: int, columns: Array) -> Array:
        """Right factors [K, rest] in the order of the slot."""
        spec, axes = self.directions.table[tensor], self.slots[tensor].axes
        if axes is None:
            return columns
        return columns.reshape(-1, *spec.shape[1:]).transpose(0, *axes[1:]).reshape(columns.shape)

    def cast(self, tensor: int) -> Callable[[Float32], Array]:
        """Float32 values in slot order -> what the slot holds."""
        slot = self.slots[tensor]
        if slot.scales is not None:
            return partial(_codes, slot.scales)
        return {"bf16": to_bfloat16, "fp16": to_float16}.get(slot.kind, _itself)

    def _pair(
        self, tensor: int, values: Float32, step: np.float32, cast: Callable[[Float32], Array]
    ) -> tuple[Bits, Bits]:
        """The value of an entry that goes up, and the bits in which one that goes down differs."""
        move: Any = step
        if tensor in self.rows:
            move = (self.rows[tensor] * step)[:, None]
        if tensor in self.masks:
            move = move * self.masks[tensor]
        up, down = cast(values + move), cast(values - move)
        return up, np.bitwise_xor(up, down)

    def _direction_bytes(self) -> float:
        """Of one direction, as it is kept: factors in float32, signs packed, grid in int16; vectors in float32."""
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
    """Some directions, drawn: signs for rank-1 tensors, packed bits or grid integers for the rest."""

    def __init__(self, point: Point, ks: slice) -> None:
        directions = point.directions
        self.size, self._point = ks.stop - ks.start, point
        self._signs = {i: (a, point.order_columns(i, b)) for i, (a, b) in directions.factors(ks).items()}
        self._floats: dict[int, tuple[Float32, Float32]] = {}
        self._bits: dict[int, tuple[Bits, Bits]] = {}
        self._drawn: dict[int, Array] = {}
        self._entries: dict[int, Float32] = {}
        for i, spec in enumerate(directions.table):
            if directions.family == "gaussian":
                self._drawn[i] = directions.entries(i, ks)
            elif i not in self._signs:
                self._drawn[i] = directions.sign_bits(i, ks, 0, -(-spec.size // 256))

    def factors(self, tensor: int) -> tuple[Float32, Float32] | None:
        """(a float32[K, out], b float32[K, rest] in slot order) of a rank-1 direction; None if it is not one."""
        if tensor in self._signs and tensor not in self._floats:
            a, b = (f.astype(np.float32) for f in self._signs[tensor])
            self._floats[tensor] = a * self._point.rows[tensor] if tensor in self._point.rows else a, b
        return self._floats.get(tensor)

    def entries(self, tensor: int, k: int | slice) -> Float32:
        """Entries of directions in slot order where they are no products: [(K,) out, rest] or [(K,) size]."""
        point = self._point
        if not isinstance(k, slice) and self.size * point.directions.table[tensor].size <= _KEPT:
            if tensor not in self._entries:
                self._entries[tensor] = self.entries(tensor, slice(0, self.size))
            kept: Float32 = self._entries[tensor][k]
            return kept
        if point.directions.family == "gaussian":
            values = self._drawn[tensor][k] * np.float32(point.directions.unit)
        else:
            values = self._unpacked(tensor, k) * np.float32(2)
            values -= np.float32(1)
        ordered: Float32 = point.order(tensor, values)
        return ordered * point.rows[tensor][:, None] if tensor in point.rows else ordered

    def select(self, tensor: int, k: int | slice, step: np.float32, out: Bits) -> None:
        """Write an entry's value up or down, by its sign."""
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
        """Sign bits as 0 and 1."""
        size = self._point.directions.table[tensor].size
        return np.unpackbits(self._drawn[tensor][k], axis=-1, count=size, bitorder="little")


@dataclass(frozen=True)
class Pass:
    """One evaluation: the weights of any tensor, when they are needed.

    ``k`` counts within the block; a slice of it is as many evaluations, whose arrays have a dimension more, the first.
    """

    point: Point
    block: Block | None
    k: int | slice
    step: np.float32

    def write(self, tensor: int, out: Array) -> None:
        """Write a tensor's weights into its slot; entries of sign directions are rounded once, in the sum."""
        point, slot = self.point, self.point.slots[tensor]
        base = point.base[tensor]
        out = out.reshape(*out.shape[:1] if isinstance(self.k, slice) else (), *base.shape)
        if self.block is None or slot.kind == "branch":
            plain = point.plain(tensor)
            np.copyto(out.view(plain.dtype), plain)
        elif (tensor, abs(self.step)) in point.pairs:
            self.block.select(tensor, self.k, self.step, out)
        elif slot.kind == "fp32":
            self._add(tensor, base, out)
        else:
            values = np.empty(out.shape, np.float32)
            self._add(tensor, base, values)
            rounded = point.cast(tensor)(values)
            np.copyto(out.view(rounded.dtype), rounded)

    def branch(self, tensor: int, left: Float32, right: Float32) -> None:
        """Write the factors (step * a, b) of a tensor's rank-1 branch; (0, 1) if it is not perturbed."""
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
        a, b = (factors[0][self.k] * self.step)[..., None], factors[1][self.k][..., None, :]
        height = max(1, _WHOLE // out[..., :1, :].size)
        for start in range(0, len(base), height):
            rows = slice(start, start + height)
            part = out[..., rows, :]
            np.multiply(a[..., rows, :], b, out=part)
            if mask is not None:
                np.multiply(part, mask[rows], out=part)
            np.add(base[rows], part, out=part)


def _itself(values: Float32) -> Array:
    return values


def _codes(scales: Float32, values: Float32) -> Bits:
    codes = np.empty(values.shape, np.int8)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        encode(values, scales, codes)
    return codes.view(np.uint8)
