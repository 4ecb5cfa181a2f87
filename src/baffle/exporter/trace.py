"""Traces a PyTorch model to an ONNX graph whose trainable weights are inputs.

The model is traced with its weights as arguments. Exporting it with constant weights and turning these into inputs
afterwards would not work: exporters transpose, fold and merge constants (nine equal LayerNorm weights become one).
"""

from __future__ import annotations

import copy
import inspect
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from baffle.core.types import Table
from baffle.data import Dataset
from baffle.errors import ModelError
from baffle.exporter.branches import add_branches
from baffle.runtimes.onnx.bundle import Feed
from baffle.runtimes.pytorch.runtime import per_example, to_tensors

OPSET = 20


class _WeightsIn(nn.Module):
    """The model as a function of data (inputs and, for a loss, targets) and weights.

    It keeps the model out of ``modules()``, so that the exporter sees no parameters, which it would make constants.
    """

    def __init__(
        self, model: nn.Module, names: list[str], loss: Callable[[Tensor, Tensor], Tensor] | None, half: bool
    ) -> None:
        super().__init__()
        self.__dict__["hidden"] = (model.half() if half else model, names, loss, half)

    def forward(self, data: list[Tensor], weights: list[Tensor]) -> tuple[Tensor, ...]:
        model, names, loss, half = self.__dict__["hidden"]
        x = data[0]
        if half and x.is_floating_point():
            x = x.half()
        outputs = torch.func.functional_call(model, dict(zip(names, weights, strict=True)), (x,)).float()
        if loss is None:
            return (outputs,)
        with SpelledOut():
            return outputs, loss(outputs, data[1]).float()


class SpelledOut(TorchFunctionMode):
    """A mode that computes cross-entropy in elementary operations where the exporter drops label smoothing or fails."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.cross_entropy:
            call = inspect.signature(F.cross_entropy).bind(*args, **(kwargs or {}))
            call.apply_defaults()
            options = call.arguments
            unusual = options["label_smoothing"] or options["target"].is_floating_point()
            if unusual and options["reduction"] == "none":
                return _cross_entropy(
                    *(options[name] for name in ("input", "target", "weight", "ignore_index", "label_smoothing"))
                )
        return func(*args, **(kwargs or {}))


def _cross_entropy(x: Tensor, target: Tensor, weight: Tensor | None, ignored: int, smoothing: float) -> Tensor:
    """``F.cross_entropy`` without reduction, for labels or probabilities as targets: [n, classes, ...] -> [n, ...]."""
    terms = -F.log_softmax(x, 1)
    if weight is not None:
        terms = terms * weight.view(-1, *[1] * (x.ndim - 2))
    evenly = terms.mean(1)
    if target.is_floating_point():
        return (1 - smoothing) * (terms * target).sum(1) + smoothing * evenly
    plain = F.cross_entropy(x, target, weight, ignore_index=ignored, reduction="none")
    return (1 - smoothing) * plain + smoothing * evenly.masked_fill(target == ignored, 0)


def host_loss(loss: Callable[..., Tensor], targets: npt.NDArray[np.generic]) -> Literal["cross-entropy", "mse"] | None:
    """The name of the loss if the client can compute it from the outputs; None for any other.

    Examples:
        >>> host_loss(F.cross_entropy, np.array([0, 2, 1]))
        'cross-entropy'
    """
    plain = nn.CrossEntropyLoss()
    if loss is F.cross_entropy or isinstance(loss, nn.CrossEntropyLoss):
        usual = not isinstance(loss, nn.CrossEntropyLoss) or (
            loss.weight is None and loss.label_smoothing == 0 and loss.ignore_index == plain.ignore_index
        )
        labels = targets.ndim == 1 and targets.dtype.kind == "i"  # neither one label per position nor probabilities
        return "cross-entropy" if usual and labels else None
    return "mse" if loss is F.mse_loss or isinstance(loss, nn.MSELoss) else None


def trace(
    model: nn.Module, loss: Callable[..., Tensor], table: Table, sample: Dataset, *, branches: bool, half: bool
) -> tuple[Table, tuple[Feed, ...], onnx.ModelProto]:
    """Trace a model to a graph whose trainable weights are inputs.

    The graph's inputs are x, y (with a loss in the graph), the tensors of the table by name and, with ``branches``,
    the factors of their side branches.

    Args:
        model: The model; never changed.
        loss: ``loss(output, target)``; part of the graph unless the client can compute it.
        table: The trainable tensors.
        sample: A few examples.
        branches: Whether to add rank-1 side branches.
        half: Whether the graph computes in float16.

    Returns:
        (the table, how each of its tensors enters the graph, the graph).

    Raises:
        ModelError: If the model cannot be exported so.
    """
    model = copy.deepcopy(model).cpu()
    for p in model.parameters():
        p.requires_grad_(False)
    unpruned = {spec.name for spec in table if not spec.kept}  # a product cannot leave pruned entries out
    branched = add_branches(model, unpruned) if branches else frozenset[str]()
    if branches and not branched:
        raise ModelError(
            "branches: no trainable linear layer or convolution (of one group, not pruned): expected at least one"
        )
    dtype = torch.float16 if half else torch.float32
    shapes = {spec.name: spec.shape for spec in table}
    for spec in table:
        if spec.name in branched:
            out, rest = spec.matrix or (0, 0)
            owner = spec.name.removesuffix("weight")
            shapes |= {f"{owner}left": (out,), f"{owner}right": (rest,)}
    random = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=random).to(dtype) * 0.1 for shape in shapes.values()]
    # two examples: the exporter takes a dimension of size 1 for a constant
    x, y = to_tensors(sample.take(np.arange(2) % len(sample)), torch.device("cpu"))
    in_graph = None if host_loss(loss, sample.y) else per_example(loss)
    wrapper = _WeightsIn(model, list(shapes), in_graph, half)
    batch = torch.export.Dim("batch", min=1, max=2**20)
    names = [_input_name(name, branched) for name in shapes]
    inputs, outputs = ["x"], ["outputs"]
    if in_graph is not None:
        inputs, outputs = ["x", "y"], ["outputs", "losses"]
    dims = {"data": [{0: batch}] * len(inputs), "weights": [None] * len(weights)}
    graph = to_graph(wrapper, ([x, y][: len(inputs)], weights), [*inputs, *names], outputs, dims)
    _check_inputs(graph, dict(zip(names, shapes.values(), strict=True)), {spec.name for spec in table})
    kinds: list[Feed] = ["branch" if s.name in branched else "float16" if half else "float32" for s in table]
    return table, tuple(kinds), graph


def to_graph(
    module: nn.Module, arguments: tuple[Any, ...], inputs: list[str], outputs: list[str], dims: dict[str, Any]
) -> onnx.ModelProto:
    """Export a module for a batch of any size. Raises ModelError if that cannot be done."""
    try:
        with _quietly():
            program = torch.onnx.export(
                module,
                arguments,
                dynamo=True,
                opset_version=OPSET,
                input_names=inputs,
                output_names=outputs,
                dynamic_shapes=dims,
                verbose=False,
            )
    except Exception as error:  # the exporter raises types of its own, from deep within
        cause = error.__cause__ or error  # the exporter's own message starts with advice about the exporter
        lines = str(cause).strip().splitlines() or [type(cause).__name__]
        raise ModelError(f"the model cannot be exported to ONNX with a batch of any size: {lines[0]}") from error
    assert program is not None  # with dynamo=True and no file a program is returned
    graph = program.model_proto
    _strip(graph)
    return graph


def _strip(graph: onnx.ModelProto) -> None:
    """Remove the exporter's notes on where each node comes from: source lines, and paths on the exporting machine."""
    stack: list[Any] = [graph]
    while stack:
        message = stack.pop()
        for field, value in message.ListFields():
            if field.name in ("metadata_props", "doc_string"):
                message.ClearField(field.name)
            elif field.message_type is not None:
                stack += [value] if hasattr(value, "ListFields") else value


def _check_inputs(graph: onnx.ModelProto, expected: dict[str, tuple[int, ...]], trained: set[str]) -> None:
    """Check that every tensor is an input of its own shape and is read, and that the batch size is not fixed."""
    for i in graph.graph.input:
        if i.name in ("x", "y") and not i.type.tensor_type.shape.dim[0].dim_param:
            raise ModelError(
                "the model cannot be exported to ONNX with a batch of any size: what it computes depends on how many "
                "examples there are"
            )
    actual = {
        i.name: tuple(d.dim_value for d in i.type.tensor_type.shape.dim)
        for i in graph.graph.input
        if i.name not in ("x", "y")
    }
    if actual != expected:
        names = sorted({n for n, _ in actual.items() ^ expected.items()})
        raise ModelError(f"exported weight inputs differ from the model's parameters: {', '.join(names)}")
    read = {name for node in graph.graph.node for name in node.input} | {o.name for o in graph.graph.output}
    unread = [name for name in expected if name not in read and name in trained]
    if unread:
        raise ModelError(f"{', '.join(unread)}: the model does not use it: freeze it (requires_grad=False)")


def _input_name(name: str, branched: frozenset[str]) -> str:
    """The input's name; factors are named after their tensor: ``conv.left`` -> ``conv.weight.left``."""
    owner, _, last = name.rpartition(".")
    weight = f"{owner}.weight" if owner else "weight"
    return f"{weight}.{last}" if last in ("left", "right") and weight in branched else name


@contextmanager
def _quietly() -> Iterator[None]:
    """A context that silences the exporter, which logs, warns and prints."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
