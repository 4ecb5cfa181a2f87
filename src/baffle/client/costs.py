"""What a round costs a client, before it is run: passes, and the numbers of a reply."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from baffle.client.respond import passes_of
from baffle.core.credit import units_of
from baffle.core.method import Method
from baffle.core.types import Table, packed_size

_WORDS = {"rows": "of rows", "exact": "of gradients", "loss": "of the loss"}


@dataclass(frozen=True)
class Costs:
    """What a reply takes and holds.

    Attributes:
        passes: forward passes over each example of a mini-batch.
        numbers: in a reply.
        bits: of each number.
        units: by kind (``types.Credit``), how many units there are.
        numbers_of: by kind, how many of the numbers are theirs.

    Examples:
        >>> from baffle.core.types import make_table
        >>> print(costs_of(Method(num_directions=4), make_table({"w": (3, 2)})))
        5 passes over each example, 4 numbers of 15 bits (8 bytes)
    """

    passes: int
    numbers: int
    bits: int
    units: dict[str, int]
    numbers_of: dict[str, int]

    @property
    def bytes(self) -> int:
        """Of a reply's numbers, without a secure sum."""
        return packed_size(self.numbers, self.bits)

    @property
    def kinds(self) -> str:
        """The numbers by kind, in words."""
        return ", ".join(
            f"{self.numbers_of[kind]:,} {_WORDS[kind]} ({count} unit{'s' if count > 1 else ''})"
            for kind, count in self.units.items()
        )

    def __str__(self) -> str:
        """In a line."""
        bits = "1 bit" if self.bits == 1 else f"{self.bits} bits"
        return f"{self.passes} passes over each example, {self.numbers:,} numbers of {bits} ({self.bytes:,} bytes)"


def costs_of(method: Method, table: Table) -> Costs:
    """What a round of a method costs a client of a model with this table."""
    units, numbers_of = Counter[str](), Counter[str]()
    for unit in units_of(table):
        units[unit.kind] += 1
        numbers_of[unit.kind] += unit.size(method.num_directions * method.slices) * method.local_steps
    return Costs(passes_of(method, table), numbers_of.total(), method.bits, dict(units), dict(numbers_of))
