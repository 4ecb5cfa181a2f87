"""The numbers of a method that are usual for a kind of credit: for the command line and for ``fit`` alike."""

from __future__ import annotations

from typing import NamedTuple

from baffle.core.types import DEFAULT_BITS

WAYS = (("local", "exact"), ("feature", "exact"), ("global", "exact"), ("global", "directions"))
"""Kinds of credit and head, the best first: the first that a model has is taken."""


class Usual(NamedTuple):
    """What is used where nothing is set."""

    num_directions: int
    slices: int
    bits: int
    lr: float


def usual(credit: str, head: str, examples: int, optimizer: str = "adam") -> Usual:
    """The numbers that are usual for a kind of credit.

    Rows need few directions. One scalar per direction needs many, and fewer where the last layer is exact.

    Args:
        credit: ``local``, ``feature`` or ``global``.
        head: ``exact`` or ``directions``.
        examples: Of the smallest mini-batch: there are no more slices than that.
        optimizer: Plain sgd takes smaller steps.

    Examples:
        >>> usual("local", "exact", examples=5)
        Usual(num_directions=5, slices=5, bits=8, lr=0.03)
        >>> usual("global", "directions", examples=5)
        Usual(num_directions=100, slices=1, bits=15, lr=0.01)
    """
    if (credit, head) == ("global", "directions"):
        return Usual(100, 1, DEFAULT_BITS, 0.01)
    return Usual(20 if credit == "global" else 5, max(1, min(8, examples)), 8, 0.01 if optimizer == "sgd" else 0.03)
