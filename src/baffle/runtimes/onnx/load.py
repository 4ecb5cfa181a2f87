"""Loads a client bundle into an inference engine. PyTorch is not needed."""

from __future__ import annotations

from baffle.errors import OptionError, require_choice
from baffle.runtimes import Runtime
from baffle.runtimes.onnx.bundle import Bundle


def load_runtime(bundle: Bundle, engine: str, threads: int | None = None, precision: str | None = None) -> Runtime:
    """Load a bundle into an inference engine.

    Args:
        bundle: The exported model (``baffle export``).
        engine: ``ort`` (ONNX Runtime) or ``openvino``.
        threads: How many passes are evaluated side by side; None for one per core.
        precision: What to compute in. None is the bundle's own; OpenVINO can also compute an fp32 bundle in bf16 or
            fp16.

    Returns:
        The engine's runtime for the bundle.

    Raises:
        OptionError: If the engine is unknown, or cannot compute in the precision.
        MissingExtraError: If the engine is not installed.
    """
    require_choice("runtime", engine, ["ort", "openvino"])
    if engine == "openvino":
        from baffle.runtimes.onnx.openvino import OpenVinoRuntime

        return OpenVinoRuntime(bundle, threads, precision)
    if precision is not None and precision != bundle.manifest.precision:
        raise OptionError("precision", precision, f"{bundle.manifest.precision}, which the bundle was exported for")
    from baffle.runtimes.onnx.ort import OrtRuntime

    return OrtRuntime(bundle, threads)
