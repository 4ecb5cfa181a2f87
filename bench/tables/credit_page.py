"""The results of ``bench.tables.credit``, and the page and the picture that are made of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec

Way = Literal["local", "feature", "exact", "published", "backprop", "local-backprop"]
BACKWARD = 3
"""Forward passes that a forward and a backward pass are counted as."""
TITLES: dict[Way, str] = {
    "local": "rows, local heads",
    "feature": "rows before the last layer",
    "exact": "one scalar, exact head",
    "published": "one scalar (the published method)",
    "backprop": "FedSGD",
    "local-backprop": "local losses by backpropagation",
}


class Cell(msgspec.Struct, frozen=True):
    """One run: data and model, where gradients come from and how, and the random seed."""

    data: str
    model: str
    way: Way
    num_directions: int
    slices: int
    bits: int
    lr: float
    rounds: int
    seed: int

    @property
    def order(self) -> tuple[str | float, ...]:
        """Where it stands among others."""
        return msgspec.structs.astuple(self)

    @property
    def title(self) -> str:
        """In words."""
        how = f", K = {self.num_directions}, {self.slices} slices, {self.bits} bits"
        many = "" if "backprop" in self.way else how
        return f"{self.data}, {self.model}: {TITLES[self.way]}{many}, lr {self.lr:g}, {self.rounds} rounds"


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What a run reached, and its cost; passes are those over each example in a round, bytes per client and round."""

    cell: Cell
    accuracy: float
    loss: float
    passes: int
    weights: int
    heads: int
    bytes_up: int
    bytes_down: int
    clipped: int
    seconds: int


def write(found: Sequence[Result], docs: Path) -> None:
    """Write the page and its picture."""
    raise NotImplementedError
