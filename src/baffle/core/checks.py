"""Checks of options, shared by all configuration classes. Each raises OptionError with field, value, expectation."""

from __future__ import annotations

import math
import re
from typing import Annotated, TypeGuard, get_args, get_origin

import msgspec

from baffle.errors import OptionError


def keep_floats(options: msgspec.Struct) -> None:
    """Turn integers in float fields into floats, so that ``lr=1`` and ``lr=1.0`` encode to the same bytes."""
    for field in msgspec.structs.fields(options):
        value = getattr(options, field.name)
        kind = get_args(field.type)[0] if get_origin(field.type) is Annotated else field.type
        kinds = {kind, *get_args(kind)}
        if float in kinds and int not in kinds and isinstance(value, int) and not isinstance(value, bool):
            msgspec.structs.force_setattr(options, field.name, float(value))


SMALLEST, LARGEST = 2.0**-126, (2 - 2.0**-23) * 2.0**127  # normal numbers of float32


def require_positive(field: str, value: object) -> None:
    """Require a finite number > 0 that float32 can hold as a normal number.

    Raises:
        OptionError: it is not one.

    Examples:
        >>> require_positive("sigma", float("nan"))
        Traceback (most recent call last):
        baffle.errors.OptionError: sigma = nan: expected a finite number > 0
    """
    if not _is_number(value) or not math.isfinite(value) or value <= 0:
        raise OptionError(field, value, "a finite number > 0")
    if not SMALLEST <= value <= LARGEST:
        raise OptionError(field, value, f"a number from {SMALLEST:.3g} to {LARGEST:.3g}, which float32 can hold")


def require_between(field: str, value: object, low: float, high: float, *, open_high: bool = False) -> None:
    """Require a number in [low, high], or in [low, high) with ``open_high``.

    Raises:
        OptionError: it is not one.
    """
    if not _is_number(value) or not low <= value <= high or (open_high and value == high):
        raise OptionError(field, value, f"a number >= {low} and {'<' if open_high else '<='} {high}")


def require_count(field: str, value: object, low: int = 1, high: int | None = None) -> None:
    """Require an integer >= low (and <= high).

    Raises:
        OptionError: it is not one.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < low or (high is not None and value > high):
        raise OptionError(field, value, f"an integer >= {low}" + (f" and <= {high}" if high is not None else ""))


_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{prefix}B": 1000**i for i, prefix in enumerate("KMGT", 1)}
_UNITS |= {f"{prefix}IB": 1024**i for i, prefix in enumerate("KMGT", 1)}


def parse_bytes(field: str, text: str) -> int:
    """Parse a number of bytes with an optional unit: kB to TB are powers of 1000, KiB to TiB powers of 1024.

    Raises:
        OptionError: the text is no positive number of bytes.

    Examples:
        >>> parse_bytes("memory", "64MB"), parse_bytes("memory", "1.5 KiB")
        (64000000, 1536)
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if not match or match[2].upper() not in _UNITS or float(match[1]) == 0:
        raise OptionError(field, text, "bytes, as 64MB, 64MiB or 64000000")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
