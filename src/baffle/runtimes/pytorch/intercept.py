"""Trained tensors as they are used: what a function of a model is given can be exchanged on its way.

PyTorch lets a mode see every call of its functions (``torch.overrides``). So a perturbed weight needs to exist only
while the layer that reads it runs, and several directions can go through a model together; the model itself is never
changed. What it computes with tensors hidden from Python (TorchScript) cannot be seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

_ABOUT = frozenset({"size", "dim", "numel", "stride", "is_floating_point", "is_complex", "is_contiguous", "__len__"})
"""Functions that ask about a tensor, not for its numbers."""
_VIEWS = frozenset({"T", "mT", "H", "mH", "data", "real", "imag"})
"""Properties that give its numbers; the others ask about it."""


class Interception(TorchFunctionMode):
    """Let ``given`` decide what a function of a model does that needs the numbers of trained tensors.

    ``index`` has the number of every trained parameter by its id.
    """

    def __init__(self, index: Mapping[int, int]) -> None:
        super().__init__()
        self._index = index

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call the function, or ``given`` for it."""
        kwargs = kwargs or {}
        if asks_about(func) or not any(id(a) in self._index for a in leaves((args, kwargs))):
            return func(*args, **kwargs)
        return self.given(func, args, kwargs)

    def given(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What a function gives that has trained tensors among its arguments."""
        raise NotImplementedError


class Exchange(Interception):
    """Give functions of a model ``exchanged(tensor)`` for each of the trained tensors among its arguments."""

    def __init__(self, index: Mapping[int, int], exchanged: Callable[[int], Tensor]) -> None:
        super().__init__(index)
        self._exchanged = exchanged

    def given(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Call the function with perturbed tensors."""
        return func(*self._replace(args), **{name: self._replace(value) for name, value in kwargs.items()})

    def _replace(self, value: Any) -> Any:
        if id(value) in self._index:
            return self._exchanged(self._index[id(value)])
        if type(value) in (tuple, list):
            return type(value)(self._replace(v) for v in value)
        return value


def asks_about(func: Callable[..., Any]) -> bool:
    """Whether a function needs no numbers of a tensor."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return getattr(getattr(func, "__self__", None), "__name__", "") not in _VIEWS
    return name in _ABOUT


def leaves(value: Any) -> Iterator[Any]:
    """What is in nested arguments."""
    if isinstance(value, (tuple, list)):
        for v in value:
            yield from leaves(v)
    elif isinstance(value, dict):
        for v in value.values():
            yield from leaves(v)
    else:
        yield value
