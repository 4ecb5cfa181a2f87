"""Reference derivatives in float64, by finite differences and by backpropagation.

They use autograd, so only ``baffle calibrate`` and tests call them; a client never does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from baffle.core.quantize import lattice_steps
from baffle.core.types import Weights
from baffle.data import Dataset
from baffle.runtimes.perturb import Perturbations
from baffle.runtimes.pytorch.runtime import per_example, to_tensors

_STEP = 1e-6

Float64 = npt.NDArray[np.float64]


def derivatives(
    model: nn.Module, loss: Callable[..., Tensor], weights: Weights, perturbations: Perturbations, batch: Dataset
) -> tuple[Float64, Float64]:
    """Derivatives of the mean loss at ``weights`` along each direction of ``perturbations``.

    With int8 codes (``perturbations.lattice``) a direction is scaled row by row by the size of the codes' steps, in
    units of sigma, as the perturbation itself is.

    Args:
        model: Any module; never changed.
        loss: ``loss(output, target)``.
        weights: float32[n].
        perturbations: The K directions.
        batch: The examples that the loss is averaged over.

    Returns:
        (central differences with a step of 1e-6, products of the direction with the gradient by backpropagation), both
        float64[K].

    Examples:
        >>> from baffle.data import load
        >>> from baffle.core.directions import Directions
        >>> from baffle.runtimes.pytorch.runtime import TorchRuntime
        >>> model, loss = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), nn.functional.cross_entropy
        >>> runtime = TorchRuntime(model, loss)
        >>> some = Perturbations(Directions(runtime.table, "rank1", (0, 1)), 4, (1e-3,), baseline=True)
        >>> a, b = derivatives(model, loss, runtime.initial_weights(), some, load("digits")[1])
        >>> bool(np.allclose(a, b, atol=1e-7))
        True
    """
    table = perturbations.directions.table
    double = copy.deepcopy(model).double()
    x, y = to_tensors(batch, torch.device("cpu"))
    x, y = (t.double() if t.is_floating_point() else t for t in (x, y))
    measure = per_example(loss)

    def mean_loss(flat: Tensor) -> Tensor:
        parameters = {spec.name: flat[spec.slice].view(spec.shape) for spec in table}
        return measure(torch.func.functional_call(double, parameters, (x,)), y).mean()

    start = torch.from_numpy(weights.astype(np.float64))
    directions = torch.from_numpy(_entries(perturbations, weights))
    flat = start.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(mean_loss(flat), flat)
    with torch.no_grad():
        gaps = [mean_loss(start + _STEP * d) - mean_loss(start - _STEP * d) for d in directions]
    differences = torch.stack(gaps).numpy() / (2 * _STEP)
    return differences, (directions @ gradient).numpy()


def _entries(perturbations: Perturbations, weights: Weights) -> Float64:
    """The directions, written out: float64[K, n]."""
    directions = perturbations.directions
    ks = slice(perturbations.first, perturbations.first + perturbations.num_directions)
    steps = {}
    if perturbations.lattice:
        steps = lattice_steps(directions.table, weights, max(perturbations.steps), perturbations.lattice)
    parts = []
    for i, spec in enumerate(directions.table):
        part = directions.entries(i, ks).astype(np.float64) * directions.unit
        if i in steps:
            rows = np.repeat(steps[i].astype(np.float64), spec.size // len(steps[i]))
            part = part * rows
        parts.append(part)
    return np.concatenate(parts, axis=1)
