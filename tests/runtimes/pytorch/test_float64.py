"""Reference derivatives: of a quadratic they are known, and differences agree with backpropagation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from baffle.core.directions import Directions
from baffle.core.quantize import lattice_steps
from baffle.core.types import Family
from baffle.data import Dataset
from baffle.runtimes.perturb import Perturbations
from baffle.runtimes.pytorch.float64 import derivatives
from baffle.runtimes.pytorch.runtime import TorchRuntime


@pytest.mark.parametrize("family", ["rank1", "rademacher", "gaussian"])
@pytest.mark.parametrize("lattice", [0, 2])
def test_derivatives_of_a_quadratic_by_hand(family: Family, lattice: int) -> None:
    """Of (w x)² with x the unit vectors, the mean over outputs and examples has the gradient 2 w / size."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2, bias=False)
    data = Dataset(np.eye(3), np.zeros((3, 2)))
    runtime = TorchRuntime(model, F.mse_loss)
    weights = runtime.initial_weights()
    perturbations = Perturbations(Directions(runtime.table, family, (0, 1)), 4, (1e-3,), 1, lattice=lattice)
    differences, gradients = derivatives(model, F.mse_loss, weights, perturbations, data)
    directions = perturbations.directions.entries(0, slice(0, 4)) * perturbations.directions.unit
    if lattice:
        directions = directions * np.repeat(lattice_steps(runtime.table, weights, 1e-3, lattice)[0], 3)
    expected = directions @ (2 * weights.astype(np.float64) / weights.size)
    assert np.allclose(gradients, expected, rtol=1e-5)
    assert np.allclose(differences, gradients, atol=1e-8)
