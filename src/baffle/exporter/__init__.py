"""Exports a PyTorch model as a client bundle, which is evaluated without PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import repeat

import msgspec
import numpy as np

from baffle.core.directions import Directions
from baffle.core.types import Losses, Masks
from baffle.data import Dataset
from baffle.errors import MissingExtraError, ModelError, OptionError, PlanError
from baffle.runtimes import Runtime
from baffle.runtimes.evaluation_plan import EvaluationPlan
from baffle.runtimes.onnx.bundle import (
    Bundle,
    Example,
    Feed,
    Manifest,
    Pixels,
    Precision,
    make_bundle,
    require_precision,
)
from baffle.runtimes.perturb import Perturbations

try:
    import onnx
    import torch
    from torch import Tensor, nn

    from baffle.exporter.blocks import quantized_blocks, trace_blocks
    from baffle.exporter.quantized import quantize
    from baffle.exporter.trace import host_loss, trace
    from baffle.runtimes.onnx.ort import PRECISIONS, OrtRuntime
    from baffle.runtimes.pytorch.credit import CreditRuntime
    from baffle.runtimes.pytorch.module_checks import per_example
    from baffle.runtimes.pytorch.runtime import TorchRuntime, to_tensors
except ImportError as error:
    raise MissingExtraError("exporting needs PyTorch and ONNX: pip install 'baffle[export]'") from error

__all__ = ["export"]

_CHECKED = 8  # examples on which the exported graph is compared with the model
_SIGMA = 0.01  # perturbation size of the passes on them
_TOLERANCE = 1e-4  # of their losses, absolute and relative


def export(
    model: nn.Module,
    loss: Callable[..., Tensor],
    data: Dataset,
    *,
    precision: Precision = "fp32",
    branches: bool = False,
    masks: Masks | None = None,
    credit: str | None = None,
) -> Bundle:
    """Export a model as a client bundle, and check that it computes what the model does.

    The check compares losses on a few examples, under the initial and under perturbed weights, and example by example.

    Args:
        model: Any module that PyTorch can export to ONNX. Its parameters with ``requires_grad`` are trained.
        loss: ``loss(output, target)``. ``cross_entropy`` and ``mse_loss`` are computed by the client in float64; any
            other loss becomes part of the graph.
        data: Says what examples look like, and provides a few to compare on.
        precision: ``fp32`` or ``fp16``. With ``int8`` or ``int8-weights`` (which leaves activations in float) the
            weights of convolutions and linear layers become int8. If some parameters are frozen, only layers with
            frozen weights are quantised, and the trained ones stay in float.
        branches: Whether the rank-1 perturbation of linear layers and convolutions is computed in float in a side
            branch and added to their outputs, as LoRA does, so that the weights themselves are never perturbed. Not
            with fp16, whose rounding would hide it, and not for pruned layers, whose zeros it would fill.
        masks: Pruning masks by the names of the tensors, as ``prune`` returns them.
        credit: As for ``CreditRuntime``: the bundle then has a graph for each block of the model. None: one scalar per
            direction for everything.

    Returns:
        The bundle, to be evaluated by ``OrtRuntime`` or ``OpenVinoRuntime``.

    Raises:
        ModelError: If the model cannot be exported, or the graph gives other losses than the model.
        PlanError: For int8 with nothing to quantise, for fp16 with branches, and for rows with branches.
        OptionError: For an unknown precision, or without examples.

    Examples:
        >>> import torch.nn.functional as F
        >>> import baffle as bf
        >>> train, _ = bf.load("digits")
        >>> bundle = export(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), F.cross_entropy, train)
        >>> sorted(bundle.files), bundle.manifest.loss
        (['model.onnx', 'weights.safetensors'], 'cross-entropy')
    """
    require_precision(precision, "ort", PRECISIONS)
    if len(data) == 0:
        raise OptionError("data", data.name, "at least one example")
    if branches and precision == "fp16":
        raise PlanError("branches with precision fp16: expected fp32, int8-weights or int8")
    runtime = TorchRuntime(model, loss, threads=1, masks=masks)
    sample = data.take(np.arange(min(len(data), _CHECKED)))
    reference = _few_losses(runtime, sample)
    table, feeds, graph = trace(model, loss, runtime.table, sample, branches=branches, half=precision == "fp16")
    manifest = Manifest(
        table=table,
        feeds=feeds,
        precision=precision,
        loss=host_loss(loss, sample.y) or "graph",
        x=_example(data.inputs().dtype if data.scaling is None else np.dtype(np.float32), data.x.shape[1:]),
        y=_example(data.y.dtype, data.y.shape[1:]),
        pixels=None if data.scaling is None else Pixels(data.scaling.mean, data.scaling.std),
        activations=(),
        frozen=EvaluationPlan.of(runtime.plan).frozen,
        files={},
    )
    bundle = make_bundle(manifest, {"model.onnx": graph.SerializeToString()}, runtime.initial_weights())
    ort = OrtRuntime(bundle, threads=1)
    together = _few_losses(ort, sample)
    alone = np.concatenate([_few_losses(ort, sample.take(np.arange(i, i + 1))) for i in range(len(sample))], axis=1)
    tolerance = 0.05 if precision == "fp16" else _TOLERANCE
    for what, losses in (("", together), (" for an example alone", alone)):
        if not np.allclose(losses, reference, rtol=tolerance, atol=tolerance):
            worst = np.unravel_index(np.abs(losses - reference).argmax(), losses.shape)
            raise ModelError(
                f"the exported graph gives a loss of {losses[worst]:.6g}{what} where the model gives "
                f"{reference[worst]:.6g}: expected the same; does the model depend on the batch, or on anything random?"
            )
    graphs = {"model.onnx": graph}
    if credit is not None:
        if branches and credit != "global":
            raise PlanError(f"branches with credit {credit}: a row has signs of its own, which no rank-1 branch holds")
        credited = CreditRuntime(model, loss, sample, credit=credit, threads=1, masks=masks)
        bundle, graphs = _in_blocks(bundle, graph, credited, loss, sample)
        _check_credit(credited, OrtRuntime(bundle, threads=1), sample, tolerance)
    if precision in ("fp32", "fp16"):
        return bundle
    return _quantized(bundle, graphs, model, weights_only=precision == "int8-weights")


def _in_blocks(
    bundle: Bundle, graph: onnx.ModelProto, credited: CreditRuntime, loss: Callable[..., Tensor], sample: Dataset
) -> tuple[Bundle, dict[str, onnx.ModelProto]]:
    """The bundle with the blocks of a credited model, and all of its graphs."""
    local_heads = len(credited.table) - len(bundle.manifest.table)  # no graph reads them
    float32: Feed = "float32"
    feeds = (*bundle.manifest.feeds, *repeat(float32, local_heads))
    x, y = to_tensors(sample.take(np.arange(2) % len(sample)), torch.device("cpu"))
    outside = host_loss(loss, sample.y) is not None
    blocks, graphs = trace_blocks(credited.chain, credited.table, feeds, x, y, per_example(loss), in_graph=not outside)
    graphs = {"model.onnx": graph} | graphs
    manifest = msgspec.structs.replace(bundle.manifest, table=credited.table, feeds=feeds, blocks=blocks)
    files = {name: made.SerializeToString() for name, made in graphs.items()}
    return make_bundle(manifest, files, credited.initial_weights()), graphs


def _check_credit(model: CreditRuntime, graphs: OrtRuntime, sample: Dataset, tolerance: float) -> None:
    """Raise ModelError unless the blocks give the numbers that the model does."""
    groups = np.zeros(len(sample), np.int64)
    around = Perturbations(Directions(model.table, "rank1", (0, 0)), 2, (_SIGMA, -_SIGMA), baseline=0)
    expected, found = (
        r.credits(model.initial_weights(), around, sample, groups, [0, len(sample)]) for r in (model, graphs)
    )
    scale = np.abs(expected).max()
    if not np.allclose(found, expected, rtol=0, atol=100 * tolerance * scale):
        worst = np.abs(found - expected).argmax()
        raise ModelError(
            f"the exported blocks give {found.flat[worst]:.6g} where the model gives {expected.flat[worst]:.6g}: "
            "expected the same; does the model depend on the batch, or on anything random?"
        )


def _quantized(
    bundle: Bundle, graphs: Mapping[str, onnx.ModelProto], model: nn.Module, *, weights_only: bool
) -> Bundle:
    frozen = any(not p.requires_grad for p in model.parameters())
    trained = tuple(spec.name for spec in bundle.manifest.table)
    result = quantize(graphs["model.onnx"], trained, trained_in_float=frozen, weights_only=weights_only)
    if not result.quantized:
        raise PlanError(
            "int8: no convolution and no linear layer to quantise" + (" among the frozen ones" if frozen else "")
        )
    feeds: list[Feed] = []
    for spec, feed in zip(bundle.manifest.table, bundle.manifest.feeds, strict=True):
        coded = spec.name in result.quantized
        feeds.append(("codes+branch" if feed == "branch" else "codes") if coded else feed)
    files = {"model.onnx": result.model}
    if result.activations:
        files["ranges.onnx"] = result.ranges
    blocks = bundle.manifest.blocks
    if blocks is not None:
        trained_codes = result.quantized.intersection(trained)
        blocks, more = quantized_blocks(blocks, graphs, trained_codes, weights_only=weights_only)
        files |= more | {name: graph for name, graph in graphs.items() if name == "loss.onnx"}
    manifest = msgspec.structs.replace(
        bundle.manifest, feeds=tuple(feeds), activations=result.activations, blocks=blocks
    )
    made = make_bundle(manifest, {name: graph.SerializeToString() for name, graph in files.items()}, bundle.initial)
    OrtRuntime(made, threads=1)  # report a graph that does not load now, not on the client
    return made


def _few_losses(runtime: Runtime, sample: Dataset) -> Losses:
    """Losses under the initial weights and two perturbed copies: float32[passes, examples]."""
    around = Perturbations(Directions(runtime.table, "rank1", (0, 0)), 2, (_SIGMA,), baseline=True)
    return runtime.losses(runtime.initial_weights(), around, sample)


def _example(dtype: np.dtype[np.generic], shape: tuple[int, ...]) -> Example:
    return Example(shape, "int64" if dtype.kind == "i" else "float32")
