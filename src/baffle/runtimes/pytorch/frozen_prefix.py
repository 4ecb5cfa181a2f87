"""The frozen prefix: modules at the start of a model without trained parameters, whose outputs are cached per batch.

All passes over a batch give the same inputs to the layers before the first trained one, so these layers need to run
only once. Fine-tuning the head of a large model then costs little more than the head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from baffle.runtimes.pytorch.intercept import leaves


class Uses(TorchFunctionMode):
    """A mode that records which trained tensors the functions of a model have read so far."""

    def __init__(self, index: Mapping[int, int]) -> None:
        super().__init__()
        self._index, self.seen = index, set[int]()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Record the trained tensors among the arguments, and call the function."""
        kwargs = kwargs or {}
        self.seen.update(id(a) for a in leaves((args, kwargs)) if id(a) in self._index)
        return func(*args, **kwargs)


def memoise_frozen_prefix(model: nn.Module, index: Mapping[int, int], x: Tensor) -> Memo | None:
    """Make the frozen modules at the start of a model cache their outputs, by replacing their ``forward``.

    A module qualifies if it has parameters but no trained one, finishes before any trained tensor is read, and is
    called once per pass. It does not qualify if it writes to its inputs, or if its output is written to later. One
    pass on ``x`` shows this, provided that it also shows where every trained tensor is read.

    Args:
        model: A replica's model; changed in place.
        index: The number of every trained parameter by its ``id``.
        x: Inputs for the pass.

    Returns:
        The cache, or None if no module qualifies.
    """
    calls: list[nn.Module] = []
    written: list[Callable[[], bool]] = []
    uses = Uses(index)

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        if not uses.seen:
            inputs[module] = changes((args, kwargs))

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not uses.seen:
            calls.append(module)
            on_inputs, on_output = inputs[module](), changes(output)
            written.append(lambda: on_inputs or on_output())

    inputs: dict[nn.Module, Callable[[], bool]] = {}
    frozen = [m for m in model.modules() if any(True for _ in m.parameters()) and not _has(m, index)]
    frozen = [m for m in frozen if not isinstance(m, torch.jit.ScriptModule)]  # which accept no hooks
    handles = [m.register_forward_pre_hook(before, with_kwargs=True) for m in frozen]
    handles += [m.register_forward_hook(after, with_kwargs=True) for m in frozen]
    try:
        with torch.inference_mode(False), torch.no_grad(), uses:
            model(x.clone())
    except Exception:  # a model may raise anything; the first real pass will report it
        return None
    finally:
        for handle in handles:
            handle.remove()
    if len(uses.seen) < len(index):
        return None
    unwritten = [m for m, changed in zip(calls, written, strict=True) if calls.count(m) == 1 and not changed()]
    inside = {id(child) for m in unwritten for child in m.modules() if child is not m}
    prefix = [m for m in unwritten if id(m) not in inside]
    return Memo(prefix) if prefix else None


def changes(value: Any) -> Callable[[], bool]:
    """A function that says whether tensors in nested arguments were written to since this call."""
    tensors = [v for v in leaves(value) if isinstance(v, Tensor) and not v.is_inference()]
    versions = [t._version for t in tensors]
    return lambda: [t._version for t in tensors] != versions


class Memo:
    """Cached outputs of modules for each micro-batch of the current batch, up to a number of bytes."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._micro_batch: int | None = None
        self._left = 0
        self._kept = dict[tuple[int, int], Any]()
        for number, module in enumerate(modules):
            module.forward = self._remembering(number, module.forward)

    def start(self, most: int = 0) -> None:
        """Clear the cache for a new batch, of whose outputs at most ``most`` bytes are kept."""
        self._kept.clear()
        self._micro_batch, self._left = None, most

    def at(self, micro_batch: int | None) -> None:
        """Announce which micro-batch the next pass evaluates; None for other inputs, whose outputs are not cached."""
        self._micro_batch = micro_batch

    def _remembering(self, number: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def remembered(*args: Any, **kwargs: Any) -> Any:
            if self._micro_batch is None:
                return forward(*args, **kwargs)
            key = number, self._micro_batch
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
