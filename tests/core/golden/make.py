"""Write directions.json: the numbers that every implementation must draw, frozen.

A second implementation of docs/protocol.md, in plain integers, that shares no code with baffle:
``python tests/core/golden/make.py``. The file is frozen: a change of it breaks every journal ever written.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from bisect import bisect_right
from decimal import ROUND_HALF_UP, Decimal, localcontext
from functools import cache
from pathlib import Path
from typing import Any

PATH = Path(__file__).with_name("directions.json")
SIGNS, LEFT, RIGHT, GAUSSIAN = 1, 2, 3, 4
SHAPES: dict[str, list[int]] = {"conv": [3, 2, 2, 2], "bias": [5], "scale": [], "wide": [2, 300], "vector": [300]}
LONG = 70_000  # long enough for the compiled generator

Place = tuple[tuple[int, int], int, int, int, int]  # key, client, step, tensor, direction


def block(key: tuple[int, int], counter: tuple[int, int, int, int]) -> list[int]:
    """One block of Philox4x64-10: four 64-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2E7470EE14C6C93 * c0, 0xCA5A826395121157 * c2
        c0, c1, c2, c3 = (p1 >> 64) ^ c1 ^ k0, p1 % 2**64, (p0 >> 64) ^ c3 ^ k1, p0 % 2**64
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) % 2**64, (k1 + 0xBB67AE8584CAA73B) % 2**64
    return [c0, c1, c2, c3]


def words(place: Place, purpose: int, count: int, bits: int) -> list[int]:
    """The first ``count`` words of ``bits`` bits of one direction of one tensor."""
    key, client, step, tensor, direction = place
    last = purpose * 2**56 + client * 2**24 + step
    result: list[int] = []
    for number in range(-(-count * bits // 256)):
        whole = sum(w << 64 * i for i, w in enumerate(block(key, (number, direction, tensor, last))))
        result += [whole >> i & (2**bits - 1) for i in range(0, 256, bits)]
    return result[:count]


def signs(place: Place, purpose: int, count: int) -> str:
    """Signs as text: bit 1 is +, bit 0 is -."""
    return "".join("-+"[bit] for bit in words(place, purpose, count, 1))


@cache
def thresholds() -> list[int]:
    """round(2**31 P(|X| <= m)) for m = 0, 1, ... while below 2**31; P(X = m) ~ exp(-m**2 / 2**21)."""
    with localcontext() as context:
        context.prec = 60
        weights = [(Decimal(-m * m) / 2**21).exp() for m in range(16_000)]
        total = 2 * sum(weights, Decimal(0)) - 1
        result, cumulative = [], Decimal(-1)
        for weight in weights:
            cumulative += 2 * weight
            threshold = int((cumulative / total * 2**31).to_integral_value(ROUND_HALF_UP))
            if threshold >= 2**31:
                break
            result.append(threshold)
    return result


def gaussian(place: Place, count: int) -> list[int]:
    """Entries in units of 2**-10: 32 bits each, the lowest is the sign."""
    draws = words(place, GAUSSIAN, count, 32)
    return [(-1 if draw & 1 else 1) * bisect_right(thresholds(), draw >> 1) for draw in draws]


def tensor_case(family: str, shape: list[int], place: Place) -> Any:
    """One direction of one tensor."""
    if family == "gaussian":
        return gaussian(place, math.prod(shape))
    if family == "rank1" and len(shape) >= 2:
        return {"left": signs(place, LEFT, shape[0]), "right": signs(place, RIGHT, math.prod(shape[1:]))}
    return signs(place, SIGNS, math.prod(shape))


def case(family: str, key: tuple[int, int], client: int, step: int, directions: tuple[int, int]) -> dict[str, Any]:
    """All tensors of some directions."""
    return {
        "family": family,
        "key": [str(word) for word in key],
        "client": client,
        "step": step,
        "directions": list(directions),
        "tensors": {
            name: [tensor_case(family, shape, (key, client, step, i, k)) for k in range(*directions)]
            for i, (name, shape) in enumerate(SHAPES.items())
        },
    }


def long_case(family: str) -> dict[str, str]:
    """Hash of one long vector's entries as little-endian int16."""
    place: Place = ((2**63 + 5, 9), 1, 0, 0, 4)
    if family == "gaussian":
        entries = gaussian(place, LONG)
    else:
        entries = [1 if bit else -1 for bit in words(place, SIGNS, LONG, 1)]
    return {"family": family, "sha256": hashlib.sha256(struct.pack(f"<{LONG}h", *entries)).hexdigest()}


def golden() -> dict[str, Any]:
    """The content of directions.json."""
    families = ("rank1", "rademacher", "gaussian")
    table = thresholds()
    return {
        "shapes": SHAPES,
        "cases": [case(family, (7, 1), 0, 0, (0, 2)) for family in families]
        + [case(family, (2**64 - 3, 2**40), 2**32 - 1, 2**24 - 1, (1000, 1001)) for family in families],
        "long": {"size": LONG, "key": [str(2**63 + 5), "9"], "client": 1, "step": 0, "direction": 4},
        "long_cases": [long_case(family) for family in ("rademacher", "gaussian")],
        "thresholds": {
            "count": len(table),
            "sha256": hashlib.sha256(struct.pack(f"<{len(table)}I", *table)).hexdigest(),
        },
    }


def main() -> None:
    """Write the file, a line for each part."""
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in golden().items()]
    PATH.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
