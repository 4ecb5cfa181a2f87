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

LIMIT = 2**14 - 1
"""Largest magnitude of one encoded scalar (15 bits with its sign)."""
MAX_WEIGHT = 255
"""Largest integer weight of one client."""
MAX_WEIGHT_SUM = 2**17 - 1
"""Largest sum of the weights of a round, so that a weighted sum of scalars fits 4 bytes."""


class ParamSpec(msgspec.Struct, frozen=True):
    """One trainable tensor: its name, its shape and where it starts in the flat weights.

    Attributes:
        name: the parameter's name in the model.
        shape: its shape; empty for a scalar.
        offset: index of its first entry in the flat weights.
        kept: pruning mask of a pruned tensor: one bit per entry, lowest bit first, 1 for entries that were kept. Only
            these are perturbed and trained, the others stay 0. Empty if the tensor is not pruned.

    Examples:
        >>> ParamSpec("conv.weight", (16, 1, 5, 5), offset=0).matrix
        (16, 25)
    """

    name: str
    shape: tuple[int, ...]
    offset: int
    kept: bytes = b""

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
    exponent: int
    """Scalars travel as integers in units of 2**exponent."""
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
    next_cohort: tuple[int, ...] = ()
    """In a secure sum, the participants of the next round, so that their keys for it can come with the reply."""
    state_sha256: bytes
    """Hash of the replay state that the round starts from."""


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """What a client answers: K weighted integers per local step, its weight, and two counts."""

    round: int
    client: int
    weight: int
    scalars: bytes
    """int32, little-endian, [local_steps, K]: weight x fixed-point scalar."""
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
    exponent: int
    local_steps: int
    participants: tuple[int, ...]
    weight_sum: int
    scalars: bytes
    """int32, little-endian, [vectors, local_steps, K]: one vector with shared directions, else one per participant."""
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
        """The scalars as int64[vectors, local_steps, K]."""
        return unpack_int32(self.scalars).reshape(-1, self.local_steps, self.num_directions)


@dataclass(frozen=True)
class Aggregate:
    """What the server learns from a round.

    Attributes:
        vectors: weighted scalars, int64[V, local_steps, K]: their sum (V = 1) with shared directions, else one vector
            per participant.
        participants: the clients in it, in ascending order.
        weight_sum: sum of their weights.
        clipped: number of their scalars that were clipped.
        nonfinite: number of their scalars that were NaN or infinite.
    """

    vectors: Integers
    participants: tuple[int, ...]
    weight_sum: int
    clipped: int
    nonfinite: int


def pack_int32(values: Integers) -> bytes:
    """Encode integers as little-endian int32.

    Raises:
        ReplyError: an integer does not fit.

    Examples:
        >>> pack_int32(np.array([1, -2]))
        b'\\x01\\x00\\x00\\x00\\xfe\\xff\\xff\\xff'
    """
    if values.size and int(np.abs(values).max()) >= 2**31:
        raise ReplyError(f"scalar {int(np.abs(values).max())}: expected a magnitude below 2**31")
    return values.astype("<i4").tobytes()


def unpack_int32(data: bytes) -> Integers:
    """Decode little-endian int32 to int64; the inverse of :func:`pack_int32`."""
    return np.frombuffer(data, "<i4").astype(np.int64)
