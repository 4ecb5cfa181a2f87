"""``baffle export``: bundles of models and of runs."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

import baffle as bf
from baffle.models import build
from cli_helpers import SHAPES, TINY, TRAIN_TINY, last_json, metrics, refused_with
from helpers import copy_run, invoke, tree

pytestmark = pytest.mark.usefixtures("tiny_model", "exports")


EXPORTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "fp32": ((), ("float32",) * 4),
    "fp16": (("--precision", "fp16"), ("float16",) * 4),
    "int8": (("--precision", "int8"), ("codes", "float32") * 2),
    "int8-weights": (("--precision", "int8-weights"), ("codes", "float32") * 2),
    "branches": (("--precision", "int8", "--branches"), ("codes+branch", "float32") * 2),
    "head": (("--precision", "int8", "--trainable", "head"), ("float32",) * 2),
    "pruned": (("--prune", "0.5"), ("float32",) * 4),
}


@pytest.mark.parametrize("name", EXPORTS)
def test_export_writes_what_it_says(tmp_path: Path, name: str) -> None:
    flags, feeds = EXPORTS[name]
    told = last_json(invoke(tmp_path, "export", "tiny_model:build", *flags, "--out", "new/client.zip", "--json"))
    bundle, file = bf.Bundle.load(tmp_path / "new/client.zip"), tmp_path / "new/client.zip"
    assert told == {
        "bundle": "new/client.zip",
        "sha256": bundle.sha256,
        "bytes": file.stat().st_size,
        "precision": {"pruned": "fp32", "branches": "int8", "head": "int8"}.get(name, name),
        "loss": "cross-entropy",
        "parameters": 130 if name == "head" else 910,
        "inputs": len(feeds),
        "tensors": dict(list(SHAPES.items())[-len(feeds) :]),
    }
    manifest = bundle.manifest
    assert (manifest.precision, manifest.feeds) == (told["precision"], feeds)
    kept = [spec.mask.mean() for spec in manifest.table if spec.mask is not None]
    assert (len(kept) == 2 and min(kept) < 0.5) == (name == "pruned")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["client.zip"]
    expected = build("tiny_model:build", (1, 8, 8), 10).state_dict()
    for spec in manifest.table:
        if spec.mask is None:
            assert (bundle.initial[spec.slice] == expected[spec.name].numpy().reshape(-1)).all()


def test_export_prints_a_table_of_tensors(tmp_path: Path) -> None:
    outcome = invoke(tmp_path, "export", "tiny_model:build", "--to", "onnx", "--prune", "0.5")
    assert (outcome.code, outcome.err) == (0, "")
    for words in ("client.zip: fp32", "1.weight │ 12x64", "3.bias   │ 10", "float32"):
        assert words in outcome.out
    assert outcome.out.count("%") == 2
    assert outcome.out.splitlines()[-1] == f"sha256 {bf.Bundle.load(tmp_path / 'client.zip').sha256}"


def test_export_by_name_is_not_disturbed_by_a_folder_of_that_name(tmp_path: Path) -> None:
    (tmp_path / "mlp").mkdir()
    assert last_json(invoke(tmp_path, "export", "mlp", "--seed", "3", "--json"))["parameters"] == 26514
    expected = build("mlp", (1, 8, 8), 10, 3)
    assert (
        bf.Bundle.load(tmp_path / "client.zip").initial[-10:] == expected.get_parameter("7.bias").detach().numpy()
    ).all()
    refused_with(invoke(tmp_path, "export", "./mlp"), "mlp: no config.json: expected the folder of a run")


def test_an_own_model_is_found_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "found_here.py").write_text(TINY)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(tmp_path))])
    assert invoke(tmp_path, "calibrate", "--model", "found_here:build", "--num-directions", "2").code == 0
    del sys.modules["found_here"]
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(tmp_path))])
    assert invoke(tmp_path, "export", "found_here:build").code == 0


RUNS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "pruned": ("--prune", "0.5", "--prune-by", "inputs"),
    "shrunk": ("--prune", "0.5", "--prune-by", "channels"),
    "head": ("--trainable", "head"),
    "scales": ("--trainable", "scales"),
}


@pytest.mark.parametrize("name", RUNS)
def test_the_bundle_of_a_run_has_its_model_and_its_averaged_weights(tmp_path: Path, base: Path, name: str) -> None:
    if name == "shrunk":
        pytest.importorskip("torch_pruning")
    run = tmp_path / "run"
    assert invoke(tmp_path, *TRAIN_TINY, "--start", base, *RUNS[name]).code == 0
    told = last_json(invoke(tmp_path, "export", "run", "--json"))
    bundle, journal = bf.Bundle.load(tmp_path / "client.zip"), bf.Journal.open(run)
    assert told["parameters"] == len(bundle.initial)
    assert bundle.manifest.table == journal.config.table
    assert bundle.manifest.frozen == journal.config.plan.get("frozen", "")
    state = journal.state()
    assert (bundle.initial == state.ema_weights).all()
    assert (bundle.initial != state.weights).any()
    _, test = bf.load("digits")
    found = bf.OrtRuntime(bundle, 1).evaluate(bundle.initial, test)
    assert float(found.losses.mean()) == pytest.approx(metrics(run)[-1]["loss"], rel=1e-4)


def test_a_runs_model_is_frozen_or_pruned_further_on_export(tmp_path: Path, base: Path) -> None:
    told = last_json(invoke(tmp_path, "export", base, "--precision", "int8", "--trainable", "head", "--json"))
    assert told["parameters"] == 130
    bundle, average = bf.Bundle.load(tmp_path / "client.zip"), bf.Journal.open(base).state().ema_weights
    assert (bundle.initial == average[-130:]).all()
    assert invoke(tmp_path, *TRAIN_TINY, "--prune", "0.5").code == 0
    assert invoke(tmp_path, "export", "run", "--prune", "0.8").code == 0
    before = {spec.name: spec.mask for spec in bf.Journal.open(tmp_path / "run").config.table}
    zeros = 0
    for spec in bf.Bundle.load(tmp_path / "client.zip").manifest.table:
        mask, earlier = spec.mask, before[spec.name]
        if mask is not None and earlier is not None:
            assert not (mask & ~earlier).any()  # what was pruned stays so
            zeros += int((~mask).sum())
    assert zeros == math.floor(0.8 * 888)
    assert last_json(invoke(tmp_path, "export", "run", "--trainable", "head", "--json"))["parameters"] == 130
    assert invoke(tmp_path, *TRAIN_TINY, "--trainable", "head", "--out", "head").code == 0
    assert last_json(invoke(tmp_path, "export", "head", "--trainable", "all", "--json"))["parameters"] == 910


BAD_EXPORTS: dict[str, tuple[tuple[str, ...], str]] = {
    "no model": ((), "Missing argument 'MODEL' (see --help)"),
    "unknown model": (("nosuch",), "model = 'nosuch': expected one of lenet, lenet-small, wrn-10-2, mlp, transformer"),
    "no module": (("nosuch:build",), "model = 'nosuch:build': expected an importable package.module:builder ..."),
    "to another": (("tiny_model:build", "--to", "coreml"), "to = 'coreml': expected one of onnx"),
    "bf16": (
        ("tiny_model:build", "--precision", "bf16"),
        "precision = 'bf16': expected one of fp32, fp16, int8-weights, int8 (did you mean fp16?)",
    ),
    "fp16 branches": (
        ("tiny_model:build", "--precision", "fp16", "--branches"),
        "branches with precision fp16: expected fp32, int8-weights or int8",
    ),
    "pruned branches": (
        ("tiny_model:build", "--prune", "0.5", "--branches"),
        "branches: no trainable linear layer ...",
    ),
    "trainable": (("tiny_model:build", "--trainable", "x"), "trainable = 'x': expected all, head, scales, ..."),
    "a file's place": (("tiny_model:build", "--out", "file/c.zip"), "file/c.zip: cannot be written: ..."),
    "a folder": (("tiny_model:build", "--out", "empty"), "empty: cannot be written: Is a directory"),
    "no run": (("empty",), "empty: no config.json: expected the folder of a run"),
    "dataset": (("tiny_model:build", "--dataset", "digit"), "dataset = 'digit': expected one of ..."),
    "start of a run": (
        ("run", "--start", "run"),
        "start = 'run': expected none with the folder of a run, which has its own",
    ),
    "activation of a run": (
        ("run", "--activation", "relu"),
        "activation = 'relu': expected none with the folder of a run, which has its own",
    ),
}


@pytest.mark.parametrize("name", BAD_EXPORTS)
def test_export_refuses_in_one_line_and_writes_nothing(tmp_path: Path, base: Path, name: str) -> None:
    flags, line = BAD_EXPORTS[name]
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    copy_run(base, tmp_path / "run")
    before = tree(tmp_path)
    refused_with(invoke(tmp_path, "export", *flags), line)
    assert tree(tmp_path) == before


def test_a_full_disk_leaves_the_old_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "client.zip").write_text("the old one")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    refused_with(
        invoke(tmp_path, "export", "tiny_model:build"), "client.zip: cannot be written: No space left on device"
    )
    assert tree(tmp_path) == [str(tmp_path / "client.zip")]
    assert (tmp_path / "client.zip").read_text() == "the old one"


def test_a_run_of_the_library_or_the_baseline_cannot_be_exported(tmp_path: Path) -> None:
    from helpers import train_digits

    train_digits(tmp_path / "library", 1)
    refused_with(invoke(tmp_path, "export", "library"), "run = 'library': expected a run of 'baffle train'; ...")
    assert invoke(tmp_path, *TRAIN_TINY, "--backprop", "fedsgd").code == 0
    refused_with(invoke(tmp_path, "export", "run"), "run: a backpropagation baseline (fedsgd) has no journal")
