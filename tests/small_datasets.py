"""Small data sets whose examples can be told apart."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from baffle.data import Dataset

seeds = st.integers(0, 2**64 - 1)


def numbered(labels: npt.NDArray[np.int64]) -> Dataset:
    """Examples that carry their own number, so that a partition can be followed."""
    return Dataset(np.arange(len(labels), dtype=np.int64)[:, None], labels)


def numbers(data: Dataset) -> list[int]:
    return [int(i) for i in data.x[:, 0]]


class Seen(nn.Module):
    """A linear model that notes its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.inputs = nn.Linear(64, 10), list[bytes]()

    def __deepcopy__(self, memo: object) -> Seen:
        return self

    def forward(self, x: Tensor) -> Tensor:
        self.inputs.append(x.numpy().tobytes())
        return torch.as_tensor(self.linear(x.flatten(1)))
