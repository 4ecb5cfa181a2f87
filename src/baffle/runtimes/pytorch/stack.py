"""What a function of a model computes for a stack: a batch that holds the same examples once per direction.

Functions that treat examples independently work on a stack as on any batch. A function that reads a trained tensor
must apply another one to each direction's examples. A linear layer does so as x Wᵀ + (x b) (step a)ᵀ, one product with
the unperturbed weight and two with vectors (EGGROLL, Sarkar et al. 2025). The first trained layer gets the same
examples for all directions, so its product with the unperturbed weight is computed only once. Functions that read
trained tensors are intercepted, so the model need not be traced. A function without a rule here is refused
(:class:`NotStackable`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from baffle.runtimes.pytorch.intercept import Interception

Factors = tuple[Tensor, Tensor]
_ELEMENTWISE = frozenset({"add", "sub", "mul", "div", "rsub", "true_divide", "multiply", "subtract"})


class NotStackable(Exception):  # noqa: N818  # not the user's error: another strategy is taken
    """A model uses a trained tensor in a way that has no rule for a stack."""


class Stack(Interception):
    """A mode in which a model's functions compute a stack of S passes.

    Args:
        index: The number of every trained parameter by its ``id``.
        passes: S.
        examples: Examples of each pass.
        plain: ``plain(i)`` is tensor i unperturbed, [*shape].
        factors: ``factors(i)`` are the factors (a [S, out], already times the step; b [S, *rest]) of its directions, or
            None if they have no rank-1 form.
        each: ``each(i)`` are all S perturbed tensors, [S, *shape].
    """

    def __init__(
        self,
        index: Mapping[int, int],
        passes: int,
        examples: int,
        plain: Callable[[int], Tensor],
        factors: Callable[[int], Factors | None],
        each: Callable[[int], Tensor],
    ) -> None:
        super().__init__(index)
        self._passes, self._examples = passes, examples
        self._plain, self._factors, self._each = plain, factors, each

    def intercept(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Compute the function for a stack."""
        name = getattr(func, "__name__", "").strip("_")
        try:
            if name in _ELEMENTWISE or name[1:] in _ELEMENTWISE:
                return self._elementwise(func, args, kwargs)
            rules: dict[str, Callable[..., Tensor]] = {
                "linear": self._linear,
                "conv1d": partial(self._convolution, func),
                "conv2d": partial(self._convolution, func),
                "embedding": self._embedding,
                "layer_norm": self._layer_norm,
                "group_norm": self._group_norm,
                "batch_norm": self._batch_norm,
            }
            rule = rules[name]
        except KeyError:
            raise NotStackable(f"a trained tensor in {name}()") from None
        return rule(*args, **kwargs)

    def stacked(self, x: Tensor) -> bool:
        """Whether a tensor has the examples of every pass; otherwise those of a single one, the same for all."""
        if len(x) == self._passes * self._examples:
            return True
        if len(x) == self._examples:
            return False
        raise NotStackable(f"a tensor {tuple(x.shape)} beside {self._examples} examples")

    def _number(self, tensor: Tensor | None) -> int | None:
        return self._index.get(id(tensor))

    # The rules have the parameter names of PyTorch's functions, since models may pass them as keywords.

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        s, stacked = self._passes, self.stacked(input)
        x = input.reshape(s if stacked else 1, -1, input.shape[-1])
        number = self._number(weight)
        factors = None if number is None else self._factors(number)
        if number is None:
            y = F.linear(x, weight)
        elif factors is None:
            y = torch.matmul(x, self._each(number).mT)
        else:
            a, b = factors
            y = F.linear(x, self._plain(number))
            along = torch.bmm(x, b[:, :, None]) if stacked else F.linear(x[0], b).t().contiguous()[:, :, None]
            y = y.addcmul_(along, a[:, None]) if stacked else torch.addcmul(y, along, a[:, None])
        if bias is not None:
            free = self._number(bias)
            y = y + bias if free is None else y + self._each(free)[:, None]
        leading = (len(y) * (self._examples if not stacked else len(input) // s), *input.shape[1:-1])
        return y.reshape(*leading, y.shape[-1])

    def _convolution(
        self,
        convolve: Callable[..., Tensor],
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:
        def apply(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
            return convolve(x, w, b, stride, padding, dilation, groups)

        stacked, number, free = self.stacked(input), self._number(weight), self._number(bias)
        if number is None:
            y = apply(input, weight)
        elif (factors := self._factors(number)) is not None and not stacked and groups == 1:
            a, b = factors
            y = apply(input, self._plain(number)).movedim(1, -1)  # a view; contiguous if the input is channels-last
            along = apply(input, b.reshape(len(b), *weight.shape[1:])).movedim(1, 0)[..., None]
            shape = (len(a), *[1] * (y.ndim - 1), a.shape[1])
            y = torch.addcmul(y, along, a.reshape(shape)).flatten(0, 1).movedim(-1, 1)
        else:
            weights = self._each(number)
            parts = input.chunk(self._passes) if stacked else [input] * self._passes
            y = torch.cat([apply(x, w) for x, w in zip(parts, weights, strict=True)])
        if bias is None:
            return y
        if free is None:
            return y + bias.reshape(-1, *[1] * (y.ndim - 2))
        return self._channels_affine(y, None, bias)

    def _embedding(
        self,
        input: Tensor,
        weight: Tensor,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        *_: Any,
        **__: Any,
    ) -> Tensor:
        number = self._number(weight)
        assert number is not None
        factors = self._factors(number)
        if (self.stacked(input) and self._passes > 1) or factors is None or max_norm is not None:
            raise NotStackable("an embedding with max_norm, of another family than rank1, or after a trained layer")
        a, b = factors
        y = F.embedding(input, self._plain(number), padding_idx)
        right = b.reshape(len(b), *[1] * input.ndim, -1)
        return torch.addcmul(y, a[:, input][..., None], right).flatten(0, 1)

    def _layer_norm(
        self,
        input: Tensor,
        normalized_shape: Sequence[int],
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Tensor:
        y = F.layer_norm(input, list(normalized_shape), None, None, eps)
        return self._affine(y, weight, bias)

    def _group_norm(
        self,
        input: Tensor,
        num_groups: int,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Tensor:
        y = F.group_norm(input, num_groups, None, None, eps)
        return self._channels_affine(y, weight, bias)

    def _batch_norm(
        self,
        input: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        y = F.batch_norm(input, running_mean, running_var, None, None, training, momentum, eps)
        return self._channels_affine(y, weight, bias)

    def _affine(self, y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """y * weight + bias, each if present, for tensors of the shape of y's last dimensions."""
        for operation, tensor in ((torch.Tensor.mul, weight), (torch.Tensor.add, bias)):
            if tensor is not None:
                y = self._elementwise(operation, (y, tensor), {})
        return y

    def _channels_affine(self, y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """The same for images [n, channels, ...] and vectors [channels]."""
        return self._affine(y.movedim(1, -1), weight, bias).movedim(-1, 1)

    def _elementwise(self, func: Callable[..., Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        """An elementwise operation of a tensor of examples and a trained tensor, in either order."""
        x = next((a for a in args[:2] if isinstance(a, Tensor) and id(a) not in self._index), None)
        if x is None or len(args) < 2:
            raise NotStackable("an operation on a trained tensor alone")
        stack = x.reshape(self._passes, -1, *x.shape[1:]) if self.stacked(x) else x[None]

        def operand(value: Any) -> Any:
            number = self._number(value)
            if value is x:
                return stack
            return value if number is None else _broadcastable(self._each(number), stack)

        return func(*[operand(a) for a in args], **kwargs).flatten(0, 1)


def _broadcastable(each: Tensor, stack: Tensor) -> Tensor:
    """Insert dimensions of size 1 into [S, *shape], so that it broadcasts against the stack [S, examples, ...]."""
    shape = each.shape[1:]
    if len(shape) >= stack.ndim - 1 and len(shape) and shape[0] == 1:  # a leading 1 that broadcasts over examples
        shape = shape[1:]
    missing = stack.ndim - 1 - len(shape)
    if missing < 1 and len(shape):
        raise NotStackable(f"a trained tensor {tuple(each.shape[1:])} beside examples {tuple(stack.shape[2:])}")
    return each.reshape(len(each), *[1] * missing, *shape)
