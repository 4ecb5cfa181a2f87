"""What the engine is compared with: reference loops, written as plainly as what they stand for.

R1, R2 and R4 give the scalars or the gradient that they compute, so that tests can hold them against float64. R3 is our
own path without a perturbation (workloads.unperturbed), and OpenVINO's with constant weights (graphs.ConstantFolded).
R5, the rebuild from regenerated normal numbers, is in rebuild.py. All models classify: the loss is the cross entropy,
averaged over the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

Batch = tuple[Tensor, Tensor]


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """PyTorch with so many threads a kernel, within the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def published(
    model: nn.Module, clients: Sequence[Batch], num_directions: int, sigma: float, generator: torch.Generator
) -> Tensor:
    """R1, the published way: forward differences of every client, float32[clients, K], by K + 1 passes each.

    One client after another, one direction at a time: normal numbers are drawn for each parameter, added to it in
    place, and subtracted again after the forward pass. float32, the usual layout.
    Source: BAFFLE (arXiv 2301.12195), section 3, as its published code (github.com/FengHZ/BAFFLE) does it.
    """
    parameters = list(model.parameters())
    scalars = torch.empty(len(clients), num_directions)
    with torch.inference_mode():
        for c, (x, y) in enumerate(clients):
            base = cross_entropy(model(x), y)
            for k in range(num_directions):
                direction = [torch.randn(p.shape, generator=generator) for p in parameters]
                for p, d in zip(parameters, direction, strict=True):
                    p.add_(d, alpha=sigma)
                scalars[c, k] = (cross_entropy(model(x), y) - base) / sigma
                for p, d in zip(parameters, direction, strict=True):
                    p.sub_(d, alpha=sigma)
    return scalars


def vmapped(
    model: nn.Module,
    batch: Batch,
    num_directions: int,
    sigma: float,
    generator: torch.Generator,
    chunk: int,
) -> Tensor:
    """R2: the same forward differences of one client, float32[K], by ``vmap`` over perturbed sets of parameters.

    ``chunk`` directions at a time, since each has a copy of the parameters and activations of its own.
    Source: "Model ensembling" of the PyTorch tutorials (torch.func.vmap with functional_call).
    """
    x, y = batch
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(perturbed: dict[str, Tensor]) -> Tensor:
        return cross_entropy(torch.func.functional_call(model, perturbed, (x,)), y)

    scalars = []
    with torch.inference_mode():
        base = cross_entropy(model(x), y)
        for start in range(0, num_directions, chunk):
            count = min(chunk, num_directions - start)
            perturbed = {
                name: p + sigma * torch.randn(count, *p.shape, generator=generator) for name, p in parameters.items()
            }
            scalars.append((torch.func.vmap(loss)(perturbed) - base) / sigma)
    return torch.cat(scalars)


def gradient(model: nn.Module, batch: Batch) -> list[Tensor]:
    """R4: the gradient of the same batch by backpropagation (Rumelhart et al., Nature 1986), float32."""
    loss = cross_entropy(model(batch[0]), batch[1])
    return list(torch.autograd.grad(loss, list(model.parameters())))
