"""Data sets as numpy arrays: loading them, splitting them among clients, drawing mini-batches."""

from baffle.data.augment import augment
from baffle.data.dataset import Dataset, Scaling, concatenate, from_torch, sample
from baffle.data.partitions import hold_out, partition
from baffle.data.sources import DATASETS, load

__all__ = [
    "DATASETS",
    "Dataset",
    "Scaling",
    "augment",
    "concatenate",
    "from_torch",
    "hold_out",
    "load",
    "partition",
    "sample",
]
