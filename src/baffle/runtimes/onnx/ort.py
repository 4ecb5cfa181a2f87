"""Forward passes by ONNX Runtime: the base client, which needs numpy and onnxruntime only.

There is one session per graph, shared by all threads; every thread binds its own buffers once. ONNX Runtime's
telemetry is switched off before it is imported.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from baffle.core.types import Array
from baffle.errors import MissingExtraError
from baffle.runtimes.onnx.bundle import Bundle, require_precision
from baffle.runtimes.onnx.runtime import Buffers, GraphRuntime, explained

os.environ["ORT_DISABLE_TELEMETRY"] = "1"
try:
    import onnxruntime
except ImportError as error:
    raise MissingExtraError("ONNX Runtime is not installed: pip install 'baffle[ort]'") from error

PRECISIONS = ("fp32", "fp16", "int8-weights", "int8")


class OrtRuntime(GraphRuntime):
    """Evaluates the losses of a client bundle by ONNX Runtime on the CPU, in the bundle's precision.

    Args:
        bundle: The exported model.
        threads: How many passes are evaluated side by side, each on one thread; None for one per core.

    Raises:
        ModelError: If the graph cannot be loaded, or while evaluating if it fails.
        OptionError: If ``threads`` is out of range.

    Examples:
        >>> import torch.nn.functional as F
        >>> from torch import nn
        >>> import baffle as bf
        >>> train, _ = bf.load("digits")
        >>> runtime = OrtRuntime(bf.export(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), F.cross_entropy, train))
        >>> runtime.evaluate(runtime.initial_weights(), train).losses.shape
        (1438,)
    """

    def __init__(self, bundle: Bundle, threads: int | None = None) -> None:
        precision = bundle.manifest.precision
        require_precision(precision, "ort", PRECISIONS)
        sessions: dict[str, onnxruntime.InferenceSession] = {}

        def session(file: str) -> onnxruntime.InferenceSession:
            if file not in sessions:
                with explained(f"ONNX Runtime: loading {file}"):
                    sessions[file] = onnxruntime.InferenceSession(
                        bundle.files[file],
                        _options(),
                        providers=["CPUExecutionProvider"],
                        # it would fuse an int8 product with its bias into a float one, which has no int8 kernel
                        disabled_optimizers=["MatMulAddFusion"] if precision == "int8" else None,
                    )
            return sessions[file]

        def load(file: str, buffers: Buffers) -> _Program:
            with explained(f"ONNX Runtime: binding the inputs of {file}"):
                return _Program(session(file), buffers)

        session("model.onnx")  # report a graph that cannot be loaded now, not in the first round
        plan: dict[str, str | int] = {
            "runtime": "ort",
            "onnxruntime": onnxruntime.__version__,
            "device": "cpu",
            "precision": precision,
        }
        super().__init__(bundle, load, plan, threads)


def _options() -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # fatal only: errors are raised anyway
    return options


class _Program:
    """A session whose inputs are bound to buffers."""

    def __init__(self, session: onnxruntime.InferenceSession, buffers: Buffers) -> None:
        self._session = session
        self._names = [output.name for output in session.get_outputs()]
        self._binding = session.io_binding()
        self._buffers = {i.name: buffers[i.name] for i in session.get_inputs()}
        for name, array in self._buffers.items():  # on the CPU an OrtValue is a view of its array
            self._binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(array))
        for name in self._names:
            self._binding.bind_output(name)

    def run(self) -> Mapping[str, Array]:
        with explained("ONNX Runtime: the model"):
            self._session.run_with_iobinding(self._binding)
            return dict(zip(self._names, self._binding.copy_outputs_to_cpu(), strict=True))
