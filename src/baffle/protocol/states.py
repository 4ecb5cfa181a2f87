"""States and weights as they travel: float32, the bytes of equal significance side by side, deflated.

Signs and exponents of weights are alike, mantissas are not: sorting the bytes of numbers by significance (as HDF5's
shuffle filter does) makes deflate find what there is. Slots that are zero, as before the first round, cost nothing.
"""

from __future__ import annotations

import zlib

import msgspec
import numpy as np

from baffle.core.state import State
from baffle.core.types import Weights
from baffle.errors import ReplyError

_BESIDES = 2**16


class _Parcel(msgspec.Struct, frozen=True):
    round: int
    step: int
    arrays: dict[str, bytes]


_decoder = msgspec.msgpack.Decoder(_Parcel)


def pack_state(state: State) -> bytes:
    """The replay state: weights, optimizer slots, step, round. Not the average, which no client needs."""
    arrays = {"weights": state.weights} | {f"slots.{name}": values for name, values in state.slots.items()}
    return _pack(_Parcel(state.round, state.step, {name: _shuffle(a) for name, a in arrays.items()}))


def unpack_state(data: bytes, size: int, most_slots: int = 4) -> State:
    """The state of ``size`` parameters in a parcel. Raises ReplyError if it is none.

    Examples:
        >>> state = State(3, 2, np.ones(4, np.float32), {"m": np.zeros(4, np.float32)}, np.ones(4, np.float32))
        >>> unpack_state(pack_state(state), 4).slots["m"]
        array([0., 0., 0., 0.], dtype=float32)
    """
    parcel = _unpack(data, 4 * size * (1 + most_slots))
    arrays = {name: _unshuffle(name, part, size) for name, part in parcel.arrays.items()}
    weights = arrays.pop("weights", None)
    if weights is None or parcel.round < 0 or parcel.step < 0:
        raise ReplyError("a parcel without weights: expected a state")
    slots = {name.removeprefix("slots."): values for name, values in arrays.items()}
    return State(parcel.round, parcel.step, weights, slots, weights)


def pack_weights(weights: Weights) -> bytes:
    """The weights alone."""
    return _pack(_Parcel(0, 0, {"weights": _shuffle(weights)}))


def unpack_weights(data: bytes, size: int) -> Weights:
    """The inverse of :func:`pack_weights`. Raises ReplyError if there are not ``size`` finite weights in it."""
    return unpack_state(data, size, most_slots=0).weights


def _pack(parcel: _Parcel) -> bytes:
    return zlib.compress(msgspec.msgpack.encode(parcel), 1)


def _unpack(data: bytes, longest: int) -> _Parcel:
    """No more than ``longest`` bytes of arrays, whatever a small parcel would swell to."""
    inflater = zlib.decompressobj()
    try:
        parcel = _decoder.decode(inflater.decompress(data, longest + _BESIDES))
    except (zlib.error, ValueError, RecursionError) as error:
        raise ReplyError(f"malformed parcel: {error}") from error
    if not inflater.eof or inflater.unused_data:  # its checksum was not seen
        raise ReplyError(f"malformed parcel: {len(data)} bytes: expected a whole one and nothing behind it")
    return parcel


def _shuffle(values: Weights) -> bytes:
    return values.astype("<f4", copy=False).view(np.uint8).reshape(-1, 4).T.tobytes()


def _unshuffle(name: str, data: bytes, size: int) -> Weights:
    if len(data) != 4 * size:
        raise ReplyError(f"{name} of {len(data)} bytes: expected {4 * size}, for the tensors of this model")
    values = np.ascontiguousarray(np.frombuffer(data, np.uint8).reshape(4, size).T).view("<f4").reshape(size)
    if not np.isfinite(values).all():
        raise ReplyError(f"{name} with NaN or infinity: expected finite numbers")
    return values.astype(np.float32, copy=False)
