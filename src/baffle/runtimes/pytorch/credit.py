"""Numbers of credited models by forward passes only: rows by their features, heads exactly.

One clean pass through the model (``chain``). Where a head's features are known, its gradient is exact: the derivative
of the loss by the outputs, from finite differences of the loss alone, times the features; and so is the derivative by
the features. Then every unit that the head credits runs again on its clean input, once for each direction, with all its
rows perturbed: what a row's features change, times their derivative, over sigma, is the row's number. All units of a
model so take one pass for each direction, and a head's activations are forgotten before the next head's are made.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal, NamedTuple, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.fx import Node

from baffle.core.credit import part_of, sizes_of, units_of
from baffle.core.types import Credit, Losses, Masks, ParamSpec, Table, Weights, table_size
from baffle.data import Dataset
from baffle.errors import ModelError, require_choice
from baffle.runtimes import Evaluation
from baffle.runtimes.lanes import side_by_side
from baffle.runtimes.perturb import BUDGET, Pass, Perturbations, Point
from baffle.runtimes.pytorch.chain import Chain, Head, Segment, again, find_chain, is_tokens, pooled, run, tail_of
from baffle.runtimes.pytorch.module_checks import per_example
from baffle.runtimes.pytorch.replica import as_bits, layouts_of
from baffle.runtimes.pytorch.runtime import TorchRuntime, to_tensors
from baffle.runtimes.pytorch.threads import one_thread

CreditKind = Literal["local", "feature", "global"]
CREDITS = ("local", "feature", "global")
_TINY = 1e-5  # step of the loss's own finite differences, in float64
_EXAMPLES = 64  # that go through the model together
_TRIED = 4  # examples on which the chain is found
_TURN = 4  # of so many directions one is about the rows that share a number, the others about rows with their own
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Float64: TypeAlias = npt.NDArray[np.float64]


class CreditRuntime:
    """A PyTorch model whose rows, or whose last layer alone, are credited one by one.

    Args:
        model: as for ``TorchRuntime``.
        loss: as for ``TorchRuntime``.
        sample: some examples, to find the model's layers by (one is enough).
        credit: ``local``: every layer through a head of its own. ``feature``: the layers before the last one through
            that, all others by one scalar per direction. ``global``: one scalar per direction for everything but the
            last layer, whose gradient is exact.
        threads: micro-batches evaluated side by side, by default one per core.
        precision: fp32, bf16 or fp16; losses of heads are taken in float64.
        masks: where entries of pruned tensors are kept.

    Raises:
        ModelError: The model cannot be credited so; the message says why.

    Examples:
        >>> import torch.nn.functional as F
        >>> from baffle.data import load
        >>> train, _ = load("digits")
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.Hardswish(), nn.Linear(20, 10))
        >>> runtime = CreditRuntime(model, F.cross_entropy, train)
        >>> [(spec.name, spec.credit.kind) for spec in runtime.table]
        [('1.weight', 'rows'), ('1.bias', 'rows'), ('3.weight', 'exact'), ('3.bias', 'exact')]
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[..., Tensor],
        sample: Dataset,
        *,
        credit: str = "local",
        threads: int | None = None,
        precision: str = "fp32",
        masks: Masks | None = None,
    ) -> None:
        require_choice("credit", credit, CREDITS)
        self._inner = TorchRuntime(model, loss, threads, precision=precision, masks=masks)
        self._loss, self._dtype, self._credit = per_example(loss), _DTYPES[precision], credit
        self._device = torch.device("cpu")
        self._threads = max(1, len(self._inner.lanes))
        x = examples_like(to_tensors(sample.take(np.arange(1)), self._device)[0])
        chain = find_chain(model, x, credit == "local")
        if credit == "global":
            chain = replace(chain, segments=(), heads=(chain.heads[-1],))
        self._chain = chain
        self._table, self._initial = credited(self._inner.table, self._inner.initial_weights(), chain)
        self._place = {spec.name: i for i, spec in enumerate(self._table)}
        self._unit = {spec.name: spec.credit.unit for spec in self._table}
        self._node_of = {name: n for n, name in chain.parameters.items() if n not in chain.constants}
        self._after_head = {chain.last, *chain.tail}
        self._expires = _expiries(chain)
        self._constants = {
            n: value.to(self._dtype) if value.is_floating_point() else value for n, value in chain.constants.items()
        }
        self._maps = [_map_of(chain, segment) for segment in chain.segments]
        self._sharing = [_sharing(segment, self._table) for segment in chain.segments]
        self._channels_last = self._takes_channels_last(x)

    @property
    def table(self) -> Table:
        """The trainable tensors, those of local heads behind the model's own."""
        return self._table

    @property
    def plan(self) -> dict[str, str | int]:
        """How passes are evaluated."""
        return self._inner.plan | {"strategy": "units", "credit": self._credit}

    def initial_weights(self) -> Weights:
        """The model's weights as it was handed over, then those of the local heads: float32[n]."""
        return self._initial.copy()

    def evaluate(self, weights: Weights, data: Dataset) -> Evaluation:
        """Losses and hits of the model itself, without its local heads."""
        return self._inner.evaluate(weights[: table_size(self._inner.table)], data)

    def losses(self, weights: Weights, perturbations: Perturbations, batch: Dataset) -> Losses:
        """Losses of the model itself under perturbed weights: float32[passes, examples]."""
        own = replace(perturbations.directions, table=self._inner.table)
        return self._inner.losses(
            weights[: table_size(self._inner.table)], replace(perturbations, directions=own), batch
        )

    def credits(
        self,
        weights: Weights,
        perturbations: Perturbations,
        batch: Dataset,
        groups: npt.NDArray[np.int64],
        bounds: Sequence[int],
    ) -> Float64:
        """The numbers of each unit; see ``runtimes.CreditEvaluator``."""
        batch.require_examples()
        x, y = to_tensors(batch, self._device)
        if x.is_floating_point():
            x = x.to(self._dtype)
        if x.ndim == 4 and self._channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        parts = [
            _Part(j, slice(start, min(start + _EXAMPLES, bounds[j + 1])))
            for j in range(len(bounds) - 1)
            for start in range(bounds[j], bounds[j + 1], _EXAMPLES)
        ]
        layouts = layouts_of(self._table, self._dtype, self._channels_last)
        point = Point(perturbations, weights, layouts)
        count, slices = int(groups.max()) + 1, len(bounds) - 1

        def work(i: int) -> list[list[Float64]]:
            done = []
            with torch.inference_mode(), one_thread(True):
                for part in parts[i :: self._threads]:
                    owners = np.zeros((count, part.examples.stop - part.examples.start))
                    owners[groups[part.examples], np.arange(owners.shape[1])] = 1
                    turns = _Turns(part.number * perturbations.num_directions, perturbations.num_directions * slices)
                    done.append(
                        self._evaluate(point, perturbations, part, turns, x[part.examples], y[part.examples], owners)
                    )
            return done

        with one_thread(True):
            results = side_by_side(work, min(self._threads, len(parts)))
        found: list[Any] = [None] * len(parts)
        for i, own in enumerate(results):
            found[i :: self._threads] = own
        return self._means(perturbations.num_directions, parts, found, groups, bounds)

    def _means(
        self,
        num_directions: int,
        parts: Sequence[_Part],
        found: Sequence[Sequence[Float64]],
        groups: npt.NDArray[np.int64],
        bounds: Sequence[int],
    ) -> Float64:
        """Sums over the parts, in their order whatever thread they came from, over the numbers of examples."""
        slices, count = len(bounds) - 1, int(groups.max()) + 1
        sizes = sizes_of(self._table, num_directions * slices)
        numbers = np.zeros((count, sum(sizes)))
        whole = np.bincount(groups, minlength=count)[:, None]
        of_slice = [np.bincount(groups[a:b], minlength=count)[:, None] for a, b in pairwise(bounds)]
        for unit, (place, size) in enumerate(zip(part_of(sizes), sizes, strict=True)):
            exact = units_of(self._table)[unit].kind == "exact"
            own = numbers[:, place]
            share = size if exact else size // slices
            for part, values in zip(parts, found, strict=True):
                at = slice(0, share) if exact else slice(part.number * share, (part.number + 1) * share)
                own[:, at] += values[unit] / np.maximum(1, whole if exact else of_slice[part.number])
        return numbers

    def _evaluate(
        self, point: Point, asked: Perturbations, part: _Part, turns: _Turns, x: Tensor, y: Tensor, owners: Float64
    ) -> list[Float64]:
        """Of each unit the sums over a part's examples, float64[groups, numbers]."""
        chain, first = self._chain, asked.first + part.number * asked.num_directions
        passes = list(point.passes(replace(asked, first=first, baseline=0), BUDGET))
        env: dict[Node, Any] = dict(self._constants)
        plain: dict[str, Tensor] = {}
        env |= {n: self._written(point.unperturbed, name, plain) for name, n in self._node_of.items()}
        env[chain.inputs] = x
        sums: dict[int, Float64] = {}
        base: Tensor | None = None
        for i, node in enumerate(chain.nodes):
            env[node] = run(node, env)
            for number, head in enumerate(chain.heads):
                if head.features is node:
                    base = self._credit_head(number, head, env, point, passes, asked.steps, turns, y, owners, sums)
            for gone in self._expires[i]:
                env.pop(gone, None)
        assert base is not None  # the last head is the model's own
        if units_of(self._table)[0].kind == "loss":
            sums[0] = self._losses(passes, asked.steps, x, y, base, owners)
        return [sums[unit] for unit in range(len(sums))]

    def _credit_head(
        self,
        number: int,
        head: Head,
        env: dict[Node, Any],
        point: Point,
        passes: Sequence[Pass],
        steps: tuple[float, ...],
        turns: _Turns,
        y: Tensor,
        owners: Float64,
        sums: dict[int, Float64],
    ) -> Tensor:
        """The exact gradient of a head, and the numbers of the rows that are credited through it."""
        features = pooled(env[head.features], is_tokens(head)).double()
        weight, logits = self._logits(head, features, point)
        base, slope = self._slopes(logits, y)
        exact = {head.weight: (owners[:, None, :] * slope.T.numpy()[None]) @ features.numpy()}
        if head.bias is not None:
            exact[head.bias] = owners @ slope.numpy()
        unit = self._unit[head.weight]
        order = [self._table[i].name for i in units_of(self._table)[unit].tensors]
        sums[unit] = np.concatenate([exact[name].reshape(len(owners), -1) for name in order], axis=1)
        slope_of_features = slope @ weight
        for place, segment in enumerate(self._chain.segments):
            if segment.head == number:
                sums[self._unit[segment.names[0]]] = self._credit_rows(
                    place, segment, env, passes, steps, turns, slope_of_features, features, owners
                )
        return base

    def _credit_rows(
        self,
        place: int,
        segment: Segment,
        env: dict[Node, Any],
        passes: Sequence[Pass],
        steps: tuple[float, ...],
        turns: _Turns,
        slope: Tensor,
        features: Tensor,
        owners: Float64,
    ) -> Float64:
        """float64[groups, directions x numbers] of one unit.

        Where rows share a number they take turns with the others, or it would be drowned in what those change: a
        direction moves either kind, the number of the other is 0, and both count for as many as there are in all.
        """
        plain = {name: env[self._node_of[name]] for name in segment.names}
        columns: list[Float64] = []
        for k in range(len(passes) // len(steps)):
            turn = turns.of(k) if segment.shares else None
            ends = []
            for evaluated in passes[k * len(steps) : (k + 1) * len(steps)]:
                changed = {}
                for name in segment.names:
                    value = self._written(evaluated, name, {})
                    if turn is not None:
                        value = torch.where(self._sharing[place][name] == turn.shared, value, plain[name])
                    changed[self._node_of[name]] = value
                ends.append(again(self._chain, segment, env, changed).double())
            gap, width = (ends[0] - features, steps[0]) if len(steps) == 1 else (ends[0] - ends[1], steps[0] - steps[1])
            numbers = owners @ (slope * gap).numpy() @ self._maps[place] / width
            if turn is not None:
                numbers *= turn.factor * ((np.arange(segment.count) == segment.count - 1) == turn.shared)
            columns.append(numbers)
        return np.concatenate(columns, axis=1)

    def _losses(
        self, passes: Sequence[Pass], steps: tuple[float, ...], x: Tensor, y: Tensor, base: Tensor, owners: Float64
    ) -> Float64:
        """float64[groups, directions] of the tensors that one scalar per direction is about."""
        ends = []
        for evaluated in passes:
            env: dict[Node, Any] = dict(self._constants)
            plain: dict[str, Tensor] = {}
            for name, node in self._node_of.items():
                moved = self._table[self._place[name]].credit.kind == "loss"
                env[node] = self._written(evaluated if moved else evaluated.point.unperturbed, name, plain)
            env[self._chain.inputs] = x
            for i, node in enumerate(self._chain.nodes):
                if node in self._after_head:
                    continue
                env[node] = run(node, env)
                for gone in self._expires[i]:
                    if gone is not self._chain.last.args[0]:
                        env.pop(gone, None)
            head = self._chain.heads[-1]
            _, logits = self._logits(head, env[head.features].double(), evaluated.point)
            ends.append(self._loss(tail_of(self._chain, logits), y).double())
        stacked = torch.stack(ends)
        if len(steps) == 1:
            scalars = (stacked - base) / steps[0]
        else:
            scalars = (stacked[0::2] - stacked[1::2]) / (steps[0] - steps[1])
        numbers: Float64 = owners @ scalars.T.numpy()
        return numbers

    def _slopes(self, logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Losses [n], and their derivatives by the outputs, float64[n, outputs], by finite differences of the loss."""
        count, outputs = logits.shape
        moved = torch.cat([logits[None], logits[None] + _TINY * torch.eye(outputs, dtype=torch.float64)[:, None]])
        flat = moved.reshape(-1, outputs)
        try:
            losses = self._loss(tail_of(self._chain, flat), y.repeat(outputs + 1, *[1] * (y.ndim - 1)))
        except (IndexError, RuntimeError, TypeError) as error:
            raise ModelError(
                f"the loss failed on outputs {tuple(logits.shape)} and targets {tuple(y.shape)} of {y.dtype}: {error}"
            ) from error
        if losses.shape != (len(flat),):
            raise ModelError(f"the loss has shape {tuple(losses.shape)} for {len(flat)} examples: expected one each")
        losses = losses.double().reshape(outputs + 1, count)
        return losses[0], ((losses[1:] - losses[0]) / _TINY).T

    def _written(self, evaluated: Pass, name: str, cache: dict[str, Tensor]) -> Tensor:
        """A tensor's weights in a pass, in memory of their own."""
        if name in cache:
            return cache[name]
        place = self._place[name]
        spec, layout = self._table[place], evaluated.point.layouts[place]
        axes = layout.axes or tuple(range(len(spec.shape)))
        made = torch.empty([spec.shape[a] for a in axes], dtype=self._dtype)
        evaluated.write(place, as_bits(made))
        view = made if layout.axes is None else made.permute([axes.index(d) for d in range(len(axes))])
        cache[name] = view
        return view

    def _logits(self, head: Head, features: Tensor, point: Point) -> tuple[Tensor, Tensor]:
        """A head's weight, and what it makes of features, float64."""
        weight = self._written(point.unperturbed, head.weight, {}).double()
        logits = features @ weight.T
        if head.bias is not None:
            logits = logits + self._written(point.unperturbed, head.bias, {}).double()
        return weight, logits

    def _takes_channels_last(self, x: Tensor) -> bool:
        """Whether the graph runs with channels last, and there are images to lay out so."""
        if x.ndim != 4 or not any(len(spec.shape) == 4 for spec in self._table):
            return False
        env: dict[Node, Any] = dict(self._constants)
        for name, node in self._node_of.items():
            spec = self._table[self._place[name]]
            value = torch.from_numpy(self._initial[spec.slice].reshape(spec.shape)).to(self._dtype)
            env[node] = value.contiguous(memory_format=torch.channels_last) if value.ndim == 4 else value
        env[self._chain.inputs] = x.to(self._dtype).contiguous(memory_format=torch.channels_last)
        try:
            with torch.inference_mode():
                for node in self._chain.nodes:
                    env[node] = run(node, env)
        except RuntimeError:  # a view of what is laid out otherwise
            return False
        return True


@dataclass(frozen=True)
class _Part:
    """Examples that go through the model together, all of the slice with a number."""

    number: int
    examples: slice


class _Turn(NamedTuple):
    """A direction of a unit some of whose rows share a number: whether it is about those, and how much it counts."""

    shared: bool
    factor: float


class _Turns(NamedTuple):
    """Whose turn each direction is: the number of the first in a part, and how many the slices have in all."""

    first: int
    total: int

    def of(self, k: int) -> _Turn | None:
        """The turn of a part's direction; None where there are too few for turns.

        Examples:
            >>> [_Turns(2, 8).of(k) for k in range(2)]
            [_Turn(shared=False, factor=1.3333333333333333), _Turn(shared=True, factor=4.0)]
        """
        count = self.total // _TURN
        if not count:
            return None
        shared = (self.first + k) % _TURN == _TURN - 1
        return _Turn(shared, self.total / (count if shared else self.total - count))


def examples_like(example: Tensor) -> Tensor:
    """Examples to find a model's chain on, the same on every machine: only the shape and type of [1, ...] count."""
    shape = (_TRIED, *example.shape[1:])
    if example.is_floating_point():
        return torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return (torch.arange(_TRIED * example[0].numel()).reshape(shape) % 2).to(example.dtype)


def credited(table: Table, weights: Weights, chain: Chain) -> tuple[Table, Weights]:
    """The table of a model with its credit and its local heads, and the weights with those of the heads."""
    units: dict[str, tuple[int, Credit]] = {}
    number = int(any(_is_loss(spec.name, chain) for spec in table))  # one scalar per direction comes first
    for segment in chain.segments:
        for name in segment.names:
            units[name] = number, Credit(number, "rows", _runs(segment.numbers[name]))
        number += 1
    extra: list[tuple[str, tuple[int, ...], Credit]] = []
    outputs = {spec.name: spec.shape[0] for spec in table if spec.name == chain.heads[-1].weight}
    for head in chain.heads:
        credit = Credit(number, "exact", (), not head.own)
        for name in head.names:
            units[name] = number, credit
        if not head.own:
            count = outputs[chain.heads[-1].weight]
            extra += [(head.weight, (count, head.count), credit), (str(head.bias), (count,), credit)]
        number += 1
    specs = [
        msgspec.structs.replace(spec, credit=units[spec.name][1] if spec.name in units else Credit()) for spec in table
    ]
    start = table_size(table)
    values = [weights]
    for name, shape, credit in extra:
        specs.append(ParamSpec(name, shape, start, b"", credit))
        start += specs[-1].size
        values.append(_first_weights(name, shape))
    return tuple(specs), np.concatenate(values)


def _is_loss(name: str, chain: Chain) -> bool:
    heads = {name for head in chain.heads for name in head.names}
    return name not in heads and not any(name in segment.names for segment in chain.segments)


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


def _sharing(segment: Segment, table: Table) -> dict[str, Tensor]:
    """Of each tensor which rows share the unit's last number, in a shape that goes with the tensor's."""
    if not segment.shares:
        return {}
    shapes = {spec.name: spec.shape for spec in table}
    rows = {name: torch.from_numpy(numbers == segment.count - 1) for name, numbers in segment.numbers.items()}
    return {name: found.reshape([-1, *[1] * (len(shapes[name]) - 1)]) for name, found in rows.items()}


def _map_of(chain: Chain, segment: Segment) -> Float64:
    """Which number of a unit each feature adds to: float64[features, numbers] of 0 and 1."""
    chosen = np.zeros((chain.heads[segment.head].count, segment.count))
    known = np.flatnonzero(segment.owners >= 0)
    chosen[known, segment.owners[known]] = 1
    if segment.shares:
        chosen[:, -1] = 1
    return chosen


def _expiries(chain: Chain) -> list[list[Node]]:
    """After each node, the values that neither the pass nor a unit needs any more."""
    order = {n: i for i, n in enumerate(chain.nodes)}
    last = dict.fromkeys(chain.nodes, 0) | {chain.inputs: 0}
    for node in chain.nodes:
        for n in (node, *node.all_input_nodes):
            if n in last:
                last[n] = max(last[n], order[node])
    for segment in chain.segments:
        end = order[segment.features]
        for node in segment.nodes:
            for n in node.all_input_nodes:
                if n in last:
                    last[n] = max(last[n], end)
    for head in chain.heads:
        if head.features in order:
            last[head.features] = max(last[head.features], order[head.features])
    gone: list[list[Node]] = [[] for _ in chain.nodes]
    for n, i in last.items():
        gone[i].append(n)
    return gone
