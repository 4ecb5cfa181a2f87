"""Model architectures: the paper's LeNet and WRN-10-2 (arXiv 2301.12195, section 4), a perceptron, a transformer.

A builder takes the shape of one example and the number of classes. None of the models has BatchNorm or dropout, under
which the losses of an example would depend on its batch or on chance.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from baffle.errors import MissingExtraError, ModelError, OptionError, require_choice

try:
    import torch
    from torch import nn
except ImportError as error:
    raise MissingExtraError("PyTorch is not installed: pip install 'baffle[torch]'") from error

from baffle.models.lenet import lenet, lenet_small
from baffle.models.mlp import mlp
from baffle.models.parts import ACTIVATIONS, NORMS
from baffle.models.trainable import train_only as train_only
from baffle.models.transformer import transformer
from baffle.models.wrn import wrn_10_2


@dataclass(frozen=True)
class Architecture:
    """A model architecture of this package."""

    builder: Callable[..., nn.Module]
    """``builder(shape, classes, activation, norm)``."""
    norm: str
    """The default normalisation."""
    about: str
    """A description in a few words."""
    tokens: bool = False
    """Whether it also accepts integer tokens, given ``vocabulary``."""


MODELS: dict[str, Architecture] = {
    "lenet": Architecture(lenet, "none", "the paper's LeNet: two convolutions, global average pooling"),
    "lenet-small": Architecture(lenet_small, "none", "LeNet for small images: two convolutions, two poolings"),
    "wrn-10-2": Architecture(wrn_10_2, "group", "the paper's wide residual network, three units"),
    "mlp": Architecture(mlp, "none", "a perceptron with hidden layers of 200 and 64"),
    "transformer": Architecture(transformer, "group", "an encoder of two layers, for images or tokens", tokens=True),
}


def build(
    name: str,
    shape: tuple[int, ...],
    classes: int,
    seed: int = 0,
    *,
    activation: str | None = None,
    norm: str | None = None,
    vocabulary: int | None = None,
) -> nn.Module:
    """Build a model by name, or by a builder of your own, initialised from a seed.

    PyTorch's global random generator is left as it was.

    Args:
        name: One of ``MODELS``, or ``package.module:builder`` for a callable ``builder(shape, classes)`` of your own.
        shape: Shape of one example, as (channels, height, width).
        classes: Number of outputs.
        seed: Seed of the initial weights.
        activation: Activation of the models of this package: hardswish (the default), relu, selu or gelu.
        norm: Normalisation of the models of this package: group or none; None for the architecture's default.
        vocabulary: Number of distinct tokens, if examples are integer tokens.

    Returns:
        The model, with all parameters trainable.

    Raises:
        OptionError: For an unknown name or option, and for builders that cannot be imported or make no module.
        ModelError: If the model cannot be built for examples of this shape.

    Examples:
        >>> sum(p.numel() for p in build("wrn-10-2", (3, 32, 32), 10).parameters())
        302794
    """
    options: dict[str, object] = {}
    if ":" in name:
        for field, value in (("activation", activation), ("norm", norm)):
            if value is not None:
                raise OptionError(field, value, f"none with a model of your own, {name}")
        builder = _import(name)
    else:
        require_choice("model", name, MODELS)
        activation, norm = activation or "hardswish", norm or MODELS[name].norm
        require_choice("activation", activation, ACTIVATIONS)
        require_choice("norm", norm, NORMS)
        builder, options = MODELS[name].builder, {"activation": activation, "norm": norm}
        if vocabulary is not None:
            if not MODELS[name].tokens:
                raise ModelError(f"model {name!r} expects floating point, not integer tokens: scale and convert them")
            options |= {"vocabulary": vocabulary}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = builder(shape, classes, **options)
        except ModelError:
            raise
        except Exception as error:  # from the user's own builder
            raise ModelError(f"model {name!r} cannot be built for examples of shape {shape}: {error}") from error
    if not isinstance(model, nn.Module):
        raise OptionError("model", name, f"a builder of a torch.nn.Module; it gave {type(model).__name__}")
    return model


def _import(name: str) -> Callable[..., nn.Module]:
    module, _, attribute = name.partition(":")
    try:
        builder = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise OptionError("model", name, f"an importable package.module:builder ({error})") from error
    if not callable(builder):
        raise OptionError("model", name, "a callable of (shape, classes)")
    result: Callable[..., nn.Module] = builder
    return result
