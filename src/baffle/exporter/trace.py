"""A PyTorch model as an ONNX graph whose trainable weights are inputs.

The graph is traced with the weights as arguments: a graph that was exported with its weights in it must not be
changed afterwards, since exporters transpose, fold and merge them (nine equal LayerNorm weights become one).
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baffle.data import Dataset
from baffle.errors import ModelError
from baffle.exporter.branches import add_branches
from baffle.runtimes.bundle import Feed
from baffle.runtimes.pytorch import per_example, to_tensors
from baffle.types import Table

OPSET = 20


class _WeightsIn(nn.Module):
    """The model as a function of inputs, targets and weights. It hides the model, so that nothing is a parameter."""

    def __init__(
        self, model: nn.Module, names: list[str], loss: Callable[[Tensor, Tensor], Tensor] | None, half: bool
    ) -> None:
        super().__init__()
        self.__dict__["hidden"] = (model.half() if half else model, names, loss, half)

    def forward(self, x: Tensor, y: Tensor, weights: list[Tensor]) -> tuple[Tensor, ...]:
        model, names, loss, half = self.__dict__["hidden"]
        if half and x.is_floating_point():
            x = x.half()
        outputs = torch.func.functional_call(model, dict(zip(names, weights, strict=True)), (x,)).float()
        return (outputs,) if loss is None else (outputs, loss(outputs, y).float())


def host_loss(loss: Callable[..., Tensor]) -> Literal["cross-entropy", "mse"] | None:
    """The name of a loss that the client takes from the outputs itself; None for any other."""
    plain = nn.CrossEntropyLoss()
    if loss is F.cross_entropy:
        return "cross-entropy"
    if isinstance(loss, nn.CrossEntropyLoss):
        usual = loss.weight is None and loss.label_smoothing == 0 and loss.ignore_index == plain.ignore_index
        return "cross-entropy" if usual else None
    return "mse" if loss is F.mse_loss or isinstance(loss, nn.MSELoss) else None


def trace(
    model: nn.Module, loss: Callable[..., Tensor], table: Table, sample: Dataset, *, branches: bool, half: bool
) -> tuple[Table, tuple[Feed, ...], onnx.ModelProto]:
    """The graph, and how it takes each tensor. Raises ModelError if the model cannot be exported so.

    Inputs: x, y (with a loss in the graph), the tensors of the table by name and, with ``branches``, their factors.
    """
    model = copy.deepcopy(model)
    for p in model.parameters():
        p.requires_grad_(False)
    branched = add_branches(model, {spec.name for spec in table}) if branches else frozenset[str]()
    if branches and not branched:
        raise ModelError("branches: no trainable linear layer or convolution (of one group): expected at least one")
    dtype = torch.float16 if half else torch.float32
    shapes = {spec.name: spec.shape for spec in table}
    for spec in table:
        if spec.name in branched:
            out, rest = spec.matrix or (0, 0)
            owner = spec.name.removesuffix("weight")
            shapes |= {f"{owner}left": (out,), f"{owner}right": (rest,)}
    weights = [torch.randn(shape).to(dtype) * 0.1 for shape in shapes.values()]
    # with one example, a batch of one would be taken for a constant
    x, y = to_tensors(sample.take(np.arange(2) % len(sample)), torch.device("cpu"))
    in_graph = None if host_loss(loss) else per_example(loss)
    wrapper = _WeightsIn(model, list(shapes), in_graph, half)
    batch = torch.export.Dim("batch", min=1, max=2**20)
    names = [_input_name(name, branched) for name in shapes]
    outputs = ["outputs"] if in_graph is None else ["outputs", "losses"]
    try:
        with _quietly():
            program = torch.onnx.export(
                wrapper,
                (x, y, weights),
                dynamo=True,
                opset_version=OPSET,
                input_names=["x", "y", *names],
                output_names=outputs,
                dynamic_shapes={"x": {0: batch}, "y": {0: batch}, "weights": [None] * len(weights)},
                verbose=False,
            )
    except Exception as error:  # the exporter raises kinds of its own, from deep within
        cause = str(error).strip().splitlines()
        raise ModelError(
            f"the model cannot be exported to ONNX with a batch of any size: {cause[0] if cause else error!r}"
        ) from error
    assert program is not None  # with dynamo=True and no file a program is returned
    graph = program.model_proto
    if in_graph is None:  # the exporter keeps an input that nothing reads
        kept = [i for i in graph.graph.input if i.name != "y"]
        del graph.graph.input[:]
        graph.graph.input.extend(kept)
    _check_inputs(graph, dict(zip(names, shapes.values(), strict=True)))
    kinds: list[Feed] = ["branch" if s.name in branched else "float16" if half else "float32" for s in table]
    return table, tuple(kinds), graph


def _check_inputs(graph: onnx.ModelProto, expected: dict[str, tuple[int, ...]]) -> None:
    """Every tensor must be an input of its own with its own shape, and must be read."""
    found = {
        i.name: tuple(d.dim_value for d in i.type.tensor_type.shape.dim)
        for i in graph.graph.input
        if i.name not in ("x", "y")
    }
    if found != expected:
        names = sorted({n for n, _ in found.items() ^ expected.items()})
        raise ModelError(f"exported weight inputs differ from the model's parameters: {', '.join(names)}")
    read = {name for node in graph.graph.node for name in node.input} | {o.name for o in graph.graph.output}
    unread = [name for name in expected if name not in read]
    if unread:
        raise ModelError(f"{', '.join(unread)}: the model does not use it: freeze it (requires_grad=False)")


def _input_name(name: str, branched: frozenset[str]) -> str:
    """Factors are named after the tensor: ``conv.left`` -> ``conv.weight.left``."""
    owner, _, last = name.rpartition(".")
    weight = f"{owner}.weight" if owner else "weight"
    return f"{weight}.{last}" if last in ("left", "right") and weight in branched else name


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the exporter's remarks."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
