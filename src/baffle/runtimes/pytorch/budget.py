"""How much to evaluate at once, so that an evaluation stays within a memory budget.

An evaluation needs, in addition to the model itself: perturbed weights, the directions that are drawn, and
activations, which grow with the number of examples (times passes, in a stack) that go through the model together. The
activations of one example are measured: the peak number of bytes of live tensors during a pass.
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

_SMALLEST_DRAWN = 2**16  # bytes of directions that any budget must leave room for
_MEASURED = 4  # examples in the pass that measures activations


@dataclass(frozen=True)
class Sizes:
    """How much is evaluated at once."""

    examples: int
    """Examples of a micro-batch."""
    rows: int
    """Examples times passes of a stack."""
    directions: int
    """Bytes of directions drawn at once."""
    kept: int = sys.maxsize
    """Bytes of outputs of the model's frozen prefix that are cached for a batch."""


def within(budget: int, usual: Sizes, an_example: int, weights: int) -> Sizes:
    """The usual sizes, reduced where ``budget`` requires it.

    Args:
        budget: Bytes that one thread may use.
        usual: The sizes without a budget, which are never exceeded.
        an_example: Bytes of activations of one example.
        weights: Bytes of perturbed weights.

    Raises:
        PlanError: If the budget is too small for one example.

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
    """Bytes of weights that an evaluation makes: the largest tensor (``streaming``), or else all tensors once."""
    if strategy == "streaming":
        return itemsize * max((spec.size for spec in table), default=0)
    return itemsize * table_size(table)


def activation_bytes(replica: Replica, point: Point, example: Tensor) -> int:
    """Peak bytes of live tensors in a pass, per example; ``example`` is a single one, [1, ...]."""
    x = torch.cat([example] * _MEASURED)  # a copy, since a view would count with the memory of the whole batch
    living = _Living()
    with living:
        replica.outputs(point, x)
    return max(1, -(-living.most // _MEASURED))


class _Living(TorchFunctionMode):
    """Counts the bytes of all tensors that functions return, each until it is freed."""

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
        address, size = storage.data_ptr(), storage.nbytes()  # views share a storage and count once
        if address in self._counted:
            return
        self._counted.add(address)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, address, size)

    def _gone(self, address: int, size: int) -> None:
        self._counted.discard(address)
        self.now -= size
