"""Forward passes by OpenVINO, which is fastest in bfloat16 on CPUs that have it (AMX, AVX512-BF16).

The model is compiled once per batch size; every thread has an infer request of its own, with its inputs bound to
buffers. OpenVINO's telemetry package is blocked before the import. OpenVINO's default precision may be lower than
float32, so the precision is always set explicitly.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from baffle.core.cores import cores
from baffle.core.types import Array, ParamSpec
from baffle.errors import MissingExtraError, ModelError, OptionError, PlanError
from baffle.runtimes.onnx.bundle import Bundle, Feed, require_precision
from baffle.runtimes.onnx.runtime import KINDS, Buffers, GraphRuntime, explained
from baffle.runtimes.perturb import Kind

sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # None makes its import fail
try:
    import openvino
    from openvino.preprocess import PrePostProcessor
except ImportError as error:
    raise MissingExtraError("OpenVINO is not installed: pip install 'baffle[openvino]'") from error

PRECISIONS = ("fp32", "bf16", "fp16", "int8-weights", "int8")
_HINTS = {"bf16": ("bf16", "BF16"), "fp16": ("f16", "FP16")}


class OpenVinoRuntime(GraphRuntime):
    """Evaluates the losses of a client bundle by OpenVINO on the CPU.

    Int8 bundles run, but slowly: OpenVINO has no int8 kernels for graphs whose weights are inputs.

    Args:
        bundle: The exported model.
        threads: How many passes are evaluated side by side, each on one thread; None for one per core.
        precision: What to compute in: None for the bundle's own, or ``bf16`` or ``fp16`` for an fp32 bundle on a
            processor that supports it.

    Raises:
        OptionError: If ``threads`` is out of range, or the bundle or the processor cannot compute in the precision
            (OpenVINO itself would silently compute in another).
        PlanError: For bf16 or fp16 with a loss inside the graph, whose rounding would hide the differences.
        ModelError: If the graph cannot be compiled, or while evaluating if it fails.

    Examples:
        >>> import torch.nn.functional as F
        >>> from torch import nn
        >>> import baffle as bf
        >>> train, _ = bf.load("digits")
        >>> bundle = bf.export(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), F.cross_entropy, train)
        >>> runtime = OpenVinoRuntime(bundle)
        >>> runtime.evaluate(runtime.initial_weights(), train).losses.shape
        (1438,)
    """

    def __init__(self, bundle: Bundle, threads: int | None = None, precision: str | None = None) -> None:
        own = bundle.manifest.precision
        precision = precision or own
        require_precision(precision, "openvino", PRECISIONS)
        if precision != own and (own != "fp32" or precision not in _HINTS):
            raise OptionError("precision", precision, f"{own}, which the bundle was exported for")
        core = openvino.Core()
        hint = "f32"
        if own == "fp32" and precision in _HINTS:
            hint, capability = _HINTS[precision]
            has = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
            if capability not in has:
                raise OptionError("precision", precision, f"one that this processor has: {', '.join(sorted(has))}")
            if bundle.manifest.loss == "graph":
                raise PlanError(
                    f"precision {precision} with a loss in the graph: its rounding hides the differences; expected "
                    "cross_entropy or mse_loss, which are taken outside in float64"
                )
        count = cores() if threads is None else threads  # one stream per lane, each on one thread
        compiled: dict[tuple[str, int], Any] = {}

        def load(file: str, buffers: Buffers) -> _Program:
            size = len(buffers["x"])
            if (file, size) not in compiled:
                with explained(f"OpenVINO: compiling {file}"):
                    model = core.read_model(bundle.files[file])
                    model.reshape({i: list(buffers[_name(i, buffers)].shape) for i in model.inputs})
                    model = _with_bfloat16_inputs(model, buffers)
                    settings = {
                        "INFERENCE_PRECISION_HINT": hint,
                        "INFERENCE_NUM_THREADS": count,
                        "NUM_STREAMS": count,
                    }
                    compiled[file, size] = core.compile_model(model, "CPU", settings)
            with explained(f"OpenVINO: binding the inputs of {file}"):
                return _Program(compiled[file, size], buffers)

        plan: dict[str, str | int] = {
            "runtime": "openvino",
            "openvino": str(openvino.__version__),
            "device": "cpu",
            "precision": precision,
        }

        def kinds(spec: ParamSpec, feed: Feed) -> Kind:
            """Matrices enter as bf16 where the kernels would convert them to it."""
            return "bf16" if hint == "bf16" and feed == "float32" and spec.matrix is not None else KINDS[feed]

        super().__init__(bundle, load, plan, count, kinds)


class _Program:
    """An infer request whose inputs are bound to buffers."""

    def __init__(self, compiled: Any, buffers: Buffers) -> None:
        self._request = compiled.create_infer_request()
        self._buffers = [buffers[_name(i, buffers)] for i in compiled.inputs]
        for i, array in zip(compiled.inputs, self._buffers, strict=True):
            if array.dtype == np.uint16:  # the bits of bfloat16, which numpy lacks
                tensor = openvino.Tensor(array, i.shape, openvino.Type.bf16)
            else:
                tensor = openvino.Tensor(array, shared_memory=True)
            self._request.set_tensor(i, tensor)
        self._outputs = {
            name: self._request.get_tensor(output).data for output in compiled.outputs for name in output.names
        }

    def run(self) -> Mapping[str, Array]:
        with explained("OpenVINO: the model"):
            self._request.infer()
        return self._outputs


def _with_bfloat16_inputs(model: Any, buffers: Buffers) -> Any:
    """The model with bfloat16 inputs where buffers hold the bits of bfloat16."""
    processor = PrePostProcessor(model)
    for port in model.inputs:
        if buffers[_name(port, buffers)].dtype == np.uint16:
            processor.input(port.any_name).tensor().set_element_type(openvino.Type.bf16)
    return processor.build()


def _name(port: Any, buffers: Buffers) -> str:
    """The name of the buffer that an input reads; a port may also have the names of tensors merged into it."""
    names: list[str] = sorted(name for name in port.names if name in buffers)
    if not names:
        raise ModelError(f"input {port.any_name}: expected one of {', '.join(buffers)}")
    return names[0]
