"""Interception of the functions that read trained tensors, so that perturbed ones can be substituted.

PyTorch lets a mode see every call of its functions (``torch.overrides``). So a perturbed weight needs to exist only
while the layer that reads it runs, and several directions can go through a model together; the model itself is never
changed. Calls that are hidden from Python, as in TorchScript, cannot be intercepted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

_ABOUT = frozenset({"size", "dim", "numel", "stride", "is_floating_point", "is_complex", "is_contiguous", "__len__"})
"""Functions that read a tensor's metadata, not its values."""
_VIEWS = frozenset({"T", "mT", "H", "mH", "data", "real", "imag"})
"""Properties that give a tensor's values; the others give metadata."""


class Interception(TorchFunctionMode):
    """A mode that calls ``intercept`` instead of each function that reads the values of trained tensors.

    Args:
        index: The number of every trained parameter by its ``id``.
    """

    def __init__(self, index: Mapping[int, int]) -> None:
        super().__init__()
        self._index = index

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call the function itself, or ``intercept`` if it reads trained tensors."""
        kwargs = kwargs or {}
        if asks_about(func) or not any(id(a) in self._index for a in leaves((args, kwargs))):
            return func(*args, **kwargs)
        return self.intercept(func, args, kwargs)

    def intercept(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The result of a function with trained tensors among its arguments."""
        raise NotImplementedError


class Substitution(Interception):
    """Passes ``substitute(tensor)`` to a model's functions in place of each trained tensor among their arguments."""

    def __init__(self, index: Mapping[int, int], substitute: Callable[[int], Tensor]) -> None:
        super().__init__(index)
        self._substitute = substitute

    def intercept(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Call the function with the substituted tensors."""
        return func(*self._replace(args), **{name: self._replace(value) for name, value in kwargs.items()})

    def _replace(self, value: Any) -> Any:
        if id(value) in self._index:
            return self._substitute(self._index[id(value)])
        if type(value) in (tuple, list):
            return type(value)(self._replace(v) for v in value)
        return value


def asks_about(func: Callable[..., Any]) -> bool:
    """Whether a function reads a tensor's metadata only."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return getattr(getattr(func, "__self__", None), "__name__", "") not in _VIEWS
    return name in _ABOUT


def leaves(value: Any) -> Iterator[Any]:
    """The innermost values of nested tuples, lists and dictionaries."""
    if isinstance(value, (tuple, list)):
        for v in value:
            yield from leaves(v)
    elif isinstance(value, dict):
        for v in value.values():
            yield from leaves(v)
    else:
        yield value
