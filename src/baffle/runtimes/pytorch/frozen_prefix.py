"""Frozen modules at the beginning of a model, whose outputs are computed once per batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from baffle.runtimes.pytorch.intercept import leaves


class Uses(TorchFunctionMode):
    """The trained tensors that functions of a model were given so far."""

    def __init__(self, index: Mapping[int, int]) -> None:
        super().__init__()
        self._index, self.seen = index, set[int]()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call the function."""
        kwargs = kwargs or {}
        self.seen.update(id(a) for a in leaves((args, kwargs)) if id(a) in self._index)
        return func(*args, **kwargs)


def memoise_frozen_prefix(model: nn.Module, index: Mapping[int, int], x: Tensor) -> Memo | None:
    """Let the frozen modules at the beginning of a model keep their outputs; None if there are none.

    Those whose work is done before any trained tensor is used, called once in a pass, with parameters of their own
    and no trained one; not those that write on their inputs, or whose outputs are written on. Found by one pass on
    ``x``, if that shows where every trained tensor is used; their ``forward`` is exchanged in ``model``.
    """
    calls: list[nn.Module] = []
    written: list[Callable[[], bool]] = []
    uses = Uses(index)

    def begins(module: nn.Module, args: Any, kwargs: Any) -> None:
        if not uses.seen:
            inputs[module] = changes((args, kwargs))

    def ends(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not uses.seen:
            calls.append(module)
            on_inputs, on_output = inputs[module](), changes(output)
            written.append(lambda: on_inputs or on_output())

    inputs: dict[nn.Module, Callable[[], bool]] = {}
    frozen = [m for m in model.modules() if any(True for _ in m.parameters()) and not _has(m, index)]
    frozen = [m for m in frozen if not isinstance(m, torch.jit.ScriptModule)]  # they take no hooks
    handles = [m.register_forward_pre_hook(begins, with_kwargs=True) for m in frozen]
    handles += [m.register_forward_hook(ends, with_kwargs=True) for m in frozen]
    try:
        with torch.inference_mode(False), torch.no_grad(), uses:
            model(x.clone())
    except Exception:  # a model may raise anything; it is told by the passes
        return None
    finally:
        for handle in handles:
            handle.remove()
    if len(uses.seen) < len(index):
        return None
    kept = [m for m, changed in zip(calls, written, strict=True) if calls.count(m) == 1 and not changed()]
    inside = {id(child) for m in kept for child in m.modules() if child is not m}
    prefix = [m for m in kept if id(m) not in inside]
    return Memo(prefix) if prefix else None


def changes(value: Any) -> Callable[[], bool]:
    """Whether tensors in nested arguments were written on since."""
    tensors = [v for v in leaves(value) if isinstance(v, Tensor) and not v.is_inference()]
    before = [t._version for t in tensors]
    return lambda: [t._version for t in tensors] != before


class Memo:
    """Outputs of modules by chunk of a batch, for as long as the batch lasts and within so many bytes."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._chunk: int | None = None
        self._left = 0
        self._kept = dict[tuple[int, int], Any]()
        for number, module in enumerate(modules):
            module.forward = self._remembering(number, module.forward)

    def start(self, most: int = 0) -> None:
        """Forget what was, for a new batch, of which at most so many bytes are kept."""
        self._kept.clear()
        self._chunk, self._left = None, most

    def at(self, chunk: int | None) -> None:
        """The next pass is over this chunk of the batch; None: over something else, of which nothing is kept."""
        self._chunk = chunk

    def _remembering(self, number: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def remembered(*args: Any, **kwargs: Any) -> Any:
            if self._chunk is None:
                return forward(*args, **kwargs)
            key = number, self._chunk
            if key in self._kept:
                return self._kept[key]
            output = forward(*args, **kwargs)
            size = sum(v.untyped_storage().nbytes() for v in leaves(output) if isinstance(v, Tensor))
            if size <= self._left:
                self._kept[key], self._left = output, self._left - size
            return output

        return remembered


def _has(module: nn.Module, index: Mapping[int, int]) -> bool:
    return any(id(p) in index for p in module.parameters())
