"""Hashes of weights and states."""

from __future__ import annotations

import hashlib

import numpy as np

from baffle.core.state import State, state_sha256, weights_sha256


def test_hashes_are_what_the_protocol_says() -> None:
    weights = np.array([1, -2.5], np.float32)
    assert weights_sha256(weights) == hashlib.sha256(b"\0\0\x80?\0\0 \xc0").digest()
    state = State(4, 3, weights, {"v": np.array([4, 4], np.float32), "m": np.array([2, 2], np.float32)}, weights)
    data = weights_sha256(weights) + b"\0\0\0@" * 2 + b"\0\0\x80@" * 2 + (3).to_bytes(8, "little")
    assert state_sha256(state) == hashlib.sha256(data).digest()
