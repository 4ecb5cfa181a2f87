"""Exports a credited model in blocks: a graph from each head to the next, and one for each unit of rows.

The graphs are pieces of the one that ``runtimes.pytorch.chain`` cuts (from ``torch.export``), each a function of the
values and of the weights that it reads. Numbers such as the size of the batch are computed anew in each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import onnx
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node

from baffle.core.types import Table
from baffle.errors import PlanError
from baffle.exporter.quantized import quantize
from baffle.exporter.trace import SpelledOut, to_graph
from baffle.runtimes.onnx.bundle import BlockGraphs, Feed, HeadGraph, RowsGraph
from baffle.runtimes.pytorch.chain import Chain, is_tokens, pooled, run, tail_of, values_of


@dataclass(frozen=True, eq=False)
class _Piece:
    """Some nodes of a chain as a function: which values it reads and gives, and the node that a head pools."""

    nodes: tuple[Node, ...]
    reads: tuple[Node, ...]
    gives: tuple[Node, ...]
    features: Node
    tokens: bool


class _Piecewise(nn.Module):
    """A piece as a function of values and weights."""

    def __init__(
        self,
        piece: _Piece,
        weights: Sequence[Node],
        factors: Mapping[Node, int],
        constants: Mapping[Node, Tensor],
        half: bool,
    ) -> None:
        super().__init__()
        self.__dict__["hidden"] = piece, weights, factors, constants, half

    def forward(self, values: list[Tensor], weights: list[Tensor]) -> tuple[Tensor, ...]:
        piece, names, factors, constants, half = self.__dict__["hidden"]
        env: dict[Node, Any] = dict(constants)
        for node, value in zip(piece.reads, values, strict=True):
            env[node] = value.half() if half and value.is_floating_point() else value
        env |= dict(zip(names, weights[: len(names)], strict=True))
        for node in piece.nodes:
            env[node] = run(node, env)
            for weight in node.all_input_nodes:
                if weight in factors:
                    at = len(names) + 2 * factors[weight]
                    env[node] = env[node] + _branch(node, env, weights[at], weights[at + 1])
        return (pooled(env[piece.features], piece.tokens).float(), *(env[node] for node in piece.gives))


def _branch(node: Node, env: dict[Node, Any], left: Tensor, right: Tensor) -> Tensor:
    """The rank-1 side branch of a linear layer or a convolution (``exporter.branches``)."""
    values: list[Any] = [env[a] if isinstance(a, Node) else a for a in node.args]
    x, weight = values[:2]
    if weight.ndim == 2:
        product: Tensor = (x * right).sum(-1, keepdim=True) * left
        return product
    settings = values[3:]  # behind the bias: stride, padding, dilation
    return F.conv2d(x, right.view(1, *weight.shape[1:]), None, *settings) * left.view(1, -1, 1, 1)


def trace_blocks(
    chain: Chain,
    table: Table,
    feeds: Sequence[Feed],
    x: Tensor,
    y: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    in_graph: bool,
) -> tuple[BlockGraphs, dict[str, onnx.ModelProto]]:
    """Trace the blocks of a chain.

    Args:
        chain: the model.
        table: its tensors, with their credit.
        feeds: how each enters the graphs.
        x: two examples.
        y: their targets.
        loss: gives one loss per example.
        in_graph: whether the client cannot compute it by itself.

    Returns:
        (what the manifest says of the blocks, the graphs by file name).
    """
    half = "float16" in feeds
    dtype = torch.float16 if half else torch.float32
    state = {spec.name: torch.zeros(spec.shape, dtype=dtype) for spec in table}
    constants = {n: v.to(dtype) if v.is_floating_point() else v for n, v in chain.constants.items()}
    chain = replace(chain, constants=constants)
    feed = {spec.name: kind for spec, kind in zip(table, feeds, strict=True)}
    with torch.no_grad():
        values = values_of(chain, x.to(dtype) if x.is_floating_point() else x, lambda name: state[name])
    values[chain.inputs] = x  # the graphs convert it
    heads, rows = _heads(chain), []
    for segment in chain.segments:
        inner = _with_numbers(segment.nodes)
        rows.append(_piece(chain, inner, segment.features, is_tokens(chain.heads[segment.head])))
    needed = {node for piece in (*heads, *rows) for node in piece.reads}
    graphs: dict[str, onnx.ModelProto] = {}
    for kind, pieces in (("head", heads), ("rows", rows)):
        for i, piece in enumerate(pieces):
            if kind == "head":
                given = tuple(node for node in piece.nodes if node in needed and isinstance(values[node], Tensor))
                pieces[i] = piece = replace(piece, gives=given)
            graphs[f"{kind}-{i}.onnx"] = _graph(f"{kind}{i}", chain, piece, values, state, feed)
    if in_graph or chain.tail:  # the client's own losses are of what the model puts out
        graphs["loss.onnx"] = _loss_graph(chain, loss, values, y)
    unit = {spec.name: spec.credit.unit for spec in table}
    return BlockGraphs(
        heads=tuple(
            HeadGraph(h.weight, h.bias, _names(chain, p.reads), _names(chain, p.gives))
            for h, p in zip(chain.heads, heads, strict=True)
        ),
        rows=tuple(
            RowsGraph(unit[s.names[0]], s.head, _names(chain, p.reads), tuple(s.owners.tolist()))
            for s, p in zip(chain.segments, rows, strict=True)
        ),
        loss="loss.onnx" in graphs,
    ), graphs


def quantized_blocks(
    blocks: BlockGraphs, graphs: Mapping[str, onnx.ModelProto], coded: Iterable[str], *, weights_only: bool
) -> tuple[BlockGraphs, dict[str, onnx.ModelProto]]:
    """Quantise the layers of blocks whose weights the model's own graph takes as int8 codes.

    Raises:
        PlanError: A block uses such a weight in a way that cannot be quantised.
    """
    made: dict[str, onnx.ModelProto] = {}
    activations: dict[str, None] = {}
    coded = set(coded)
    for name, graph in graphs.items():
        if name not in blocks.files:
            continue
        own = tuple(i.name for i in graph.graph.input if i.name in coded)
        result = quantize(graph, own, trained_in_float=False, weights_only=weights_only)
        if missing := sorted(set(own) - result.quantized):
            raise PlanError(f"int8: {', '.join(missing)}: a block of the model uses it otherwise than as int8 codes")
        made[name] = result.model
        activations |= dict.fromkeys(result.activations)
        if not weights_only:
            made[f"ranges-{name}"] = result.ranges
    if not activations:
        made = {name: graph for name, graph in made.items() if not name.startswith("ranges-")}
    return BlockGraphs(heads=blocks.heads, rows=blocks.rows, loss=blocks.loss, activations=tuple(activations)), made


def _heads(chain: Chain) -> list[_Piece]:
    """From each head to the next."""
    calls, done, pieces = set(chain.nodes), set[Node](), []
    for head in chain.heads:
        needed, stack = set[Node](), [head.features]
        while stack:
            node = stack.pop()
            if node in calls and node not in done and node not in needed:
                needed.add(node)
                stack += node.all_input_nodes
        done |= {node for node in needed if _is_tensor(node)}
        nodes = tuple(node for node in chain.nodes if node in needed)
        pieces.append(_piece(chain, nodes, head.features, is_tokens(head)))
    return pieces


def _piece(chain: Chain, nodes: tuple[Node, ...], features: Node, tokens: bool) -> _Piece:
    inner = {*nodes}
    outer = {n for node in nodes for n in node.all_input_nodes if n not in inner and n not in chain.parameters}
    if features not in inner:
        outer.add(features)
    order = {node: i for i, node in enumerate(chain.nodes)}
    return _Piece(nodes, tuple(sorted(outer, key=lambda n: order.get(n, -1))), (), features, tokens)


def _with_numbers(nodes: Sequence[Node]) -> tuple[Node, ...]:
    """Nodes with those before them that give numbers, not tensors."""
    found: list[Node] = []

    def add(node: Node) -> None:
        for n in node.all_input_nodes:
            if n.op == "call_function" and not _is_tensor(n) and n not in found and n not in nodes:
                add(n)
                found.append(n)

    for node in nodes:
        add(node)
    return (*found, *nodes)


def _is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def _names(chain: Chain, nodes: Iterable[Node]) -> tuple[str, ...]:
    return tuple("x" if node is chain.inputs else f"value.{node.name}" for node in nodes)


def _graph(
    prefix: str,
    chain: Chain,
    piece: _Piece,
    values: Mapping[Node, Any],
    state: Mapping[str, Tensor],
    feed: Mapping[str, Feed],
) -> onnx.ModelProto:
    read = {n for node in piece.nodes for n in node.all_input_nodes}
    weights = [n for n in chain.parameters if n in read and n not in chain.constants]
    branched = [n for n in weights if feed[chain.parameters[n]] == "branch"]
    names = [chain.parameters[n] for n in weights]
    tensors = [state[name] for name in names]
    for n in branched:
        name = chain.parameters[n]
        names += [f"{name}.left", f"{name}.right"]
        tensors += [state[name].new_zeros(state[name].shape[0]), state[name].new_ones(state[name][0].numel())]
    module = _Piecewise(
        piece, weights, {n: i for i, n in enumerate(branched)}, chain.constants, "float16" in feed.values()
    )
    given = [values[node] for node in piece.reads]
    dims = {"values": [_dims(node, value) for node, value in zip(piece.reads, given, strict=True)]}
    inputs = [*_names(chain, piece.reads), *names]
    outputs = ["features", *_names(chain, piece.gives)]
    weights_dims = {"weights": [None] * len(tensors)}
    graph = to_graph(module, (given, tensors), inputs, outputs, dims | weights_dims)
    return _renamed(graph, prefix)


def _dims(node: Node, value: Tensor) -> dict[int, Any]:
    """Which dimensions of a value grow with the batch."""
    example = node.meta["val"]
    free = [i for i, size in enumerate(example.shape) if not isinstance(size, int)]
    return dict.fromkeys(free, torch.export.Dim.AUTO)


def _renamed(graph: onnx.ModelProto, prefix: str) -> onnx.ModelProto:
    """The graph with names of its own for what it does not share with others, in place."""
    shared = {v.name for v in (*graph.graph.input, *graph.graph.output)} | {""}

    def own(name: str) -> str:
        return name if name in shared else f"{prefix}/{name}"

    for node in graph.graph.node:
        node.input[:] = [own(name) for name in node.input]
        node.output[:] = [own(name) for name in node.output]
    for value in (*graph.graph.initializer, *graph.graph.value_info):
        value.name = own(value.name)
    return graph


class _LossOf(nn.Module):
    """The loss of what the last layer puts out."""

    def __init__(self, chain: Chain, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.__dict__["hidden"] = chain, loss

    def forward(self, data: list[Tensor]) -> Tensor:
        chain, loss = self.__dict__["hidden"]
        with SpelledOut():
            losses: Tensor = loss(tail_of(chain, data[0]), data[1]).float()
            return losses


def _loss_graph(
    chain: Chain, loss: Callable[[Tensor, Tensor], Tensor], values: Mapping[Node, Any], y: Tensor
) -> onnx.ModelProto:
    outputs = values[chain.last].float()
    batch = torch.export.Dim("batch", min=1, max=2**20)
    return to_graph(_LossOf(chain, loss), ([outputs, y],), ["x", "y"], ["losses"], {"data": [{0: batch}, {0: batch}]})
