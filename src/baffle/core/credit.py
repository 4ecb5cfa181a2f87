"""Which numbers a reply has, and which tensors each of them is about.

Three kinds of numbers (``types.Credit``). One scalar per direction for all of a model is the published method
(BAFFLE, arXiv 2301.12195). One scalar per row of a layer credits the row with what its own features change in the
loss of a head whose derivative is known: it carries the noise of the row's weights alone, not of the whole network's
(local losses: Nokland and Eidnes, arXiv 1901.06656; with forward gradients: Ren et al., arXiv 2210.03310). And the
gradient of a linear head is known exactly from the derivative of the loss by the outputs and the features.

A reply lists the units in order, and for each its numbers: direction by direction (the directions of slice 0 first),
or entry by entry where they are exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import msgspec
import numpy as np
import numpy.typing as npt

from baffle.core.types import Credit, ParamSpec, Table
from baffle.errors import ModelError


@dataclass(frozen=True)
class Unit:
    """Tensors that share numbers.

    Attributes:
        kind: what the numbers are (``types.Credit``).
        tensors: the tensors' places in the table.
        numbers: how many numbers the unit has per direction or, where they are exact, in all.
    """

    kind: str
    tensors: tuple[int, ...]
    numbers: int

    def size(self, directions: int) -> int:
        """How many numbers a reply has of this unit, with so many directions."""
        return self.numbers if self.kind == "exact" else directions * self.numbers


def numbers_of_rows(spec: ParamSpec) -> npt.NDArray[np.int64]:
    """Of a tensor that is credited row by row: which of its unit's numbers belongs to each row, int64[rows].

    Examples:
        >>> from baffle.core.types import Credit
        >>> numbers_of_rows(ParamSpec("w", (5, 2), 0, credit=Credit(0, "rows", ((2, 3, 0), (3, 0, 1))))).tolist()
        [3, 3, 0, 1, 2]
    """
    runs = spec.credit.runs or ((spec.shape[0], 0, 1),)
    return np.concatenate([first + step * np.arange(count) for count, first, step in runs])


@lru_cache(maxsize=64)
def units_of(table: Table) -> tuple[Unit, ...]:
    """The units of a table, in order.

    Raises:
        ModelError: The numbers of the units have gaps, tensors of one unit are of different kinds, or a tensor's runs
            do not cover its rows.
    """
    members: dict[int, list[int]] = {}
    for i, spec in enumerate(table):
        members.setdefault(spec.credit.unit, []).append(i)
    if sorted(members) != list(range(len(members))):
        raise ModelError(f"units {sorted(members)}: expected 0 to {len(members) - 1}")
    units = []
    for number in range(len(members)):
        specs = [table[i] for i in members[number]]
        kinds = {spec.credit.kind for spec in specs}
        if len(kinds) > 1:
            raise ModelError(f"unit {number}: kinds {', '.join(sorted(kinds))}: expected one")
        units.append(Unit(kinds.pop(), tuple(members[number]), _count(specs)))
    return tuple(units)


def _count(specs: Sequence[ParamSpec]) -> int:
    kind = specs[0].credit.kind
    if kind == "loss":
        return 1
    if kind == "exact":
        return sum(spec.size for spec in specs)
    count = 0
    for spec in specs:
        runs = spec.credit.runs
        rows = spec.shape[0] if spec.shape else 0
        if not rows or (runs and sum(run[0] for run in runs) != rows) or any(min(run) < 0 for run in runs):
            raise ModelError(f"{spec.name}: credit {runs} for shape {spec.shape}: expected every row once")
        count = max(count, 1 + int(numbers_of_rows(spec).max()))
    return count


def sizes_of(table: Table, directions: int) -> tuple[int, ...]:
    """How many numbers a reply has of each unit, with so many directions (K per slice, times slices)."""
    return tuple(unit.size(directions) for unit in units_of(table))


def part_of(sizes: Sequence[int]) -> list[slice]:
    """Where each unit's numbers lie in a reply.

    Examples:
        >>> part_of((3, 2))
        [slice(0, 3, None), slice(3, 5, None)]
    """
    ends = np.cumsum([0, *sizes]).tolist()
    return [slice(start, stop) for start, stop in pairwise(ends)]


def is_plain(table: Table) -> bool:
    """Whether there is one scalar per direction for all of the model, and nothing else."""
    return all(spec.credit.kind == "loss" for spec in table)


def model_table(table: Table) -> Table:
    """The model's own tensors, whatever their credit; those that exist for training alone are left out."""
    return tuple(msgspec.structs.replace(spec, credit=Credit()) for spec in table if not spec.credit.auxiliary)
