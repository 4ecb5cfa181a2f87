"""Exported graphs as OpenVINO compiles them: with constant weights, and with a clock on every operation."""

from __future__ import annotations

import importlib
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import baffle.runtimes.onnx.openvino  # noqa: F401  # first: it keeps OpenVINO's telemetry out
from baffle.core.cores import cores
from baffle.data import Dataset
from baffle.runtimes.onnx.bundle import Bundle

openvino: Any = importlib.import_module("openvino")

_HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}
_MICRO_BATCH_INPUTS = 2**15  # numbers in a micro-batch, as in our runtimes


def capabilities() -> list[str]:
    """What the processor has instructions for, FP32, BF16 and FP16 among others."""
    return list(openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))


class ConstantFolded:
    """Beside R3, our own K unperturbed passes: OpenVINO with constant weights, which it folds, and no loss.

    No engine that evaluates changing weights can do what this one does: fold, transpose and pack them once.
    Micro-batches and threads are those of our runtimes: one request per core, each on one thread.
    """

    def __init__(self, bundle: Bundle, batch: Dataset, precision: str = "fp32", threads: int | None = None) -> None:
        inputs = batch.inputs()
        parts = math.ceil(len(inputs) / max(32, min(128, _MICRO_BATCH_INPUTS // inputs[0].size)))
        self._micro_batches = inputs.reshape(parts, -1, *inputs.shape[1:])
        self._threads = threads or cores()
        self.compiled = compiled(bundle, len(self._micro_batches[0]), precision, threads=self._threads, constant=True)
        self._requests = [self.compiled.create_infer_request() for _ in range(self._threads)]

    def outputs(self, passes: int) -> list[list[Any]]:
        """The model's outputs of each pass: passes x micro-batches x [examples, classes]."""
        with ThreadPoolExecutor(self._threads) as pool:
            shares = [range(i, passes, self._threads) for i in range(self._threads)]
            done = list(pool.map(lambda i: [self._pass(i) for _ in shares[i]], range(self._threads)))
        return [outputs for share in done for outputs in share]

    def _pass(self, i: int) -> list[Any]:
        return [self._requests[i].infer({"x": x})["outputs"].copy() for x in self._micro_batches]


def compiled(
    bundle: Bundle, examples: int, precision: str, *, threads: int, constant: bool, count: bool = False
) -> Any:
    """A bundle's graph compiled by OpenVINO for ``examples`` examples, with weights as inputs or as constants.

    ``count`` measures each operation.
    """
    model = openvino.Core().read_model(bundle.files["model.onnx"])
    tensors = {spec.name: bundle.initial[spec.slice].reshape(spec.shape) for spec in bundle.manifest.table}
    shapes = {}
    for parameter in model.get_parameters():
        (name,) = (n for n in parameter.output(0).names if n in tensors or n == "x")
        if name == "x":
            shapes[parameter.output(0)] = [examples, *bundle.manifest.x.shape]
        elif constant:
            parameter.output(0).replace(openvino.opset13.constant(tensors[name]).output(0))
            model.remove_parameter(parameter)
        else:
            shapes[parameter.output(0)] = list(tensors[name].shape)
    model.reshape(shapes)
    settings = {"INFERENCE_PRECISION_HINT": _HINTS[precision], "INFERENCE_NUM_THREADS": threads}
    settings |= {"NUM_STREAMS": threads, "PERF_COUNT": count}
    return openvino.compile_model(model, "CPU", settings)
