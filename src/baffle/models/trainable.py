"""Which parameters are trained: all, the head, per-channel scales and biases, or those with matching names.

All other parameters are frozen: they are neither perturbed nor sent, and an int8 export turns them into int8
constants, while the trained ones stay in float. Training only scales and biases is as in BitFit (arXiv 2106.10199)
and scale-and-shift tuning (SSF, arXiv 2210.08823).
"""

from __future__ import annotations

import fnmatch

import torch
from torch import Tensor, nn

from baffle.errors import OptionError


class Gained(nn.Module):
    """A linear layer or convolution with frozen weights and one trained gain per output channel.

    Gains start at 1, so that the outputs are at first those of the layer.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        channels = layer.weight.shape[0]
        self.gain = nn.Parameter(torch.ones(channels))
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone())
        layer.bias = None
        self.layer = layer.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs of the layer, times the gain of each channel, plus the bias."""
        y: Tensor = self.layer(x)
        shape = (1, -1, 1, 1) if isinstance(self.layer, nn.Conv2d) else (-1,)
        y = y * self.gain.view(shape)
        return y if self.bias is None else y + self.bias.view(shape)


def train_only(model: nn.Module, which: str) -> None:
    """Freeze all parameters but some, in place.

    Args:
        model: The model to change.
        which: The parameters to train:

            * ``all``;
            * ``head``: those of the last layer with parameters;
            * ``scales``: a new gain for each output channel of each linear layer and convolution, and the biases;
            * a pattern of parameter names with ``*`` and ``?``.

    Raises:
        OptionError: If no parameter is selected.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> train_only(model, "head")
        >>> [name for name, p in model.named_parameters() if p.requires_grad]
        ['2.weight', '2.bias']
    """
    if which == "all":
        return
    if which == "scales":
        _add_gains(model)
        chosen = [n for n, _ in model.named_parameters() if n.rpartition(".")[2] in ("gain", "bias")]
    elif which == "head":
        names = [name for name, _ in model.named_parameters()]
        chosen = [n for n in names if n.rpartition(".")[0] == names[-1].rpartition(".")[0]] if names else []
    else:
        chosen = fnmatch.filter([n for n, _ in model.named_parameters()], which)
    if not chosen:
        names = [name for name, _ in model.named_parameters()]
        some = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
        raise OptionError("trainable", which, f"all, head, scales, or a pattern of parameter names ({some})")
    trained = set(chosen)
    for name, p in model.named_parameters():
        p.requires_grad_(name in trained)


def _add_gains(model: nn.Module) -> None:
    gained: dict[nn.Module, Gained] = {}  # a layer with several names stays a single one
    for name, layer in list(model.named_modules(remove_duplicate=False)):
        if name and type(layer) in (nn.Linear, nn.Conv2d):
            assert isinstance(layer, (nn.Linear, nn.Conv2d))
            if layer not in gained:
                gained[layer] = Gained(layer)
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, gained[layer])
