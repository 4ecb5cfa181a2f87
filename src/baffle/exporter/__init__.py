"""From a PyTorch model to a client bundle that needs no PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import numpy as np

from baffle.data import Dataset
from baffle.errors import MissingExtraError, ModelError, OptionError, PlanError
from baffle.runtimes.bundle import Bundle, Example, Feed, Manifest, Pixels, Precision, make_bundle, require_precision
from baffle.types import Masks

try:
    import onnx
    from torch import Tensor, nn

    from baffle.exporter.quantized import quantize
    from baffle.exporter.trace import host_loss, trace
    from baffle.runtimes.ort import PRECISIONS, OrtRuntime
    from baffle.runtimes.pytorch import TorchRuntime
except ImportError as error:
    raise MissingExtraError("exporting needs PyTorch and ONNX: pip install 'baffle[export]'") from error

__all__ = ["export"]

_CHECKED = 8  # examples on which the exported graph is compared with the model
_TOLERANCE = 1e-4  # of losses, absolute and relative


def export(
    model: nn.Module,
    loss: Callable[..., Tensor],
    data: Dataset,
    *,
    precision: Precision = "fp32",
    branches: bool = False,
    masks: Masks | None = None,
) -> Bundle:
    """Export a model as a client bundle, and check that it computes what the model does.

    ``data`` says what examples look like (and gives a few to compare on). With ``precision`` "int8" or
    "int8-weights" every weight of a convolution or a linear layer becomes int8; if some parameters are frozen, only
    their layers do, and the trained ones stay in float beside them. ``branches`` adds the rank-1 perturbation of
    linear layers and convolutions in float to their outputs, so that the weights themselves are never perturbed.

    ``cross_entropy`` and ``mse_loss`` are taken outside the graph in float64; any other loss becomes part of it.
    Raises ModelError if the model cannot be exported, or the graph does not agree with it.

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
    runtime = TorchRuntime(model, loss, threads=1, masks=masks)
    sample = data.take(np.arange(min(len(data), _CHECKED)))
    reference = runtime.evaluate(runtime.initial_weights(), sample).losses
    table, feeds, graph = trace(model, loss, runtime.table, sample, branches=branches, half=precision == "fp16")
    manifest = Manifest(
        table=table,
        feeds=feeds,
        precision=precision,
        loss=host_loss(loss) or "graph",
        x=_example(data.inputs().dtype if data.scaling is None else np.dtype(np.float32), data.x.shape[1:]),
        y=_example(data.y.dtype, data.y.shape[1:]),
        pixels=None if data.scaling is None else Pixels(data.scaling.mean, data.scaling.std),
        activations=(),
        files={},
    )
    files = {"model.onnx": graph.SerializeToString()}
    bundle = make_bundle(manifest, files, runtime.initial_weights())
    found = OrtRuntime(bundle, threads=1).evaluate(bundle.initial, sample).losses
    tolerance = 0.05 if precision == "fp16" else _TOLERANCE
    if not np.allclose(found, reference, rtol=tolerance, atol=tolerance):
        worst = int(np.abs(found - reference).argmax())
        raise ModelError(
            f"the exported graph gives a loss of {found[worst]:.6g} where the model gives {reference[worst]:.6g}: "
            "expected the same; does the model depend on the batch, or on anything random?"
        )
    if precision in ("fp32", "fp16"):
        return bundle
    return _quantized(bundle, graph, model, weights_only=precision == "int8-weights")


def _quantized(bundle: Bundle, graph: onnx.ModelProto, model: nn.Module, *, weights_only: bool) -> Bundle:
    frozen = any(not p.requires_grad for p in model.parameters())
    trained = tuple(spec.name for spec in bundle.manifest.table)
    result = quantize(graph, trained, trained_in_float=frozen, weights_only=weights_only)
    if not result.quantized:
        raise PlanError(
            "int8: no convolution and no linear layer to quantise" + (" among the frozen ones" if frozen else "")
        )
    feeds: list[Feed] = []
    for spec, feed in zip(bundle.manifest.table, bundle.manifest.feeds, strict=True):
        coded = spec.name in result.quantized
        feeds.append(("codes+branch" if feed == "branch" else "codes") if coded else feed)
    files = {"model.onnx": result.model.SerializeToString()}
    if result.activations:
        files["ranges.onnx"] = result.ranges.SerializeToString()
    manifest = msgspec.structs.replace(bundle.manifest, feeds=tuple(feeds), activations=result.activations)
    made = make_bundle(manifest, files, bundle.initial)
    OrtRuntime(made, threads=1)  # a graph that does not load is told now, not on the client
    return made


def _example(dtype: np.dtype[np.generic], shape: tuple[int, ...]) -> Example:
    return Example(shape, "int64" if dtype.kind == "i" else "float32")
