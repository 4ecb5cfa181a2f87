"""A model as a chain of units: which rows of a layer change which features of the next.

Each trained matrix (a convolution, a linear layer) is credited through a linear head on the input of the next matrix
that its output reaches: pooled, those are its features. The heads exist for training alone, but for the last one,
which is the model's own last layer. Local losses: Nokland and Eidnes, arXiv 1901.06656; Belilovsky et al., arXiv
1812.11446. ``docs/method.md`` says what that changes about what is optimised.

The chain is read off the graph that ``torch.export`` makes of the model, not off names or module types. Which row of a
matrix owns which feature is found by trying: rows are perturbed by the bits of their number, and a feature belongs to
the row whose bits move it most. (A row may move other features a little, through a normalisation over several of
them; that is left out.) A row that owns no feature (of the queries and keys of attention) shares one number with its
like: what all features together say.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node

from baffle.errors import ModelError

POOLED = 2
"""Features are averaged over a grid of so many cells a side: positions matter, and heads stay small."""
_MATRICES = {"conv1d", "conv2d", "conv3d", "linear", "addmm", "mm", "matmul", "bmm", "convolution", "embedding"}
_RESHAPES = {"flatten", "view", "reshape", "_unsafe_view"}
_PROBES = 8  # random changes of the rows, to tell their features
_LARGEST_HEAD = 2**12  # features

Env = dict[Node, Any]


@dataclass(frozen=True, eq=False)
class Segment:
    """One unit: nodes from where its tensors are used to the features that they are credited through.

    Attributes:
        names: the trained tensors that belong to it, the matrix first.
        nodes: what to run again with changed tensors, in order; the last gives the features.
        features: the node whose pooled value the head sees.
        head: the number of its head.
        owners: int64[features], the row of the matrix that owns each feature.
        numbers: of each tensor int64[rows], which number of the unit belongs to a row.
        count: how many numbers the unit has; the last may be shared by rows that own no feature.
    """

    names: tuple[str, ...]
    nodes: tuple[Node, ...]
    features: Node
    head: int
    owners: npt.NDArray[np.int64]
    numbers: Mapping[str, npt.NDArray[np.int64]]
    count: int


@dataclass(frozen=True, eq=False)
class Head:
    """A linear head: on which node's pooled value, and of how many features.

    ``weight`` and ``bias`` are the names of its tensors; ``own`` is the model's own last layer.
    """

    features: Node
    count: int
    weight: str
    bias: str | None
    own: bool

    @property
    def names(self) -> tuple[str, ...]:
        """The names of its tensors."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)


@dataclass(frozen=True, eq=False)
class Chain:
    """A model's graph, cut into units.

    Attributes:
        nodes: every call of the graph, in order.
        parameters: placeholder -> name of the model's parameter or buffer.
        inputs: the placeholder of the examples.
        output: the node that the model returns, and the linear layer that it ends in.
        tail: nodes between that layer and the output, if any.
        segments, heads: units and their heads, in the order of the graph; the last head is the model's own.
        constants: values of parameters and buffers that are not trained, by node.
    """

    nodes: tuple[Node, ...]
    parameters: Mapping[Node, str]
    inputs: Node
    last: Node
    tail: tuple[Node, ...]
    segments: tuple[Segment, ...]
    heads: tuple[Head, ...]
    constants: Mapping[Node, Tensor]


def pooled(value: Tensor, channels_last_dim: bool) -> Tensor:
    """The features of a value [n, ...]: averages over a small grid, [n, features]; those of a channel lie together."""
    if value.ndim == 2:
        return value
    if value.ndim == 3 and channels_last_dim:  # tokens
        return value.mean(1)
    pools: dict[int, Any] = {3: F.adaptive_avg_pool1d, 4: F.adaptive_avg_pool2d, 5: F.adaptive_avg_pool3d}
    if value.ndim not in pools:
        return value.flatten(2).mean(2)
    cells = [min(POOLED, size) for size in value.shape[2:]]
    features: Tensor = pools[value.ndim](value, cells).flatten(1)
    return features


def run(node: Node, env: Env) -> Any:
    """Call a node's function on values."""
    args = torch.fx.node.map_arg(node.args, lambda n: env[n])
    kwargs = torch.fx.node.map_arg(node.kwargs, lambda n: env[n])
    return node.target(*args, **kwargs)  # type: ignore[operator]  # of calls it is a function


def exported(model: nn.Module, x: Tensor) -> torch.export.ExportedProgram:
    """The model's graph for a batch of any size, without writes in place. Raises ModelError if it has none."""
    batch = torch.export.Dim("batch", min=1, max=2**20)
    try:
        with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what the exporter itself uses
            program = torch.export.export(model, (x.clone(),), dynamic_shapes=({0: batch},), strict=False)
            if any(_name(n).endswith("_") for n in program.graph.nodes if n.op == "call_function"):
                program = program.run_decompositions({})
    except Exception as error:  # of the user's own code, or of PyTorch about it
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"no graph of the model for a batch of any size: {reason[0]}") from error
    return program


def find_chain(model: nn.Module, x: Tensor, local: bool) -> Chain:
    """Cut a model into units.

    Args:
        model: with ``requires_grad`` set where it is trained.
        x: some examples, on which rows are told apart.
        local: every matrix has a head; else those alone whose features the model's own last layer sees.

    Raises:
        ModelError: The model has no graph, does not end in a trained linear layer, or uses a tensor twice.
    """
    program = exported(model, x)
    graph, signature = program.graph, program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    names |= getattr(signature, "inputs_to_lifted_tensor_constants", {})
    places = {n: names[n.name] for n in graph.nodes if n.op == "placeholder" and n.name in names}
    free = [n for n in graph.nodes if n.op == "placeholder" and n.name not in names]
    calls = tuple(n for n in graph.nodes if n.op == "call_function")
    [output] = [n for n in graph.nodes if n.op == "output"]
    results = output.args[0]
    if len(free) != 1 or len(results) != 1:
        raise ModelError(f"a model of {len(free)} inputs and {len(results)} outputs: expected one of each")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    state = {**program.state_dict, **program.constants}
    constants = {n: state[name].detach() for n, name in places.items() if name not in trained}
    uses: dict[str, list[Node]] = {name: [] for name in trained}
    for node in calls:
        for argument in node.all_input_nodes:
            if places.get(argument) in uses:
                uses[places[argument]].append(node)
    for name, nodes in uses.items():
        if len(nodes) != 1:
            raise ModelError(f"{name}: used {len(nodes)} times: expected once, to know what its rows change")
    last, tail = _last_layer(results[0], calls, places, trained)
    finder = _Finder(calls, places, trained, uses, last)
    segments, heads = finder.cut(local)
    chain = Chain(calls, places, free[0], last, tail, (), heads, constants)
    return _with_owners(chain, model, x, segments)


def _name(node: Node) -> str:
    target = node.target
    return target if isinstance(target, str) else getattr(target, "__name__", str(target)).split(".")[0]


def _last_layer(
    result: Node, calls: Sequence[Node], places: Mapping[Node, str], trained: set[str]
) -> tuple[Node, tuple[Node, ...]]:
    """The trained linear layer that the model ends in, and what follows it."""
    tail: list[Node] = []
    node = result
    while _name(node) != "linear":
        inputs = [n for n in node.all_input_nodes if n in calls]
        if node not in calls or len(inputs) != 1 or _name(node) in _MATRICES:
            raise ModelError("the model does not end in a linear layer")
        tail.insert(0, node)
        node = inputs[0]
    weight, features = node.args[1], node.args[0]
    if not isinstance(weight, Node) or not isinstance(features, Node) or places.get(weight, "") not in trained:
        raise ModelError("the linear layer that the model ends in is not trained")
    if result.meta["val"].ndim != 2 or features.meta["val"].ndim != 2:
        raise ModelError(f"outputs of shape {tuple(result.meta['val'].shape)}: expected [examples, outputs]")
    return node, tuple(tail)


class _Finder:
    """Cuts a graph into segments."""

    def __init__(
        self,
        calls: Sequence[Node],
        places: Mapping[Node, str],
        trained: set[str],
        uses: Mapping[str, list[Node]],
        last: Node,
    ) -> None:
        self._calls, self._places, self._last = calls, places, last
        self._order = {n: i for i, n in enumerate(calls)}
        self._trained_of: dict[Node, list[str]] = {}
        for name in trained:
            self._trained_of.setdefault(uses[name][0], []).append(name)
        self._matrices = {n for n in calls if n is last or (_name(n) in _MATRICES and self._matrix_of(n) is not None)}

    def _matrix_of(self, node: Node) -> str | None:
        """The trained tensor of two or more dimensions that a matrix product takes."""
        for argument in node.all_input_nodes:
            name = self._places.get(argument)
            if name in self._trained_of.get(node, ()) and argument.meta["val"].ndim >= 2:
                return name
        return None

    def cut(self, local: bool) -> tuple[list[tuple[tuple[str, ...], tuple[Node, ...], Node, int]], tuple[Head, ...]]:
        """Segments as (names, nodes, features, head), and heads."""
        heads: list[Head] = []
        number: dict[Node, int] = {}
        found: list[tuple[tuple[str, ...], tuple[Node, ...], Node, int]] = []
        taken: set[str] = set(self._trained_of.get(self._last, ()))
        starts = [n for n in self._calls if n in self._trained_of and n is not self._last]
        for matrices_first in (True, False):  # what belongs to a matrix's unit is taken by it
            for node in starts:
                own = [name for name in self._trained_of[node] if name not in taken]
                if not own or (node in self._matrices) != matrices_first:
                    continue
                features, reached = self._frontier(node)
                if features is None:
                    raise ModelError(f"{own[0]}: does not change what the model gives: freeze it")
                is_last = features is self._last.args[0]
                if not local and not is_last:
                    continue
                nodes = self._between(node, features, reached)
                if not is_last:
                    features, nodes = self._before_flattening(features, nodes)
                matrix = self._matrix_of(node)
                names = ([matrix] if matrix else []) + [name for name in own if name != matrix]
                for inner in nodes[1:]:
                    names += [n for n in self._trained_of.get(inner, ()) if n not in taken and n not in names]
                taken |= set(names)
                if features not in number:
                    number[features] = len(heads)
                    heads.append(self._head(features, is_last, names[0]))
                found.append((tuple(names), nodes, features, number[features]))
        if self._last.args[0] not in number:  # nothing but the head is trained, or credited so
            heads.append(self._head(self._last.args[0], True, ""))  # type: ignore[arg-type]
        found.sort(key=lambda s: self._order[s[1][0]])
        # in the order in which a pass meets them
        order = sorted(range(len(heads)), key=lambda i: (heads[i].own, self._order.get(heads[i].features, -1)))
        placed = [(*cut[:3], order.index(cut[3])) for cut in found]
        return placed, tuple(heads[i] for i in order)

    def _frontier(self, start: Node) -> tuple[Node | None, set[Node]]:
        """The first value that reaches a further matrix, and all nodes that ``start`` changes on the way to any."""
        reached, first = {start}, None
        for node in self._calls[self._order[start] + 1 :]:
            inputs = [n for n in node.all_input_nodes if n in reached]
            if not inputs:
                continue
            if node in self._matrices:
                if first is None:
                    first = inputs[0]
                continue
            reached.add(node)
        return first, reached

    def _between(self, start: Node, end: Node, reached: set[Node]) -> tuple[Node, ...]:
        """The nodes on the way from ``start`` to ``end``, both included."""
        needed, stack = set[Node](), [end]
        while stack:
            node = stack.pop()
            if node in needed or node not in reached:
                continue
            needed.add(node)
            stack += node.all_input_nodes
        return tuple(sorted(needed | {start}, key=lambda n: self._order[n]))

    def _before_flattening(self, features: Node, nodes: tuple[Node, ...]) -> tuple[Node, tuple[Node, ...]]:
        """The value before it was flattened, which can be pooled, if it was flattened on the way."""
        while len(nodes) > 1 and _name(features) in _RESHAPES and features.meta["val"].ndim == 2:
            before = features.args[0]
            if not isinstance(before, Node) or before not in nodes:
                break
            features, nodes = before, tuple(n for n in nodes if n is not features)
        return features, nodes

    def _head(self, features: Node, own: bool, matrix: str) -> Head:
        if own:
            weight = self._places[self._last.args[1]]  # type: ignore[index]
            bias = self._last.args[2] if len(self._last.args) > 2 else None
            count = int(self._last.args[0].meta["val"].shape[1])  # type: ignore[union-attr]
            named = self._places.get(bias) if isinstance(bias, Node) else None
            return Head(features, count, weight, named, True)
        value = features.meta["val"]
        sample = torch.zeros([1, *value.shape[1:]])
        count = pooled(sample, _is_tokens(features)).shape[1]
        if count > _LARGEST_HEAD:
            raise ModelError(f"a head of {count} features: expected at most {_LARGEST_HEAD}")
        name = f"{matrix.removesuffix('weight').rstrip('.') or 'model'}.local_head"
        return Head(features, count, f"{name}.weight", f"{name}.bias", False)


def _is_tokens(features: Node) -> bool:
    """Whether a value [n, ., .] has its features last, as linear layers take them."""
    users = list(features.users)
    return not any(_name(n).startswith(("conv", "max_pool", "avg_pool", "adaptive")) for n in users)


def is_tokens(head: Head) -> bool:
    """Whether a head's value has its features in the last dimension."""
    return _is_tokens(head.features)


def values_of(chain: Chain, x: Tensor, weights: Callable[[str], Tensor]) -> Env:
    """Every value of a pass over examples."""
    env: Env = dict(chain.constants)
    env |= {n: weights(name) for n, name in chain.parameters.items() if n not in chain.constants}
    env[chain.inputs] = x
    for node in chain.nodes:
        env[node] = run(node, env)
    return env


def again(chain: Chain, segment: Segment, env: Env, changed: Mapping[Node, Tensor]) -> Tensor:
    """A segment's pooled features with changed tensors, the rest being as in ``env``."""
    values = {**env, **changed}
    for node in segment.nodes:
        values[node] = run(node, values)
    return pooled(values[segment.features], is_tokens(chain.heads[segment.head]))


def _with_owners(
    chain: Chain,
    model: nn.Module,
    x: Tensor,
    cuts: Sequence[tuple[tuple[str, ...], tuple[Node, ...], Node, int]],
) -> Chain:
    """Complete segments by which row owns which feature."""
    parameters = dict(model.named_parameters())
    node_of = {name: n for n, name in chain.parameters.items()}
    segments: list[Segment] = []
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode(False), torch.no_grad():
        env = values_of(chain, x, lambda name: parameters[name].detach())
        for names, nodes, features, head in cuts:
            rows = parameters[names[0]].shape[0] if parameters[names[0]].ndim else 1
            draft = Segment(names, nodes, features, head, np.zeros(0, np.int64), {}, 1)
            owners = np.full(chain.heads[head].count, -1, np.int64)
            if _name(nodes[0]) in _MATRICES and _name(nodes[0]) != "embedding":
                owners = _owners(chain, draft, env, node_of[names[0]], parameters[names[0]].detach(), rows, generator)
            owning = np.unique(owners[owners >= 0])
            number = np.full(rows, len(owning), np.int64)
            number[owning] = np.arange(len(owning))
            numbers: dict[str, npt.NDArray[np.int64]] = {}
            for name in names:
                length = parameters[name].shape[0] if parameters[name].ndim else 1
                # a bias or a scale per row shares the row's number; anything else shares that of all features
                numbers[name] = number if length == rows else np.full(length, len(owning), np.int64)
            shares = any((n == len(owning)).any() for n in numbers.values())
            known = np.where(owners >= 0, number[owners], -1) if len(owning) else owners
            count = len(owning) + int(shares)
            segments.append(Segment(names, nodes, features, head, known, numbers, count))
    return replace(chain, segments=tuple(segments))


def _owners(
    chain: Chain, segment: Segment, env: Env, node: Node, weight: Tensor, rows: int, generator: torch.Generator
) -> npt.NDArray[np.int64]:
    """The row of a matrix that moves each feature most, int64[features]; -1 where none is told apart."""
    plain = again(chain, segment, env, {})
    scale = float(weight.std()) * 0.1 if weight.numel() > 1 else 0.1
    bits = max(1, (rows - 1).bit_length())
    of_row = torch.arange(rows)
    code = torch.zeros(plain.shape[1], dtype=torch.long)
    sure = torch.ones(plain.shape[1], dtype=torch.bool)
    for bit in range(bits):
        moved = [torch.zeros(plain.shape[1]), torch.zeros(plain.shape[1])]
        for _ in range(_PROBES):
            change = scale * torch.randn(weight.shape, generator=generator)
            for side in (0, 1):
                chosen = ((of_row >> bit & 1) == side).view(-1, *[1] * (weight.ndim - 1))
                gap = again(chain, segment, env, {node: weight + change * chosen}) - plain
                moved[side] += gap.float().square().sum(0)
        code |= (moved[1] > moved[0]).long() << bit
        sure &= (moved[1] - moved[0]).abs() > 0.2 * (moved[1] + moved[0])
    owners = np.asarray(torch.where(sure & (code < rows), code, -1).numpy(), np.int64)
    if len(owners) % rows == 0:  # channel after channel, as it is nearly always: units that are dead now may wake up
        regular = np.arange(len(owners)) // (len(owners) // rows)
        if (owners == regular)[owners >= 0].all() and (owners >= 0).mean() > 0.5:
            return regular
    return owners


def tail_of(chain: Chain, logits: Tensor) -> Tensor:
    """What the model makes of the outputs of its last layer."""
    env: Env = dict(chain.constants) | {chain.last: logits}
    for node in chain.tail:
        env[node] = run(node, env)
    return env[chain.tail[-1]] if chain.tail else logits
