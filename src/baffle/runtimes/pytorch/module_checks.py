"""Checks that a user's module and loss can be evaluated under perturbed weights, one example independent of others."""

from __future__ import annotations

import copy
import hashlib
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm

from baffle.errors import ModelError


def frozen_sha256(model: nn.Module) -> str:
    """SHA-256 of a model's frozen parameters and buffers, in hexadecimal; empty if it has none."""
    digest = hashlib.sha256()
    frozen = [(n, p) for n, p in model.named_parameters() if not p.requires_grad] + list(model.named_buffers())
    for name, tensor in frozen:
        digest.update(name.encode() + tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest() if frozen else ""


def check_modules(model: nn.Module) -> None:
    """Refuse models whose losses would be random or depend on other examples.

    Raises:
        ModelError: For layers in training mode whose outputs are random or depend on the batch, and for tensors
            without values (on the device ``meta``).
    """
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            raise ModelError(f"{name}: on the device meta: expected numbers; load the model's weights first")
    for name, module in model.named_modules():
        where = f"{name or 'model'} ({type(module).__name__})"
        if isinstance(module, (_BatchNorm, _InstanceNorm)) and module.training and module.track_running_stats:
            raise ModelError(
                f"{where} is in training mode: its running statistics would change with every perturbed pass. "
                "Use GroupNorm, or put it in eval mode with .eval()"
            )
        if isinstance(module, _BatchNorm) and not module.track_running_stats:
            raise ModelError(
                f"{where} normalises by the batch: an example's loss would depend on its neighbours. "
                "Use GroupNorm, or track_running_stats=True in eval mode"
            )
        rate = module.p if isinstance(module, _DropoutNd) else getattr(module, "dropout", 0.0)  # attention, LSTM, ...
        if module.training and isinstance(rate, float) and rate > 0:
            raise ModelError(
                f"{where} is in training mode: each pass would drop other units and hide the difference. "
                "Put it in eval mode with .eval(), or set its rate to 0"
            )


def per_example(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Switch a loss to one number per example, if it has a ``reduction``; others are returned as they are.

    Examples:
        >>> loss = per_example(nn.functional.mse_loss)
        >>> loss(torch.zeros(3, 2), torch.ones(3, 2)).tolist()
        [1.0, 1.0, 1.0]
    """
    if isinstance(loss, nn.Module):
        reduction: Any = getattr(loss, "reduction", "none")
        if reduction != "none":
            loss = copy.deepcopy(loss)
            loss.reduction = "none"  # type: ignore[assignment]  # torch types attributes of modules as tensors
            return _mean_of_each(loss)
        return loss
    try:
        parameters = inspect.signature(loss).parameters
    except (TypeError, ValueError):
        return loss
    return _mean_of_each(partial(loss, reduction="none")) if "reduction" in parameters else loss


def _mean_of_each(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The loss, averaged over all dimensions after the first."""

    def mean(output: Tensor, target: Tensor) -> Tensor:
        values = loss(output, target)
        return values.flatten(1).mean(1) if values.ndim > 1 else values

    return mean
