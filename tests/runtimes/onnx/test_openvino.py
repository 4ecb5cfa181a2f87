"""OpenVINO: its precisions, and bfloat16 inputs."""

from __future__ import annotations

import numpy as np
import openvino
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from baffle.core.directions import Directions
from baffle.core.types import Family
from baffle.errors import OptionError, PlanError
from baffle.exporter import export
from baffle.runtimes.onnx.bundle import Precision
from baffle.runtimes.onnx.openvino import OpenVinoRuntime
from baffle.runtimes.perturb import Perturbations
from contract import HAS_BF16, batch, bundle_of, linear


class TestPrecision:
    """Each runtime refuses what it cannot compute in, rather than compute in something else."""

    @pytest.mark.parametrize(("own", "asked"), [("int8", "bf16"), ("int8-weights", "fp32"), ("fp32", "int8")])
    def test_openvino_computes_another_precision_for_fp32_bundles_only(self, own: Precision, asked: str) -> None:
        with pytest.raises(OptionError, match=f"precision = '{asked}': expected {own}, which the bundle"):
            OpenVinoRuntime(bundle_of("mlp", own), precision=asked)

    @pytest.mark.parametrize(("precision", "capability"), [("bf16", "BF16"), ("fp16", "FP16")])
    def test_openvino_refuses_what_the_processor_does_not_have(self, precision: str, capability: str) -> None:
        has = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if capability in has:
            runtime = OpenVinoRuntime(bundle_of("mlp"), 1, precision)
            assert runtime.plan["precision"] == precision
            return
        with pytest.raises(
            OptionError, match=f"precision = '{precision}': expected one that this processor has: .*FP32"
        ):
            OpenVinoRuntime(bundle_of("mlp"), 1, precision)

    @pytest.mark.parametrize("precision", ["bf16", "fp16"])
    def test_openvino_asks_the_processor(self, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
        class Old:
            def get_property(self, device: str, name: str) -> list[str]:
                return ["FP32", "INT8"]

        monkeypatch.setattr(openvino, "Core", Old)
        with pytest.raises(
            OptionError, match=f"precision = '{precision}': expected one that this processor has: FP32, INT8"
        ):
            OpenVinoRuntime(bundle_of("mlp"), 1, precision)

    @pytest.mark.skipif(not HAS_BF16, reason="a processor without bf16")
    def test_bf16_with_a_loss_in_the_graph_is_refused(self) -> None:
        loss = nn.CrossEntropyLoss(label_smoothing=0.1)
        with pytest.raises(PlanError, match=r"bf16 with a loss in the graph.*cross_entropy or mse_loss"):
            OpenVinoRuntime(export(linear(), loss, batch()), 1, "bf16")


@pytest.mark.skipif(not HAS_BF16, reason="a processor without bf16")
@pytest.mark.parametrize("family", ["rank1", "gaussian"])
def test_openvino_takes_matrices_as_bf16(family: Family) -> None:
    """Of weights 1, whose neighbours are 1 - 2**-8 and 1 + 2**-7: less than half way there is nothing."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10, bias=False))
    runtime = OpenVinoRuntime(export(model, F.cross_entropy, batch()), 1, "bf16")
    memory, weights = runtime.lanes[0].replica.buffers["1.weight"], np.ones(640, np.float32)
    directions = Directions(runtime.table, family, (3, 1))
    largest = np.abs(directions.entries(0, slice(0, 1))).max() * directions.unit
    base, small = runtime.losses(weights, Perturbations(directions, 1, (0.99 * 2**-9 / largest,), 1), batch())
    assert memory.dtype == np.uint16
    assert memory.shape == (10, 64)
    assert np.all(memory == 0x3F80)
    assert np.array_equal(base, small)
    step = 2**-7 / largest
    base, large = runtime.losses(weights, Perturbations(directions, 1, (step,), 1), batch())
    assert not np.array_equal(base, large)
    entries = directions.entries(0, slice(0, 1))[0] * np.float32(directions.unit)
    expected = torch.from_numpy(weights + np.float32(step) * entries).to(torch.bfloat16)
    assert np.array_equal(memory.reshape(-1), expected.view(torch.int16).numpy().view(np.uint16))
