"""Local losses by backpropagation: what credit by rows would reach with exact derivatives.

The units and heads are those of ``baffle.runtimes.pytorch.chain``; every unit is differentiated on its own, on clean
inputs. A reference to compare with: it needs what forward-only training avoids.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import baffle as bf
from baffle.runtimes.pytorch.chain import Chain, Head, again, find_chain, is_tokens, pooled, values_of
from baffle.runtimes.pytorch.credit_table import credited, examples_like


@dataclass(frozen=True, eq=False)
class _Graph:
    """A chain that copies of a module share: nodes of a graph have no copies."""

    chain: Chain

    def __deepcopy__(self, memo: dict[int, Any]) -> _Graph:
        return self


class LocalLosses(nn.Module):
    """A model with a head on every unit.

    Called with examples it gives the outputs of every unit's head as the unit alone can change them, then those of the
    heads themselves: [n, classes, units + heads]. The last is the model's own.

    Args:
        model: where to start from.
        sample: some examples, to find the units by.
    """

    def __init__(self, model: nn.Module, sample: bf.Dataset) -> None:
        super().__init__()
        runtime = bf.TorchRuntime(model, F.cross_entropy, threads=1)
        example = torch.from_numpy(sample.take(np.arange(1)).inputs())
        self._graph = _Graph(find_chain(model, examples_like(example), True))
        table, weights = credited(runtime.table, runtime.initial_weights(), self._graph.chain)
        self._names = [spec.name for spec in table]
        self._values = nn.ParameterList(
            nn.Parameter(torch.from_numpy(weights[spec.slice].reshape(spec.shape).copy())) for spec in table
        )

    def forward(self, x: Tensor) -> Tensor:
        """The outputs of all heads; gradients stay within each unit and each head."""
        chain, values = self._graph.chain, dict(zip(self._names, self._values, strict=True))
        with torch.no_grad():
            env = values_of(chain, x, lambda name: values[name].detach())

        def outputs(head: Head, features: Tensor, trained: bool) -> Tensor:
            weight, *bias = (values[name] if trained else values[name].detach() for name in head.names)
            return F.linear(features, weight, *bias)

        found = []
        for segment in chain.segments if torch.is_grad_enabled() else ():
            changed = {n: values[name] for n, name in chain.parameters.items() if name in segment.names}
            found.append(outputs(chain.heads[segment.head], again(chain, segment, env, changed), False))
        found += [outputs(head, pooled(env[head.features], is_tokens(head)), True) for head in chain.heads]
        return torch.stack(found, dim=2)

    def accuracy(self, data: bf.Dataset) -> float:
        """The share of examples that the model itself gets right."""
        hits = 0
        with torch.no_grad():
            for start in range(0, len(data), 500):
                batch = data.take(np.arange(start, min(start + 500, len(data))))
                found = self(torch.from_numpy(batch.inputs()))[:, :, -1].argmax(1)
                hits += int((found == torch.from_numpy(batch.y)).sum())
        return hits / len(data)


def local_loss(outputs: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
    """The sum of all heads' losses."""
    each = F.cross_entropy(outputs, y[:, None].expand(-1, outputs.shape[2]), reduction="none").sum(1)
    return each.mean() if reduction == "mean" else each
