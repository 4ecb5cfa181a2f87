"""Exporting: what is refused, what the manifest says, and that nothing else is changed or printed."""

from __future__ import annotations

import copy
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import baffle
from baffle.data import Dataset, Scaling
from baffle.errors import ModelError, OptionError
from baffle.exporter import export
from baffle.models import build
from baffle.runtimes.onnx.bundle import Bundle, Example, Pixels, Precision
from baffle.runtimes.onnx.ort import OrtRuntime
from exported import assert_same, numbers, tokens


class Linear(nn.Module):
    """A linear layer after something that is done to its inputs."""

    def __init__(self, before: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.before, self.linear = before, nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.linear(self.before(x)))


class TestRefusals:
    @pytest.mark.parametrize(
        ("before", "message"),
        [
            (lambda x: x * len(x) if len(x) < 3 else x, "depends on how many examples there are"),
            (lambda x: x - x.mean(0), "an example alone.*does the model depend on the batch"),
            (lambda x: x + torch.randn_like(x), "does the model depend on the batch, or on anything random"),
            (
                lambda x: x if x.sum() > 0 else -x,
                "cannot be exported to ONNX with a batch of any size: .*data-dependent",
            ),
            (lambda x: x[x[:, 0].argsort()], "does the model depend on the batch"),
        ],
        ids=["size", "statistics", "noise", "values", "order"],
    )
    def test_a_model_that_is_no_function_of_one_example(
        self, before: Callable[[Tensor], Tensor], message: str, capfd: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(ModelError, match=message) as caught:
            export(Linear(before), F.cross_entropy, numbers(6))
        told = str(caught.value)
        assert len(told.splitlines()) == 1
        for inner in ("Traceback", "File ", "\x1b", "site-packages", "torch.export"):
            assert inner not in told
        assert capfd.readouterr() == ("", "")

    def test_a_model_that_gives_several_outputs(self) -> None:
        class Two(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x), x  # type: ignore[return-value]  # the mistake that is tested

        with pytest.raises(ModelError, match="the model gives a tuple: expected one tensor"):
            export(Two(6, 4), F.cross_entropy, numbers(6))

    def test_training_mode(self) -> None:
        for module, cause in ((nn.BatchNorm1d(6), r"GroupNorm.*eval"), (nn.Dropout(0.5), r"Dropout.*eval")):
            model = nn.Sequential(nn.Linear(6, 6), module, nn.Linear(6, 4))
            with pytest.raises(ModelError, match=cause):
                export(model, F.cross_entropy, numbers(6))
            model.eval()
            assert_same(model, F.cross_entropy, numbers(6), export(model, F.cross_entropy, numbers(6)))

    def test_models_that_torch_cannot_train_either(self) -> None:
        with pytest.raises(ModelError, match="no trainable parameter"):
            export(nn.Flatten(), F.cross_entropy, numbers(6))
        with pytest.raises(ModelError, match=r"dtype torch.float64: expected float32"):
            export(nn.Linear(6, 4).double(), F.cross_entropy, numbers(6))

    def test_data_without_examples(self) -> None:
        with pytest.raises(OptionError, match="data = 'none': expected at least one example"):
            export(nn.Linear(6, 4), F.cross_entropy, numbers(6, name="none").take(np.arange(0)))

    def test_one_example_is_enough(self) -> None:
        model, data = nn.Linear(6, 4), numbers(6)
        assert_same(model, F.cross_entropy, data, export(model, F.cross_entropy, data.take(np.arange(1))))


class TestManifest:
    def test_masks_travel_in_the_table(self) -> None:
        masks = {"weight": np.arange(24).reshape(4, 6) % 3 == 0}
        bundle = export(nn.Linear(6, 4), F.cross_entropy, numbers(6), masks=masks)
        again = Bundle.decode(bundle.encode())
        mask = again.manifest.table[0].mask
        assert mask is not None
        assert np.array_equal(mask.reshape(4, 6), masks["weight"])
        assert again.manifest.table[1].mask is None
        assert not again.initial[:24][~masks["weight"].reshape(-1)].any()
        with pytest.raises(ModelError, match=r"mask of bias: bool\[3\]: expected bool\[4\]"):
            export(nn.Linear(6, 4), F.cross_entropy, numbers(6), masks={"bias": np.ones(3, bool)})

    def test_it_says_what_examples_look_like(self) -> None:
        rng = np.random.default_rng(0)
        pixels = Dataset(
            rng.integers(0, 256, (12, 2, 3, 3), np.uint8), np.arange(12) % 4, "p", Scaling((0.1, 0.2), (1, 2))
        )
        manifest = export(nn.Sequential(nn.Flatten(), nn.Linear(18, 4)), F.cross_entropy, pixels).manifest
        assert (manifest.x, manifest.y) == (Example((2, 3, 3), "float32"), Example((), "int64"))
        assert manifest.pixels == Pixels((0.1, 0.2), (1, 2))
        text = nn.Sequential(nn.Embedding(9, 3), nn.Flatten(), nn.Linear(21, 9))
        manifest = export(text, F.cross_entropy, tokens()).manifest
        assert (manifest.x, manifest.pixels) == (Example((7,), "int64"), None)

    @pytest.mark.parametrize("precision", ["fp16", "int8"])
    def test_it_says_the_precision(self, precision: Precision) -> None:
        model = nn.Linear(6, 4)
        bundle = export(nn.Sequential(model), F.cross_entropy, numbers(6), precision=precision)
        assert bundle.manifest.precision == precision
        assert OrtRuntime(bundle, 1).plan["precision"] == precision
        assert OrtRuntime(bundle, 1).plan["bundle"] == bundle.sha256
        assert np.abs(bundle.initial[:24] - model.weight.detach().numpy().reshape(-1)).max() == 0


AGAIN = """
import numpy as np
import torch.nn.functional as F
from baffle.data import Dataset
from baffle.exporter import export
from baffle.models import build

data = Dataset(np.random.default_rng(0).normal(size=(12, 1, 8, 8)), np.arange(12) % 4)
print(export(build("lenet-small", (1, 8, 8), 4), F.cross_entropy, data, precision="int8", branches=True).sha256)
"""


class TestSideEffects:
    @pytest.mark.parametrize("precision", ["fp32", "int8"])
    def test_the_same_model_gives_the_same_bundle(self, precision: Precision) -> None:
        model, data = build("mlp", (1, 8, 8), 4), numbers(1, 8, 8)
        first = export(model, F.cross_entropy, data, precision=precision)
        torch.manual_seed(1)
        second = export(copy.deepcopy(model), F.cross_entropy, data, precision=precision)
        assert first.sha256 == second.sha256
        assert first.encode() == second.encode()

    def test_another_process_in_another_folder_gives_the_same_bundle_and_prints_nothing(self, tmp_path: Path) -> None:
        (tmp_path / "again.py").write_text(AGAIN)
        done = subprocess.run(
            [sys.executable, "-W", "always", "again.py"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONHASHSEED": "7"},
            capture_output=True,
            text=True,
            check=True,
        )
        data = Dataset(np.random.default_rng(0).normal(size=(12, 1, 8, 8)), np.arange(12) % 4)
        model = build("lenet-small", (1, 8, 8), 4)
        assert done.stdout.strip() == export(model, F.cross_entropy, data, precision="int8", branches=True).sha256
        assert done.stderr == ""

    @pytest.mark.parametrize("precision", ["fp32", "int8"])
    def test_a_bundle_tells_nothing_about_the_machine_or_the_source(self, precision: Precision) -> None:
        bundle = export(build("lenet-small", (1, 8, 8), 4), F.cross_entropy, numbers(1, 8, 8), precision=precision)
        for data in (bundle.encode(), *bundle.files.values()):
            for private in (str(Path(baffle.__file__).parents[1]), str(Path.cwd()), "site-packages", ".py", "forward"):
                assert private.encode() not in data

    def test_the_model_stays_as_it_was(self) -> None:
        class Spied(nn.Sequential):
            pass

        model = Spied(nn.Linear(6, 6), nn.BatchNorm1d(6).eval(), nn.Dropout(0.0), nn.Linear(6, 4))
        model[0].requires_grad_(False)
        parameters, state = list(model.parameters()), copy.deepcopy(model.state_dict())
        modes = [m.training for m in model.modules()]
        export(model, F.cross_entropy, numbers(6), branches=True)
        export(model, F.cross_entropy, numbers(6), precision="fp16")
        export(model, F.cross_entropy, numbers(6), precision="int8")
        assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
        assert [m.training for m in model.modules()] == modes
        assert [p.requires_grad for p in parameters] == [False, False, True, True, True, True]
        assert all(p.grad is None and p.dtype == torch.float32 for p in parameters)
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert [type(m) for m in model] == [nn.Linear, nn.BatchNorm1d, nn.Dropout, nn.Linear]

    def test_nothing_is_printed_logged_or_warned_and_no_global_state_changes(
        self, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
    ) -> None:
        models = nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.5)).eval(), nn.Sequential(nn.Conv1d(6, 4, 1), nn.Flatten())
        state, threads, level = torch.get_rng_state(), torch.get_num_threads(), logging.root.manager.disable
        filters = list(warnings.filters)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            export(models[0], nn.CrossEntropyLoss(label_smoothing=0.1), numbers(6), branches=True)
            export(models[1], F.cross_entropy, numbers(6, 1), precision="int8")
        assert warned == []
        assert capfd.readouterr() == ("", "")
        assert [r for r in caplog.records if r.levelno > logging.INFO] == []
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.get_num_threads() == threads
        assert logging.root.manager.disable == level
        assert list(warnings.filters) == filters
