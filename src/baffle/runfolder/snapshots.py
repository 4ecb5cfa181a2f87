"""Weights and states as safetensors files, which PyTorch and many other libraries can read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from baffle.core.state import State, weights_sha256
from baffle.core.types import Table, Weights, table_size


def encode_weights(table: Table, weights: Weights) -> bytes:
    """Flat weights as the model's tensors, by name."""
    return save({spec.name: weights[spec.slice].reshape(spec.shape) for spec in table})


def decode_weights(table: Table, data: bytes) -> Weights:
    """The inverse of :func:`encode_weights`. Raises ValueError if the tensors are not those of the table."""
    try:
        tensors = load(data)
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    flat = np.empty(table_size(table), np.float32)
    for spec in table:
        tensor = tensors.get(spec.name)
        if tensor is None or tensor.shape != spec.shape or tensor.dtype != np.float32:
            raise ValueError(f"{spec.name}: expected a float32 tensor of shape {spec.shape}")
        flat[spec.slice] = tensor.reshape(-1)
    return flat


def encode_state(state: State) -> bytes:
    """A state: flat weights, average and optimizer slots; round and step as metadata."""
    tensors = {"weights": state.weights, "average": state.ema_weights}
    tensors |= {f"slots.{name}": values for name, values in state.slots.items()}
    average_sha256 = weights_sha256(state.ema_weights).hex()
    return save(tensors, {"round": str(state.round), "step": str(state.step), "average_sha256": average_sha256})


def load_state(file: Path) -> State | None:
    """The state in a file, or None if it cannot be read or its average was changed.

    The caller must check weights and slots against the hash in a row.
    """
    try:
        data = file.read_bytes()
        tensors = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        slots = {name.removeprefix("slots."): v for name, v in tensors.items() if name.startswith("slots.")}
        state = State(int(header["round"]), int(header["step"]), tensors["weights"], slots, tensors["average"])
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
    return state if header.get("average_sha256") == weights_sha256(state.ema_weights).hex() else None
