"""Trained tensors as they are used: what a function of a model is given can be exchanged on its way.

PyTorch lets a mode see every call of its functions (``torch.overrides``). So a perturbed weight needs to exist only
while the layer that reads it runs, and several directions can go through a model together; the model itself is never
changed. What it computes with tensors hidden from Python (TorchScript) cannot be seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_ABOUT = frozenset({"size", "dim", "numel", "stride", "is_floating_point", "is_complex", "is_contiguous", "__len__"})
"""Functions that ask about a tensor, not for its numbers."""
_VIEWS = frozenset({"T", "mT", "H", "mH", "data", "real", "imag"})
"""Properties that give its numbers; the others ask about it."""


class Exchange(TorchFunctionMode):
    """Give functions of a model ``exchanged(tensor)`` for each of the trained tensors among its arguments.

    ``index`` has the number of every trained parameter by its id.
    """

    def __init__(self, index: Mapping[int, int], exchanged: Callable[[int], Tensor]) -> None:
        super().__init__()
        self._index, self._exchanged = index, exchanged

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call the function with perturbed tensors."""
        kwargs = kwargs or {}
        if asks_about(func) or not any(id(a) in self._index for a in leaves((args, kwargs))):
            return func(*args, **kwargs)
        return func(*self._replace(args), **{name: self._replace(value) for name, value in kwargs.items()})

    def _replace(self, value: Any) -> Any:
        if id(value) in self._index:
            return self._exchanged(self._index[id(value)])
        if type(value) in (tuple, list):
            return type(value)(self._replace(v) for v in value)
        return value


class FirstUse(TorchFunctionMode):
    """Whether a function of a model was given a trained tensor yet."""

    def __init__(self, index: Mapping[int, int]) -> None:
        super().__init__()
        self._index, self.seen = index, False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call the function."""
        kwargs = kwargs or {}
        self.seen = self.seen or any(id(a) in self._index for a in leaves((args, kwargs)))
        return func(*args, **kwargs)


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


def memoise_frozen_prefix(model: nn.Module, index: Mapping[int, int], x: Tensor) -> Memo | None:
    """Let the frozen modules at the beginning of a model keep their outputs; None if there are none.

    Those whose work is done before any trained tensor is used, called once in a pass, with parameters of their own
    and no trained one. Found by one pass on ``x``; their ``forward`` is exchanged in ``model``.
    """
    calls: list[nn.Module] = []
    first = FirstUse(index)

    def done(module: nn.Module, *_: object) -> None:
        if not first.seen:
            calls.append(module)

    frozen = [m for m in model.modules() if any(True for _ in m.parameters()) and not _has(m, index)]
    handles = [m.register_forward_hook(done) for m in frozen]
    try:
        with torch.inference_mode(), first:
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    inside = {id(child) for m in calls for child in m.modules() if child is not m}
    prefix = [m for m in calls if id(m) not in inside and calls.count(m) == 1]
    return Memo(prefix) if prefix else None


class Memo:
    """Outputs of modules by chunk of a batch, for as long as the batch lasts."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._chunk: int | None = None
        self._kept = dict[tuple[int, int], Any]()
        for number, module in enumerate(modules):
            module.forward = self._remembering(number, module.forward)

    def start(self) -> None:
        """Forget what was, for a new batch."""
        self._kept.clear()
        self._chunk = None

    def at(self, chunk: int | None) -> None:
        """The next pass is over this chunk of the batch; None: over something else, of which nothing is kept."""
        self._chunk = chunk

    def _remembering(self, number: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def remembered(*args: Any, **kwargs: Any) -> Any:
            if self._chunk is None:
                return forward(*args, **kwargs)
            key = number, self._chunk
            if key not in self._kept:
                self._kept[key] = forward(*args, **kwargs)
            return self._kept[key]

        return remembered


def _has(module: nn.Module, index: Mapping[int, int]) -> bool:
    return any(id(p) in index for p in module.parameters())
