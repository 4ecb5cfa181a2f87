"""Rank-1 perturbations in a side branch, added to a layer's output instead of its weights: x Wᵀ + (x b) aᵀ.

This is the form of LoRA (Hu et al., arXiv 2106.09685) with rank 1, used for perturbations in EGGROLL (Sarkar et al.
2025). The perturbed weight never exists, so W may be stored in any format, even as int8 codes, and the perturbation is
not rounded to it.
"""

from __future__ import annotations

from collections import Counter

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BranchLinear(nn.Module):
    """A linear layer with a rank-1 side branch: ``left`` [out], ``right`` [in]."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.left = nn.Parameter(torch.zeros(layer.out_features), requires_grad=False)
        self.right = nn.Parameter(torch.ones(layer.in_features), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs of the layer plus its branch: [..., in] -> [..., out]."""
        branch = (x * self.right).sum(-1, keepdim=True)
        return F.linear(x, self.weight, self.bias) + branch * self.left


class BranchConv2d(nn.Module):
    """A convolution with a rank-1 side branch: ``left`` [out], ``right`` [in * height * width]."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.stride, self.padding, self.dilation = layer.stride, layer.padding, layer.dilation
        self.left = nn.Parameter(torch.zeros(layer.weight.shape[0]), requires_grad=False)
        self.right = nn.Parameter(torch.ones(layer.weight[0].numel()), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs of the convolution plus its branch: [n, in, h, w] -> [n, out, h', w']."""
        kernel = self.right.view(1, *self.weight.shape[1:])
        branch = F.conv2d(x, kernel, None, self.stride, self.padding, self.dilation)
        plain = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation)
        return plain + branch * self.left.view(1, -1, 1, 1)


def add_branches(model: nn.Module, trained: set[str]) -> frozenset[str]:
    """Replace layers by ones with a side branch, in place.

    Linear layers and convolutions (with one group and zero padding) are replaced, unless they share their weight.

    Args:
        model: The model to change.
        trained: Names of the weights that may get a branch.

    Returns:
        Names of the weights that have got one.
    """
    owners = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    branched = set[str]()
    for name, layer in list(model.named_modules()):
        weight = f"{name}.weight" if name else "weight"
        if not name or weight not in trained or owners[id(getattr(layer, "weight", None))] != 1:
            continue
        branch: nn.Module
        if type(layer) is nn.Linear:
            branch = BranchLinear(layer)
        elif type(layer) is nn.Conv2d and layer.groups == 1 and layer.padding_mode == "zeros":
            branch = BranchConv2d(layer)
        else:
            continue
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, branch)
        branched.add(weight)
    return frozenset(branched)
