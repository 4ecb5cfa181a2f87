"""Attached states and weights: float32, with bytes of equal significance side by side, deflated.

Signs and exponents of weights are alike, mantissas are not: sorting the bytes of numbers by significance (as HDF5's
shuffle filter does) lets deflate find the regularity. Slots that are zero, as before the first round, take no space.
"""

from __future__ import annotations

import zlib

import msgspec
import numpy as np

from baffle.core.state import State
from baffle.core.types import Weights
from baffle.errors import ReplyError

_OVERHEAD = 2**16


class _Packed(msgspec.Struct, frozen=True):
    round: int
    step: int
    arrays: dict[str, bytes]


_decoder = msgspec.msgpack.Decoder(_Packed)


def pack_state(state: State) -> bytes:
    """Pack the replay state: weights, optimizer slots, step, round. Not the average, which no client needs."""
    arrays = {"weights": state.weights} | {f"slots.{name}": values for name, values in state.slots.items()}
    return _pack(_Packed(state.round, state.step, {name: _shuffle(a) for name, a in arrays.items()}))


def unpack_state(data: bytes, size: int, most_slots: int = 4) -> State:
    """Unpack a replay state.

    Args:
        data: what :func:`pack_state` returned; it comes from another machine and is checked.
        size: number of parameters.
        most_slots: upper limit of optimizer slots.

    Raises:
        ReplyError: for malformed data, another number of parameters, NaN or infinity.

    Examples:
        >>> state = State(3, 2, np.ones(4, np.float32), {"m": np.zeros(4, np.float32)}, np.ones(4, np.float32))
        >>> unpack_state(pack_state(state), 4).slots["m"]
        array([0., 0., 0., 0.], dtype=float32)
    """
    packed = _unpack(data, 4 * size * (1 + most_slots))
    arrays = {name: _unshuffle(name, part, size) for name, part in packed.arrays.items()}
    weights = arrays.pop("weights", None)
    if weights is None or packed.round < 0 or packed.step < 0:
        raise ReplyError("packed arrays without weights: expected a state")
    slots = {name.removeprefix("slots."): values for name, values in arrays.items()}
    return State(packed.round, packed.step, weights, slots, weights)


def pack_weights(weights: Weights) -> bytes:
    """Pack the weights alone, for stateless clients."""
    return _pack(_Packed(0, 0, {"weights": _shuffle(weights)}))


def unpack_weights(data: bytes, size: int) -> Weights:
    """Unpack weights. Raises ReplyError unless there are exactly ``size`` finite ones."""
    return unpack_state(data, size, most_slots=0).weights


def _pack(packed: _Packed) -> bytes:
    return zlib.compress(msgspec.msgpack.encode(packed), 1)


def _unpack(data: bytes, longest: int) -> _Packed:
    """Inflate up to ``longest`` bytes of arrays, so that a small message cannot exhaust the memory."""
    inflater = zlib.decompressobj()
    try:
        packed = _decoder.decode(inflater.decompress(data, longest + _OVERHEAD))
    except (zlib.error, ValueError, RecursionError) as error:
        raise ReplyError(f"malformed attachment: {error}") from error
    if not inflater.eof or inflater.unused_data:  # so its checksum was not verified
        raise ReplyError(f"malformed attachment: {len(data)} bytes: expected a whole one and nothing after it")
    return packed


def _shuffle(values: Weights) -> bytes:
    return values.astype("<f4", copy=False).view(np.uint8).reshape(-1, 4).T.tobytes()


def _unshuffle(name: str, data: bytes, size: int) -> Weights:
    if len(data) != 4 * size:
        raise ReplyError(f"{name} of {len(data)} bytes: expected {4 * size}, for the tensors of this model")
    values = np.ascontiguousarray(np.frombuffer(data, np.uint8).reshape(4, size).T).view("<f4").reshape(size)
    if not np.isfinite(values).all():
        raise ReplyError(f"{name} with NaN or infinity: expected finite numbers")
    return values.astype(np.float32, copy=False)
