"""ONNX Runtime refuses precisions that it cannot compute in."""

from __future__ import annotations

import msgspec
import pytest
import torch.nn.functional as F

from baffle.errors import OptionError
from baffle.exporter import export
from baffle.runtimes.onnx.bundle import Bundle
from baffle.runtimes.onnx.ort import OrtRuntime
from contract import batch, bundle_of, linear


class TestPrecision:
    """Each runtime refuses what it cannot compute in, rather than compute in something else."""

    def test_ort_has_no_bf16(self) -> None:
        with pytest.raises(OptionError, match=r"runtime ort.*'bf16': expected one of fp32, fp16, int8-weights, int8"):
            export(linear(), F.cross_entropy, batch(), precision="bf16")  # type: ignore[arg-type]  # a user's mistake
        good = bundle_of("mlp")
        manifest = msgspec.structs.replace(good.manifest, precision="bf16")
        with pytest.raises(OptionError, match=r"runtime ort.*'bf16'"):
            OrtRuntime(Bundle(manifest, good.files))
