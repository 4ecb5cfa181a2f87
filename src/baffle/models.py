"""Models to start from. All use Hardswish and no BatchNorm, as the paper advises (arXiv 2301.12195, section 4).

A builder takes the shape of one example and the number of classes.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable

from baffle.errors import MissingExtraError, ModelError, OptionError, require_choice

try:
    import torch
    from torch import nn
except ImportError as error:
    raise MissingExtraError("PyTorch is not installed: pip install 'baffle[torch]'") from error

Builder = Callable[[tuple[int, ...], int], nn.Module]


def lenet_small(shape: tuple[int, ...], classes: int) -> nn.Module:
    """LeNet for small images: two 5 x 5 convolutions (16, 64), each pooled by 2, and a linear layer.

    28,650 parameters on digits.
    """
    if len(shape) != 3 or min(shape[1:]) < 4:
        raise ModelError(f"lenet-small: examples of shape {shape}: expected (channels, height >= 4, width >= 4)")
    channels, height, width = shape
    return nn.Sequential(
        nn.Conv2d(channels, 16, 5, padding=2),
        nn.Hardswish(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 64, 5, padding=2),
        nn.Hardswish(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * (height // 4) * (width // 4), classes),
    )


def mlp(shape: tuple[int, ...], classes: int) -> nn.Module:
    """A perceptron with hidden layers of 200 and 64: 26,514 parameters on digits."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(math.prod(shape), 200),
        nn.Hardswish(),
        nn.Linear(200, 64),
        nn.Hardswish(),
        nn.Linear(64, classes),
    )


MODELS: dict[str, Builder] = {"lenet-small": lenet_small, "mlp": mlp}


def build(name: str, shape: tuple[int, ...], classes: int, seed: int = 0) -> nn.Module:
    """A model by name, or by ``package.module:builder`` of the user's own, initialised from ``seed``.

    PyTorch's global generator is left as it was.

    Examples:
        >>> sum(p.numel() for p in build("lenet-small", (1, 8, 8), 10).parameters())
        28650
    """
    if ":" in name:
        builder = _import(name)
    else:
        require_choice("model", name, MODELS)
        builder = MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = builder(shape, classes)
        except ModelError:
            raise
        except Exception as error:  # of the user's own builder
            raise ModelError(f"model {name!r} cannot be built for examples of shape {shape}: {error}") from error
    if not isinstance(model, nn.Module):
        raise OptionError("model", name, f"a builder of a torch.nn.Module; it gave {type(model).__name__}")
    return model


def _import(name: str) -> Builder:
    module, _, attribute = name.partition(":")
    try:
        builder = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise OptionError("model", name, f"an importable package.module:builder ({error})") from error
    if not callable(builder):
        raise OptionError("model", name, "a callable of (shape, classes)")
    result: Builder = builder
    return result
