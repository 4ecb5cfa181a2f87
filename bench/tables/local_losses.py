"""Local losses by backpropagation: what credit by rows would reach with exact derivatives.

The units and heads are those of ``baffle.runtimes.pytorch.chain``; every unit is differentiated on its own, on inputs
that are detached. A reference to compare with: it needs what forward-only training avoids.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import baffle as bf
from baffle.runtimes.pytorch.chain import find_chain, is_tokens, pooled, run
from baffle.runtimes.pytorch.credit import credited, examples_like


class LocalLosses(nn.Module):
    """A model with a head on every unit: examples -> the outputs of all heads [n, classes, heads], its own the last.

    Args:
        model: where to start from.
        sample: some examples, to find the units by.
    """

    def __init__(self, model: nn.Module, sample: bf.Dataset) -> None:
        super().__init__()
        runtime = bf.TorchRuntime(model, F.cross_entropy)
        example = torch.from_numpy(sample.take(np.arange(1)).inputs())
        self._chain = find_chain(model, examples_like(example), True)
        table, weights = credited(runtime.table, runtime.initial_weights(), self._chain)
        self._names = [spec.name for spec in table]
        self._values = nn.ParameterList(
            nn.Parameter(torch.from_numpy(weights[spec.slice].reshape(spec.shape).copy())) for spec in table
        )

    def forward(self, x: Tensor) -> Tensor:
        """The outputs of all heads; gradients stay within the unit of each."""
        chain, values = self._chain, dict(zip(self._names, self._values, strict=True))
        cuts = {head.features: head for head in chain.heads}
        env = dict(chain.constants) | {chain.inputs: x}
        env |= {n: values[name] for n, name in chain.parameters.items() if n not in chain.constants}
        outputs = []
        for node in chain.nodes:
            env[node] = run(node, env)
            if node in cuts:
                head = cuts[node]
                bias = None if head.bias is None else values[head.bias]
                outputs.append(F.linear(pooled(env[node], is_tokens(head)), values[head.weight], bias))
                env[node] = env[node].detach()
        return torch.stack(outputs, dim=2)

    def accuracy(self, data: bf.Dataset) -> float:
        """The share of examples that the last head, which is the model's own, gets right."""
        hits = 0
        with torch.inference_mode():
            for start in range(0, len(data), 500):
                batch = data.take(np.arange(start, min(start + 500, len(data))))
                found = self(torch.from_numpy(batch.inputs()))[:, :, -1].argmax(1)
                hits += int((found == torch.from_numpy(batch.y)).sum())
        return hits / len(data)


def local_loss(outputs: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
    """The sum of all heads' losses."""
    each = F.cross_entropy(outputs, y[:, None].expand(-1, outputs.shape[2]), reduction="none").sum(1)
    return each.mean() if reduction == "mean" else each
