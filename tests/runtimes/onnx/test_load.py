"""A bundle is loaded into the engine that is named, in the bundle's precision or one that the engine can convert to."""

from __future__ import annotations

import pytest

from baffle.errors import OptionError
from baffle.runtimes.onnx.load import load_runtime
from baffle.runtimes.onnx.openvino import OpenVinoRuntime
from baffle.runtimes.onnx.ort import OrtRuntime
from contract import bundle_of


@pytest.mark.parametrize(("engine", "kind"), [("ort", OrtRuntime), ("openvino", OpenVinoRuntime)])
@pytest.mark.parametrize("precision", [None, "fp32"])
def test_the_engine_that_is_named(engine: str, kind: type, precision: str | None) -> None:
    runtime = load_runtime(bundle_of("mlp"), engine, 1, precision)
    assert type(runtime) is kind
    assert runtime.plan["precision"] == "fp32"
    assert runtime.plan["threads"] == 1


def test_an_unknown_engine_is_refused_with_the_nearest() -> None:
    with pytest.raises(OptionError, match=r"runtime = 'openvine': expected one of .* \(did you mean openvino\?\)"):
        load_runtime(bundle_of("mlp"), "openvine")


@pytest.mark.parametrize("precision", ["bf16", "fp16", "int8"])
def test_onnx_runtime_computes_in_the_bundles_own_precision_only(precision: str) -> None:
    with pytest.raises(OptionError, match=f"precision = '{precision}': expected fp32, which the bundle"):
        load_runtime(bundle_of("mlp"), "ort", precision=precision)
