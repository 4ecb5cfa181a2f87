"""Pruning before training starts: unstructured (single weights set to zero) or structured (whole channels removed).

Both happen once, on the server; clients then perturb and train only the remaining weights.
"""

from baffle.pruning.structured import shrink
from baffle.pruning.unstructured import masks_of, prune

__all__ = ["masks_of", "prune", "shrink"]
