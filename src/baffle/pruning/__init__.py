"""Smaller models before training starts: single weights set to zero, or whole channels and neurons cut out.

Both happen once, on the server; clients then perturb and train only what is left.
"""

from baffle.pruning.structured import shrink
from baffle.pruning.unstructured import masks_of, prune

__all__ = ["masks_of", "prune", "shrink"]
