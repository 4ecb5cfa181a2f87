"""The values that travel between server, client and journal, and the names of their arrays.

Everything here is immutable. Messages are encoded as MessagePack maps with the fields in this order, and hashed, so
a field that is moved or renamed changes the protocol (``docs/protocol.md``, the specification for other languages).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

from baffle.errors import ModelError, ReplyError

Weights: TypeAlias = npt.NDArray[np.float32]
"""All trainable parameters, flat, in table order: float32[n]."""
Integers: TypeAlias = npt.NDArray[np.int64]
"""Fixed-point scalars, or sums of them: int64."""
Losses: TypeAlias = npt.NDArray[np.float32]
"""Per-example losses: float32[passes, examples]."""
Array: TypeAlias = npt.NDArray[np.generic]
"""An array of any type."""

Family = Literal["rank1", "rademacher", "gaussian"]
Sharing = Literal["shared", "per-client"]
Difference = Literal["forward", "central"]

UInt64 = Annotated[int, msgspec.Meta(ge=0)]

DEFAULT_BITS = 15
"""Bits of one encoded scalar, with its sign."""
MOST_BITS = 32
MAX_WEIGHT = 255
"""Largest integer weight of one client."""
FEW_BITS, MAX_WEIGHT_OF_FEW_BITS = 8, 15
"""The same where numbers have few bits: sums then need few more than the numbers themselves."""
MAX_WEIGHT_SUM = 2**17 - 1
"""Largest sum of the weights of a round."""


class Credit(msgspec.Struct, frozen=True, array_like=True):
    """Which numbers of a reply a tensor's gradient is rebuilt from (``docs/protocol.md``, "Units").

    Tensors with the same ``unit`` share numbers. What these are depends on ``kind``:

    * ``loss``: per direction one number, the derivative of the loss along it;
    * ``rows``: per direction one number for each row (entry of the first dimension) of the tensor;
    * ``exact``: the gradient itself, one number per entry, and no direction.

    Attributes:
        unit: number of the unit, from 0 without gaps.
        kind: what its numbers are.
        runs: of kind rows, which number belongs to which row, as runs (rows, first number, step from row to row).
            Empty: row r has number r.
        auxiliary: the tensor exists for training alone (a local head): it is no part of the model.
    """

    unit: int = 0
    kind: Literal["loss", "rows", "exact"] = "loss"
    runs: tuple[tuple[int, int, int], ...] = ()
    auxiliary: bool = False


class ParamSpec(msgspec.Struct, frozen=True):
    """One trainable tensor: its name, its shape and where it starts in the flat weights.

    Attributes:
        name: the parameter's name in the model.
        shape: its shape; empty for a scalar.
        offset: index of its first entry in the flat weights.
        kept: pruning mask of a pruned tensor: one bit per entry, lowest bit first, 1 for entries that were kept. Only
            these are perturbed and trained, the others stay 0. Empty if the tensor is not pruned.
        credit: which numbers of a reply its gradient is rebuilt from.

    Examples:
        >>> ParamSpec("conv.weight", (16, 1, 5, 5), offset=0).matrix
        (16, 25)
    """

    name: str
    shape: tuple[int, ...]
    offset: int
    kept: bytes = b""
    credit: Credit = Credit()

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def matrix(self) -> tuple[int, int] | None:
        """The shape as (out, rest) if the tensor has two or more dimensions, else None."""
        if len(self.shape) < 2 or self.size == 0:
            return None
        return self.shape[0], self.size // self.shape[0]

    @property
    def mask(self) -> npt.NDArray[np.bool_] | None:
        """The pruning mask, bool[size], True for entries that were kept; None if the tensor is not pruned."""
        if not self.kept:
            return None
        bits = np.frombuffer(self.kept, np.uint8)
        return np.unpackbits(bits, count=self.size, bitorder="little").view(np.bool_)

    @property
    def slice(self) -> slice:
        """Where the tensor lies in the flat weights."""
        return slice(self.offset, self.offset + self.size)


Table: TypeAlias = tuple[ParamSpec, ...]
"""All trainable tensors, in the order of the flat weights."""
Masks: TypeAlias = Mapping[str, npt.NDArray[np.bool_]]
"""Pruning masks by tensor name, in the tensors' shapes: True for entries that were kept."""


def make_table(shapes: dict[str, tuple[int, ...]], masks: Masks | None = None) -> Table:
    """Lay tensors out one after another in the flat weights.

    Args:
        shapes: shape of each tensor, by name, in order.
        masks: pruning masks of those that are pruned.

    Raises:
        ModelError: a mask has another shape than its tensor, or no tensor.

    Examples:
        >>> [(p.name, p.offset) for p in make_table({"w": (3, 2), "b": (3,)})]
        [('w', 0), ('b', 6)]
    """
    masks = masks or {}
    specs: list[ParamSpec] = []
    offset = 0
    for name, mask in masks.items():
        if name not in shapes or mask.shape != tuple(shapes[name]) or mask.dtype != np.bool_:
            expected = f"bool{list(shapes[name])}" if name in shapes else f"one of {', '.join(shapes)}"
            raise ModelError(f"mask of {name}: {mask.dtype}{list(mask.shape)}: expected {expected}")
    for name, shape in shapes.items():
        kept = np.packbits(masks[name].reshape(-1), bitorder="little").tobytes() if name in masks else b""
        specs.append(ParamSpec(name, tuple(int(d) for d in shape), offset, kept))
        offset += specs[-1].size
    return tuple(specs)


def table_size(table: Table) -> int:
    """Number of trainable parameters n."""
    return sum(spec.size for spec in table)


Cohort: TypeAlias = Mapping[int, int]
"""The participants of a round: client -> its integer weight."""


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """What the server asks of the clients in one round."""

    round: int
    key: UInt64
    """Run key: together with ``round`` it defines every direction of the round."""
    family: Family
    sharing: Sharing
    difference: Difference
    num_directions: int
    sigma: float
    """Step of the finite difference."""
    lattice: int
    """0: every tensor is perturbed by sigma; m > 0: matrices are perturbed on the int8 lattice, by m codes."""
    slices: int = 1
    """S: a client's mini-batch is cut into so many slices, each with num_directions directions of its own."""
    bits: int = DEFAULT_BITS
    """Bits of one encoded number, with its sign; 1: the sign alone."""
    exponents: tuple[int, ...]
    """Numbers of each unit travel as integers in units of 2**exponent."""
    unit_sizes: tuple[int, ...] = ()
    """How many numbers a reply has of each unit, per local step; empty: one unit, one number per direction."""
    clip: float | None
    """Clipping norm of one scalar, a directional derivative of the loss; None: only the range limits it."""
    batch_size: int | None
    """Examples in a mini-batch; None: all that the client has."""
    local_steps: int
    local_lr: float
    """Learning rate of the local steps; 0 if there is only one."""
    quantum: int
    """Examples per unit of a client's integer weight."""
    secure: int = 0
    """In a secure sum, the largest number of neighbours that a client shares masks with; 0: plain sums."""
    word: int = 32
    """In a secure sum: bits of a word, enough for any sum of the cohort's weighted integers."""
    next_cohort: tuple[int, ...] = ()
    """In a secure sum, the participants of the next round, so that their keys for it can come with the reply."""
    state_sha256: bytes
    """Hash of the replay state that the round starts from."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many numbers a reply has of each unit, per local step."""
        return self.unit_sizes or (self.num_directions * self.slices,)

    @property
    def numbers(self) -> int:
        """How many numbers a reply has per local step."""
        return sum(self.sizes)

    @property
    def limit(self) -> int:
        """Largest magnitude of one encoded number."""
        return limit_of(self.bits)


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """What a client answers: the integers of each local step, how large they were, and two counts."""

    round: int
    client: int
    weight: int
    scalars: bytes
    """The integers [local_steps, numbers], packed (:func:`pack`) in the task's bits; not multiplied by the weight."""
    magnitudes: tuple[int, ...]
    """Weight x mean magnitude of each unit's numbers before rounding, in units of 2**(exponent - 8)."""
    clipped: int
    """Number of scalars that were clipped."""
    nonfinite: int
    """Number of scalars that were NaN or infinite, and are sent as 0."""


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One record of the journal: all that is needed to repeat a round's update bit for bit."""

    round: int
    key: UInt64
    applied: bool
    """False if the round only measured the scale, had no usable scalar, or rolled back: there is no update."""
    restores: int | None
    """After a divergence, the round to whose state this row returns, repeating that round's scalars; else None."""
    rollbacks: int
    """Number of rollbacks so far; each shrinks the learning rates."""
    family: Family
    sharing: Sharing
    num_directions: int
    difference: Difference
    sigma: float
    lattice: int
    exponents: tuple[int, ...]
    slices: int = 1
    local_steps: int
    participants: tuple[int, ...]
    weight_sum: int
    numbers: int
    """How many numbers a vector has per local step."""
    bits: int
    """Bits of one number in ``scalars``: as few as the largest needs."""
    scalars: bytes
    """Packed sums [vectors, local_steps, numbers] of weight x integer; one vector if shared, else one per participant.
    """
    magnitudes: tuple[int, ...]
    """Mean magnitude of the clients' numbers of each unit, in units of 2**(exponent - 8)."""
    clipped: int
    nonfinite: int
    clip_factor: float
    """Factor that the gradient estimate is multiplied by (``ClipUpdate``); a float32."""
    optimizer: str
    """Name of the update rule."""
    coefficients: dict[str, float]
    """Every number of the update that is not element-wise; each is exactly a float32."""
    ema: float
    """Decay of the weights' moving average at this row; a float32."""
    weights_sha256: bytes
    """Hash of the weights after this row."""
    state_sha256: bytes
    """Hash of the replay state (weights, optimizer slots, step) after this row."""

    @property
    def integers(self) -> Integers:
        """The sums as int64[vectors, local_steps, numbers]."""
        shape = 1 if self.sharing == "shared" else len(self.participants), self.local_steps, self.numbers
        return unpack(self.scalars, self.bits, math.prod(shape)).reshape(shape)


@dataclass(frozen=True)
class Aggregate:
    """What the server learns from a round.

    Attributes:
        vectors: weighted numbers, int64[V, local_steps, numbers]: their sum (V = 1) with shared directions, else one
            vector per participant.
        participants: the clients in it, in ascending order.
        weight_sum: sum of their weights.
        magnitudes: of each unit, the sum of their replies' magnitudes.
        clipped: number of their scalars that were clipped.
        nonfinite: number of their scalars that were NaN or infinite.
    """

    vectors: Integers
    participants: tuple[int, ...]
    weight_sum: int
    magnitudes: tuple[int, ...]
    clipped: int
    nonfinite: int


def limit_of(bits: int) -> int:
    """Largest magnitude of an integer of ``bits`` bits, the sign among them; one bit is the sign of +1 or -1.

    Examples:
        >>> [limit_of(bits) for bits in (1, 2, 4, 15)]
        [1, 1, 7, 16383]
    """
    return max(1, (1 << (bits - 1)) - 1)


def bits_of(values: Integers) -> int:
    """The fewest bits, at least 2, in which :func:`pack` keeps every value.

    Examples:
        >>> [bits_of(np.array([v])) for v in (0, 1, -2, 127, -129)]
        [2, 2, 3, 8, 9]
    """
    largest = max(abs(int(values.max())), abs(int(values.min()))) if values.size else 0
    return max(2, largest.bit_length() + 1)


def pack(values: Integers, bits: int) -> bytes:
    """Integers in ``bits`` bits each, two's complement, lowest bit first, without gaps; one bit is 1 for +1.

    Raises:
        ReplyError: A value does not fit.

    Examples:
        >>> pack(np.array([1, -2, 7]), 4).hex(), pack(np.array([1, -1, 1]), 1).hex()
        ('e107', '05')
    """
    flat = np.asarray(values, np.int64).reshape(-1)
    if flat.size and int(np.abs(flat).max()) > limit_of(bits):
        raise ReplyError(f"integer {int(np.abs(flat).max())}: expected a magnitude of at most {limit_of(bits)}")
    if bits == 1:
        return np.packbits(flat > 0, bitorder="little").tobytes()
    if bits in (8, 16, 32):  # the same bytes, faster
        return flat.astype(f"<i{bits // 8}").tobytes()
    return lowest_bits(flat, bits)


def lowest_bits(values: npt.NDArray[np.integer], bits: int) -> bytes:
    """The lowest ``bits`` bits of each of flat integers, lowest first, without gaps.

    Examples:
        >>> lowest_bits(np.array([0xFFFFFF1, 0x2], np.uint32), 12).hex()
        'f12f00'
    """
    spread = values[:, None] >> np.arange(bits, dtype=values.dtype) & 1
    return np.packbits(spread.astype(np.uint8).reshape(-1), bitorder="little").tobytes()


def packed_size(count: int, bits: int) -> int:
    """Bytes of ``count`` packed integers."""
    return -(-count * bits // 8)


def unpack(data: bytes, bits: int, count: int) -> Integers:
    """The inverse of :func:`pack`: int64[count].

    Raises:
        ReplyError: ``data`` is too long or too short for ``count`` integers, or the unused bits are not 0.
    """
    if len(data) != packed_size(count, bits):
        raise ReplyError(f"{len(data)} bytes of integers: expected {packed_size(count, bits)}")
    if bits in (8, 16, 32):
        return np.frombuffer(data, f"<i{bits // 8}").astype(np.int64)
    every = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
    if every[count * bits :].any():
        raise ReplyError("bits behind the last integer: expected 0")
    spread = every[: count * bits].reshape(count, bits).astype(np.int64)
    if bits == 1:
        return spread[:, 0] * 2 - 1
    place = np.int64(1) << np.arange(bits)
    place[-1] = -place[-1]
    return np.asarray(spread @ place)
