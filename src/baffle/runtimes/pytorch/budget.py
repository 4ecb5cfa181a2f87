"""How much to evaluate at once, so that an evaluation stays within a number of bytes.

What an evaluation adds to a model that is there anyway: perturbed weights, directions that are drawn, and
activations, which grow with the examples (times directions, in a stack) that go through the model together. The
activations of one example are measured: the most bytes of tensors that live at one time during a pass.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from baffle.core.types import Table, table_size
from baffle.errors import PlanError
from baffle.runtimes.pytorch.intercept import leaves

if TYPE_CHECKING:
    from baffle.runtimes.perturb import Point
    from baffle.runtimes.pytorch.replica import Replica

_SMALLEST_DRAWN = 2**16
_MEASURED = 4  # examples


@dataclass(frozen=True)
class Sizes:
    """Examples of a chunk, examples times passes of a stack, bytes of directions drawn at once, and bytes of what the
    frozen beginning of the model gives that are kept for a batch."""

    examples: int
    rows: int
    directions: int
    kept: int = sys.maxsize


def within(budget: int, usual: Sizes, an_example: int, weights: int) -> Sizes:
    """The usual sizes, or as many as ``budget`` bytes allow: ``an_example`` takes so many for
    its activations, ``weights`` are those of all of it.

    Raises PlanError if the budget is too small for one example.

    Examples:
        >>> within(10**6, Sizes(32, 1024, 10**6), an_example=10**4, weights=10**5)
        Sizes(examples=32, rows=77, directions=125000, kept=5000)
    """
    drawn = max(_SMALLEST_DRAWN, min(usual.directions, budget // 8))
    left = budget - weights - drawn
    examples = left // max(1, an_example)
    if examples < 1:
        needed = weights + _SMALLEST_DRAWN + an_example
        raise PlanError(
            f"memory = {budget} bytes a thread: expected at least {needed} for perturbed weights ({weights}), "
            f"activations of one example ({an_example}) and directions; strategy streaming needs the least"
        )
    rows = min(usual.rows, examples)
    return Sizes(min(usual.examples, examples), rows, drawn, left - rows * an_example)


def weight_bytes(table: Table, itemsize: int, strategy: str) -> int:
    """Bytes of perturbed weights: all of them, or (streaming) the largest tensor; a stack's unperturbed ones."""
    if strategy == "streaming":
        return itemsize * max((spec.size for spec in table), default=0)
    return itemsize * table_size(table)


def activation_bytes(replica: Replica, point: Point, example: Tensor) -> int:
    """The most bytes that live at one time in a pass, an example; ``example`` is one [1, ...]."""
    x = torch.cat([example] * _MEASURED)  # not a view: its memory would be the whole batch's
    living = _Living()
    with living:
        replica.outputs(point, x)
    return max(1, -(-living.most // _MEASURED))


class _Living(TorchFunctionMode):
    """Counts the bytes of what functions give, for as long as it is alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now: int = 0
        self.most: int = 0
        self._counted = set[int]()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in leaves(result):
            if isinstance(tensor, Tensor):
                try:
                    storage = tensor.untyped_storage()
                except (NotImplementedError, RuntimeError):  # sparse, or inside vmap
                    continue
                self._count(storage)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        address, size = storage.data_ptr(), storage.nbytes()
        if address in self._counted:
            return
        self._counted.add(address)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, address, size)

    def _gone(self, address: int, size: int) -> None:
        self._counted.discard(address)
        self.now -= size
