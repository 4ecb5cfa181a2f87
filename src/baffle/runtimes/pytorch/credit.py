"""Credited models in PyTorch: a model's graph, run node by node, and each of its segments again on its clean input.

``runtimes.credit`` has what is done with the features; ``chain`` finds the segments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.fx import Node

from baffle.core.types import Losses, Masks, Table, Weights, table_size
from baffle.data import Dataset
from baffle.errors import ModelError, require_choice
from baffle.runtimes import Evaluation
from baffle.runtimes.credit import Float64, credits_of, plan_of
from baffle.runtimes.lanes import side_by_side
from baffle.runtimes.perturb import Pass, Perturbations, Point
from baffle.runtimes.pytorch.chain import Chain, again, find_chain, is_tokens, pooled, run, tail_of, values_of
from baffle.runtimes.pytorch.credit_table import credited, examples_like
from baffle.runtimes.pytorch.module_checks import per_example
from baffle.runtimes.pytorch.replica import as_bits, layouts_of
from baffle.runtimes.pytorch.runtime import TorchRuntime, to_tensors
from baffle.runtimes.pytorch.threads import one_thread

CreditKind = Literal["local", "feature", "global"]
CREDITS = ("local", "feature", "global")
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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
        self._dtype, self._credit = _DTYPES[precision], credit
        self._device = torch.device("cpu")
        self._threads = max(1, len(self._inner.lanes))
        x = examples_like(to_tensors(sample.take(np.arange(1)), self._device)[0])
        chain = find_chain(model, x, credit == "local")
        if credit == "global":
            chain = replace(chain, segments=(), heads=(chain.heads[-1],))
        self._table, self._initial = credited(self._inner.table, self._inner.initial_weights(), chain)
        place = {spec.name: i for i, spec in enumerate(self._table)}
        self._credit_plan = plan_of(
            self._table,
            ((head.weight, head.bias) for head in chain.heads),
            ((self._table[place[s.names[0]]].credit.unit, s.head, s.owners) for s in chain.segments),
        )
        chain = replace(
            chain,
            constants={n: v.to(self._dtype) if v.is_floating_point() else v for n, v in chain.constants.items()},
        )
        self._walk = _Walk(
            chain,
            per_example(loss),
            {n: place[name] for n, name in chain.parameters.items() if n not in chain.constants},
            _expiries(chain),
            self._dtype,
        )
        self._channels_last = self._takes_channels_last(x)

    @property
    def table(self) -> Table:
        """The trainable tensors, those of local heads behind the model's own."""
        return self._table

    @property
    def chain(self) -> Chain:
        """The model's graph, cut into units."""
        return self._walk.chain

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
        point = Point(perturbations, weights, layouts_of(self._table, self._dtype, self._channels_last))
        lanes = [_Blocks(self._walk, point, x, y) for _ in range(self._threads)]
        with one_thread(True):
            return credits_of(self._credit_plan, lanes, point, perturbations, groups, bounds, _in_inference)

    def _takes_channels_last(self, x: Tensor) -> bool:
        """Whether the graph runs with channels last, and there are images to lay out so."""
        if x.ndim != 4 or not any(len(spec.shape) == 4 for spec in self._table):
            return False
        places = {spec.name: spec for spec in self._table}

        def weights(name: str) -> Tensor:
            spec = places[name]
            value = torch.from_numpy(self._initial[spec.slice].reshape(spec.shape)).to(self._dtype)
            return value.contiguous(memory_format=torch.channels_last) if value.ndim == 4 else value

        try:
            with torch.inference_mode():
                values_of(self._walk.chain, x.to(self._dtype).contiguous(memory_format=torch.channels_last), weights)
        except RuntimeError:  # a view of what is laid out otherwise
            return False
        return True


@dataclass(frozen=True, eq=False)
class _Walk:
    """What is needed to run a chain's nodes one by one.

    Attributes:
        chain: the model, with what is not trained in the precision of the passes.
        loss: gives one loss per example.
        place: of each trained tensor's node, its place in the table.
        expires: after each node, the values that nothing needs any more.
        dtype: of the passes.
    """

    chain: Chain
    loss: Callable[[Tensor, Tensor], Tensor]
    place: Mapping[Node, int]
    expires: Sequence[Sequence[Node]]
    dtype: torch.dtype


class _Blocks:
    """One thread's way through a chain (``runtimes.credit.Blocks``)."""

    step = 1e-5  # in float64

    def __init__(self, walk: _Walk, point: Point, x: Tensor, y: Tensor) -> None:
        self._walk, self._point, self._x, self._y = walk, point, x, y
        self._order = {node: i for i, node in enumerate(walk.chain.nodes)}
        self._clean = {node: self._written(point.unperturbed, place) for node, place in walk.place.items()}
        self._env: dict[Node, Any] = {}
        self._done = 0
        self._examples = slice(0, 0)

    def start(self, examples: slice, evaluated: Pass | None = None) -> None:
        """Begin to run some examples."""
        table = self._point.directions.table
        env: dict[Node, Any] = {**self._walk.chain.constants, **self._clean}
        if evaluated is not None:
            for node, place in self._walk.place.items():
                if table[place].credit.kind == "loss":
                    env[node] = self._written(evaluated, place)
        env[self._walk.chain.inputs] = self._x[examples]
        self._env, self._done, self._examples = env, 0, examples

    def features(self, head: int) -> Float64:
        """Run on to a head."""
        node, env = self._walk.chain.heads[head].features, self._env
        for i in range(self._done, self._order.get(node, -1) + 1):
            if i:
                for gone in self._walk.expires[i - 1]:
                    env.pop(gone, None)
            env[self._walk.chain.nodes[i]] = run(self._walk.chain.nodes[i], env)
            self._done = i + 1
        return _numbers(pooled(env[node], is_tokens(self._walk.chain.heads[head])))

    def again(self, rows: int, evaluated: Pass) -> Float64:
        """The features of a segment with its tensors perturbed."""
        chain, table = self._walk.chain, self._point.directions.table
        names = set(chain.segments[rows].names)
        changed = {
            node: self._written(evaluated, place)
            for node, place in self._walk.place.items()
            if table[place].name in names
        }
        return _numbers(again(chain, chain.segments[rows], self._env, changed))

    def losses(self, outputs: Float64) -> Float64:
        """The loss of outputs of the last layer."""
        copies, count = outputs.shape[:2]
        y = self._y[self._examples]
        z = tail_of(self._walk.chain, torch.from_numpy(outputs.reshape(copies * count, -1)))
        try:
            losses = self._walk.loss(z, y.repeat(copies, *[1] * (y.ndim - 1)))
        except (IndexError, RuntimeError, TypeError) as error:
            shape = count, outputs.shape[2]
            raise ModelError(
                f"the loss failed on outputs {shape} and targets {tuple(y.shape)} of {y.dtype}: {error}"
            ) from error
        if losses.shape != (copies * count,):
            raise ModelError(
                f"the loss has shape {tuple(losses.shape)} for {copies * count} examples: expected one each"
            )
        return _numbers(losses).reshape(copies, count)

    def _written(self, evaluated: Pass, place: int) -> Tensor:
        """A tensor's weights in a pass, in memory of their own."""
        spec, layout = self._point.directions.table[place], self._point.layouts[place]
        axes = layout.axes or tuple(range(len(spec.shape)))
        made = torch.empty([spec.shape[a] for a in axes], dtype=self._walk.dtype)
        evaluated.write(place, as_bits(made))
        return made if layout.axes is None else made.permute([axes.index(d) for d in range(len(axes))])


def _numbers(value: Tensor) -> Float64:
    numbers: Float64 = value.double().numpy()
    return numbers


def _in_inference(work: Callable[[int], list[list[Float64]]], parts: int) -> list[list[list[Float64]]]:
    """Call a function side by side, each on one of PyTorch's threads and without its bookkeeping for derivatives."""

    def call(i: int) -> list[list[Float64]]:
        with torch.inference_mode(), one_thread(True):
            return work(i)

    return side_by_side(call, parts)


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
