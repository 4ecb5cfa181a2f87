"""Rank-1 perturbations added to a layer's output instead of its weights: x Wᵀ + (x b) aᵀ.

The perturbed weight never exists, so W can be anything, int8 codes too, and nothing of the perturbation is rounded
to it. (EGGROLL, Sarkar et al. 2025; DESIGN: section on directions.)
"""

from __future__ import annotations

from collections import Counter

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BranchLinear(nn.Module):
    """A linear layer with a rank-1 branch ``left`` [out], ``right`` [in]."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.left = nn.Parameter(torch.zeros(layer.out_features), requires_grad=False)
        self.right = nn.Parameter(torch.ones(layer.in_features), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        branch = (x * self.right).sum(-1, keepdim=True)
        return F.linear(x, self.weight, self.bias) + branch * self.left


class BranchConv2d(nn.Module):
    """A convolution with a rank-1 branch ``left`` [out], ``right`` [in * height * width]."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.stride, self.padding, self.dilation = layer.stride, layer.padding, layer.dilation
        self.left = nn.Parameter(torch.zeros(layer.weight.shape[0]), requires_grad=False)
        self.right = nn.Parameter(torch.ones(layer.weight[0].numel()), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """[n, in, h, w] -> [n, out, h', w']"""
        kernel = self.right.view(1, *self.weight.shape[1:])
        branch = F.conv2d(x, kernel, None, self.stride, self.padding, self.dilation)
        plain = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation)
        return plain + branch * self.left.view(1, -1, 1, 1)


def add_branches(model: nn.Module, trained: set[str]) -> frozenset[str]:
    """Replace layers by ones with a branch, in place; the names of the weights that got one.

    Those of linear layers and of convolutions with one group and zero padding, unless another layer shares them.
    """
    owners = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    found = set[str]()
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
        found.add(weight)
    return frozenset(found)
