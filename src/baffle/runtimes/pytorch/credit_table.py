"""The tensor table of a credited model: which numbers each tensor is rebuilt from, and the local heads behind it."""

from __future__ import annotations

import hashlib

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from baffle.core.types import Credit, ParamSpec, Table, Weights, table_size
from baffle.runtimes.pytorch.chain import Chain

_TRIED = 4  # examples on which the chain is found


def examples_like(example: Tensor) -> Tensor:
    """Examples to find a model's chain on, the same on every machine: only the shape and type of [1, ...] count."""
    shape = (_TRIED, *example.shape[1:])
    if example.is_floating_point():
        return torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return (torch.arange(_TRIED * example[0].numel()).reshape(shape) % 2).to(example.dtype)


def credited(table: Table, weights: Weights, chain: Chain) -> tuple[Table, Weights]:
    """The table of a model with its credit and its local heads, and the weights with those of the heads."""
    named = {name for segment in chain.segments for name in segment.names}
    named |= {name for head in chain.heads for name in head.names}
    number = int(any(spec.name not in named for spec in table))  # one scalar per direction comes first
    credits: dict[str, Credit] = {}
    for segment in chain.segments:
        credits |= {name: Credit(number, "rows", _runs(segment.numbers[name])) for name in segment.names}
        number += 1
    extra: list[tuple[str, tuple[int, ...], Credit]] = []
    [outputs] = (spec.shape[0] for spec in table if spec.name == chain.heads[-1].weight)
    for head in chain.heads:
        credit = Credit(number, "exact", (), not head.own)
        credits |= dict.fromkeys(head.names, credit)
        if not head.own:
            extra += [(head.weight, (outputs, head.count), credit), (str(head.bias), (outputs,), credit)]
        number += 1
    specs = [msgspec.structs.replace(spec, credit=credits.get(spec.name, Credit())) for spec in table]
    start = table_size(table)
    values = [weights]
    for name, shape, credit in extra:
        specs.append(ParamSpec(name, shape, start, b"", credit))
        start += specs[-1].size
        values.append(_first_weights(name, shape))
    return tuple(specs), np.concatenate(values)


def _first_weights(name: str, shape: tuple[int, ...]) -> Weights:
    """A local head's first weights: uniform up to 1 / sqrt(features), from a generator keyed by its name; biases 0."""
    if len(shape) == 1:
        return np.zeros(shape, np.float32)
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "little")
    values = np.random.Generator(np.random.Philox(key=key)).uniform(-1, 1, shape) / np.sqrt(shape[1])
    flat: Weights = values.astype(np.float32).reshape(-1)
    return flat


def _runs(numbers: npt.NDArray[np.int64]) -> tuple[tuple[int, int, int], ...]:
    """Numbers of rows as runs (rows, first, step); none where row r has number r."""
    if np.array_equal(numbers, np.arange(len(numbers))):
        return ()
    runs: list[tuple[int, int, int]] = []
    start = 0
    while start < len(numbers):
        step = 1 if start + 1 < len(numbers) and numbers[start + 1] == numbers[start] + 1 else 0
        stop = start + 1
        while stop < len(numbers) and numbers[stop] == numbers[stop - 1] + step:
            stop += 1
        runs.append((stop - start, int(numbers[start]), step))
        start = stop
    return tuple(runs)
