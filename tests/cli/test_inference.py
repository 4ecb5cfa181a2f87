"""Commands about clients that only infer: export, calibrate, and training by other runtimes, precisions and parts."""

from __future__ import annotations

import json
import math
import re
import shutil
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.numpy import load_file
from safetensors.torch import save_file
from torch import Tensor, nn

import baffle as bf
from baffle.client.calibrate import DIRECTIONS, LADDER
from baffle.errors import MissingExtraError, OptionError
from baffle.models import build
from baffle.runtimes import choose as choosing
from baffle.training import build as assemble
from baffle.training.options import TrainConfig
from helpers import Outcome, copy_run, invoke, places, tree

TINY = '''
"""A perceptron of 910 parameters."""

from torch import nn


def build(shape: tuple[int, ...], classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.Hardswish(), nn.Linear(12, classes))


def wide(shape: tuple[int, ...], classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 13), nn.Hardswish(), nn.Linear(13, classes))
'''
MODEL = ("--model", "tiny_model:build")
SMALL = (
    *(*MODEL, "--clients", "2", "--batch-size", "8", "--num-directions", "4", "--rounds", "4", "--threads", "1"),
    *("--evaluate-every", "2", "--snapshot-every", "2", "--lr", "0.05", "--ema", "0.5"),
)
TRAIN = ("train", *SMALL, "--json", "--out", "run")
SHAPES = {"1.weight": [12, 64], "1.bias": [12], "3.weight": [10, 12], "3.bias": [10]}


def last_json(outcome: Outcome) -> dict[str, Any]:
    assert outcome.code == 0, outcome.err
    result: dict[str, Any] = json.loads(outcome.out.splitlines()[-1])
    return result


def refused(outcome: Outcome, line: str) -> None:
    """Exit code 2, nothing on stdout, and this one line on stderr; "..." stands for anything."""
    assert (outcome.code, outcome.out) == (2, ""), outcome
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("\n") == 1, outcome.err
    told = outcome.err.removeprefix("error: ").rstrip("\n")
    assert re.fullmatch(".*".join(map(re.escape, line.split("..."))), told), told


def config(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "config.json").read_text())
    return found


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def cut(run: Path, row: int) -> None:
    """Leave rows before ``row``, and half of it."""
    at = places(run)[row]
    with (run / "rows.bin").open("r+b") as file:
        file.truncate((at.start + at.end) // 2)


@pytest.fixture(scope="module", autouse=True)
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A model of the user's own, where Python finds it."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "tiny_model.py").write_text(TINY)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield


@pytest.fixture(scope="module", autouse=True)
def exports() -> Iterator[dict[Any, bf.Bundle]]:
    """A model that was exported once is not exported again, which takes a second; tests may empty this."""
    from baffle import exporter

    made: dict[Any, bf.Bundle] = {}
    real = exporter.export

    def export(model: nn.Module, loss: Any, data: bf.Dataset, **options: Any) -> bf.Bundle:
        weights = [(n, p.requires_grad, p.detach().numpy().tobytes()) for n, p in model.named_parameters()]
        masks = {name: mask.tobytes() for name, mask in (options.get("masks") or {}).items()}
        key = repr((model, weights, options | {"masks": masks}))
        if key not in made:
            made[key] = real(model, loss, data, **options)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporter, "export", export)
        yield made


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run to start from. Never changed."""
    folder = tmp_path_factory.mktemp("base")
    assert invoke(folder, *TRAIN, "--out", "base").code == 0
    return folder / "base"


# --- train


class Variant:
    """Flags of a run, how many tensors it trains, and whether it is also evaluated and reported from its folder."""

    def __init__(self, *flags: str, tensors: int = 4, reads: bool = False) -> None:
        self.flags, self.tensors, self.reads = flags, tensors, reads


ORT = ("--runtime", "ort")
INT8 = (*ORT, "--precision", "int8")
VARIANTS = {
    "sigma": Variant("--sigma", "0.01"),
    "bf16": Variant("--precision", "bf16"),
    "lattice": Variant("--lattice", "4", reads=True),
    "fp32": Variant(*ORT, "--local-steps", "2", "--local-lr", "0.05"),
    "fp16": Variant(*ORT, "--precision", "fp16", "--sigma", "0.02"),
    "int8": Variant(*INT8, reads=True),
    "int8 weights": Variant(*ORT, "--precision", "int8-weights", "--lattice", "4"),
    "branches": Variant(*INT8, "--branches", "--sharing", "per-client"),
    "openvino": Variant("--runtime", "openvino", "--sigma", "1e-3"),
    "pruned": Variant("--prune", "0.8", reads=True),
    "pruned by inputs": Variant(*INT8, "--prune", "0.5", "--prune-by", "inputs"),
    "shrunk": Variant("--prune", "0.5", "--prune-by", "channels", reads=True),
    "from a run": Variant("--start", "base"),
    "head": Variant(*INT8, "--start", "base", "--trainable", "head", tensors=2, reads=True),
    "scales": Variant("--trainable", "scales", "--start", "base", reads=True),
    "pattern": Variant("--trainable", "*.bias", "--prune", "0.3", tensors=2),
}
RESULTS = ("weights_sha256", "accuracy", "loss", "rounds", "updates", "sigma", "lattice", "parameters")


@pytest.mark.parametrize("name", VARIANTS)
def test_a_run_is_resumed_to_the_undisturbed_weights_and_replayed_without_exporting(
    tmp_path: Path, base: Path, exports: dict[Any, bf.Bundle], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    variant, run = VARIANTS[name], tmp_path / "run"
    if "openvino" in variant.flags:
        pytest.importorskip("openvino")
    if "channels" in variant.flags:
        pytest.importorskip("torch_pruning")
    if "--start" in variant.flags:
        copy_run(base, tmp_path / "base")
    undisturbed = last_json(invoke(tmp_path, *TRAIN, *variant.flags))
    assert undisturbed["updates"] == 4
    assert len(config(run)["table"]) == variant.tensors
    command = config(run)["command"]
    for flag, value in zip(variant.flags, (*variant.flags[1:], "--"), strict=True):
        if flag.startswith("--") and flag not in ("--start", "--sigma"):
            assert str(command[flag[2:].replace("-", "_")]) == ("True" if value.startswith("--") else value)
    given = float(variant.flags[variant.flags.index("--sigma") + 1]) if "--sigma" in variant.flags else None
    assert command["sigma"] == (given or "auto")
    assert {m["sigma"] for m in metrics(run)} == {given or undisturbed["sigma"]}
    precise = command["precision"] == "fp32" and not command["lattice"]
    assert undisturbed["difference"] == ("forward" if precise else "central")
    if given is None and not command["lattice"]:
        assert undisturbed["sigma"] in LADDER
    plan = config(run)["plan"]
    assert (plan["runtime"], plan["precision"]) == (command["runtime"], command["precision"])
    assert ("frozen" in plan) == (command["trainable"] != "all")

    cut(run, 3)
    if name == "int8":
        exports.clear()
    resumed = last_json(invoke(tmp_path, "resume", "run", "--json"))
    assert [resumed[name] for name in RESULTS] == [undisturbed[name] for name in RESULTS]
    if variant.reads:
        tested = last_json(invoke(tmp_path, "evaluate", "run", "--json"))
        assert (tested["accuracy"], tested["loss"]) == (undisturbed["accuracy"], undisturbed["loss"])
        monkeypatch.setattr("baffle.report.pages.draw", lambda chart: b"")
        assert last_json(invoke(tmp_path, "report", "run", "--json"))["weights_sha256"] == undisturbed["weights_sha256"]

    monkeypatch.setattr("baffle.training.build.assemble", None)  # who calls it, fails
    monkeypatch.setattr("baffle.cli.runs.assemble", None)
    monkeypatch.setitem(sys.modules, "baffle.exporter", None)
    assert invoke(tmp_path, "replay", "run").out.split() == [undisturbed["weights_sha256"]]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("fastest", ["copies", "stacked", "openvino"])
def test_runtime_auto_takes_the_fastest_and_keeps_to_it(
    tmp_path: Path, fastest: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    openvino = pytest.importorskip("openvino")
    if precision.upper() not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        precision = "fp32"

    def seconds(runtime: Any, *arguments: object) -> float:
        return 1.0 if fastest in (runtime.plan["runtime"], runtime.plan.get("strategy")) else 1.01

    monkeypatch.setattr(choosing, "seconds_of", seconds)
    flags = ("--runtime", "auto", "--precision", precision, "--sigma", "0.01")
    outcome = invoke(tmp_path, *TRAIN, *flags)
    summary = last_json(outcome)
    [told] = [line for line in outcome.err.splitlines() if line.startswith("plan: ")]
    assert re.fullmatch(rf"plan: {fastest} \(passes a second: copies .*, stacked .*, openvino .*\)", told)
    recorded, command = config(tmp_path / "run")["plan"], config(tmp_path / "run")["command"]
    assert (recorded["runtime"], recorded["precision"]) == (
        "openvino" if fastest == "openvino" else "torch",
        precision,
    )
    assert recorded.get("strategy", "openvino") == fastest
    assert (command["runtime"], command["strategy"]) == ("auto", "auto")

    def measured(*arguments: object) -> float:
        raise AssertionError("measured")

    monkeypatch.setattr(choosing, "seconds_of", measured)
    cut(tmp_path / "run", 2)
    resumed = invoke(tmp_path, "resume", "run", "--json")
    assert last_json(resumed)["weights_sha256"] == summary["weights_sha256"]
    assert "plan: " not in resumed.err
    assert last_json(invoke(tmp_path, "evaluate", "run", "--json"))["loss"] == summary["loss"]
    assert invoke(tmp_path, "replay", "run").out.split() == [summary["weights_sha256"]]


def test_runtime_auto_does_without_an_engine_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assemble, "load_runtime", missing)
    (tmp_path / "options.toml").write_text('runtime = "auto"\n')
    outcome = invoke(tmp_path, "train", "options.toml", *TRAIN[1:], "--rounds", "1")
    assert last_json(outcome)["rounds"] == 1
    assert config(tmp_path / "run")["plan"]["runtime"] == "torch"
    [told] = [line for line in outcome.err.splitlines() if line.startswith("plan: ")]
    assert "openvino" not in told


def missing(*arguments: object) -> None:
    raise MissingExtraError("OpenVINO is not installed: pip install 'baffle[openvino]'")


def test_a_server_is_told_its_runtime(tmp_path: Path) -> None:
    line = "runtime = 'auto': expected torch, ort or openvino: it is the clients that would have to measure"
    with pytest.raises(OptionError, match=re.escape(line)):
        assemble.assemble_server(TrainConfig(runtime="auto"))
    (tmp_path / "options.toml").write_text('runtime = "auto"\n')
    before = tree(tmp_path)
    refused(invoke(tmp_path, "up", "options.toml", "--out", "run"), line)
    assert tree(tmp_path) == before


def test_a_measured_sigma_costs_passes_and_equals_one_that_is_given(tmp_path: Path) -> None:
    measured = last_json(invoke(tmp_path, *TRAIN, "--sigma", "auto"))
    same = last_json(invoke(tmp_path, *TRAIN, "--sigma", str(measured["sigma"]), "--out", "given"))
    assert same["weights_sha256"] == measured["weights_sha256"]
    assert measured["forward_passes"] - same["forward_passes"] == len(LADDER) * (DIRECTIONS + 1)
    (tmp_path / "auto.toml").write_text('sigma = "auto"')
    (tmp_path / "given.toml").write_text(f"sigma = {measured['sigma']}")
    for name in ("auto", "given"):
        by_file = last_json(invoke(tmp_path, "train", f"{name}.toml", *SMALL, "--json", "--out", f"{name} by file"))
        assert by_file["weights_sha256"] == measured["weights_sha256"]
        assert config(tmp_path / f"{name} by file")["command"]["sigma"] == {"auto": "auto"}.get(name, same["sigma"])
    flags_win = last_json(invoke(tmp_path, "train", "auto.toml", *SMALL, "--json", "--out", "won", "--sigma", "0.5"))
    assert flags_win["sigma"] == 0.5


@pytest.mark.parametrize("by", ["magnitude", "inputs"])
def test_pruned_weights_stay_zero_and_the_folder_says_which(tmp_path: Path, by: str) -> None:
    invoke(tmp_path, *TRAIN, "--prune", "0.8", "--prune-by", by)
    journal, final = bf.Journal.open(tmp_path / "run"), load_file(tmp_path / "run/model.safetensors")
    zeros = 0
    for spec in journal.config.table:
        if spec.mask is not None:
            assert (final[spec.name].reshape(-1)[~spec.mask] == 0).all()
            assert (final[spec.name].reshape(-1)[spec.mask] != 0).mean() > 0.9
            zeros += int((~spec.mask).sum())
    assert zeros == math.floor(0.8 * (64 * 12 + 12 * 10))


def test_shrinking_makes_a_smaller_model(tmp_path: Path) -> None:
    pytest.importorskip("torch_pruning")
    summary = last_json(invoke(tmp_path, *TRAIN, "--prune", "0.5", "--prune-by", "channels"))
    assert summary["parameters"] == 64 * 6 + 6 + 6 * 10 + 10
    shapes = {name: list(array.shape) for name, array in load_file(tmp_path / "run/model.safetensors").items()}
    assert shapes == {"1.weight": [6, 64], "1.bias": [6], "3.weight": [10, 6], "3.bias": [10]}


def test_resume_refuses_frozen_parameters_that_have_changed(tmp_path: Path, base: Path) -> None:
    copy_run(base, tmp_path / "base")
    flags = ("--start", "base", "--trainable", "head")
    assert invoke(tmp_path, *TRAIN, *flags).code == 0
    shutil.rmtree(tmp_path / "base")
    refused(invoke(tmp_path, "resume", "run"), "...base: expected a run folder or a .safetensors file (No such file...")
    assert invoke(tmp_path, *TRAIN, "--seed", "1", "--out", "base").code == 0
    before = tree(tmp_path)
    refused(
        invoke(tmp_path, "resume", "run"),
        "run: the frozen parameters differ from those of the run: expected the same model",
    )
    refused(invoke(tmp_path, "export", "run"), "run: the run trained another model than its options make now")
    assert tree(tmp_path) == before
    assert invoke(tmp_path, "replay", "run").code == 0


# --- fine-tuning learns


def examples(data: bf.Dataset) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(np.array(data.inputs())), torch.from_numpy(np.array(data.y))


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A perceptron after 60 plain steps: without its head, and with rows stretched at random."""
    folder = tmp_path_factory.mktemp("pretrained")
    train, test = bf.load("digits")
    (x, y), random = examples(train), torch.Generator().manual_seed(0)
    model = build("mlp", (1, 8, 8), 10)
    optimizer = torch.optim.Adam(model.parameters(), 0.005)
    for _ in range(60):
        batch = torch.randint(len(x), (64,), generator=random)
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()  # type: ignore[no-untyped-call]  # torch's own
        optimizer.step()
    x, y = examples(test)
    with torch.no_grad():
        assert float((model(x).argmax(1) == y).float().mean()) > 0.9
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    save_file({name: t for name, t in state.items() if not name.startswith("7.")}, folder / "backbone.safetensors")
    other = torch.Generator().manual_seed(1)
    stretched = {
        name: t * torch.exp(torch.randn((len(t), 1), generator=other)) if t.ndim == 2 else t
        for name, t in state.items()
    }
    save_file(stretched, folder / "stretched.safetensors")
    return folder


FINE_TUNING: dict[str, tuple[tuple[str, ...], float, float]] = {
    "head": (("--start", "backbone.safetensors", "--trainable", "head", "--seed", "3", *INT8), 0.25, 0.85),
    "scales": (("--start", "stretched.safetensors", "--trainable", "scales"), 0.7, 0.82),
    "int8 scales": (("--start", "stretched.safetensors", "--trainable", "scales", *INT8), 0.7, 0.82),
}


@pytest.mark.parametrize("name", FINE_TUNING)
def test_fine_tuning_a_part_brings_the_accuracy_back(pretrained: Path, tmp_path: Path, name: str) -> None:
    flags, before, after = FINE_TUNING[name]
    options = (
        *("--model", "mlp", "--clients", "4", "--batch-size", "16", "--threads", "1", "--num-directions", "40"),
        *("--rounds", "60", "--lr", "0.05", "--ema", "0.9", "--evaluate-every", "60"),
    )
    summary = last_json(invoke(pretrained, "train", *options, *flags, "--json", "--out", tmp_path / "run"))
    assert metrics(tmp_path / "run")[0]["accuracy"] < before
    assert summary["accuracy"] > after
    assert summary["parameters"] == (650 if name == "head" else 2 * (200 + 64 + 10))


# --- where a run starts


def tensors(**changes: Tensor | None) -> dict[str, Tensor]:
    """Weights of the model by name, with changes; ``_`` is a dot there."""
    random = torch.Generator().manual_seed(0)
    mine: dict[str, Tensor | None] = {
        name: torch.randn(shape, generator=random) * 0.1 for name, shape in SHAPES.items()
    }
    mine |= {name.strip("_").replace("_", "."): tensor for name, tensor in changes.items()}
    return {name: tensor for name, tensor in mine.items() if tensor is not None}


def initial(run: Path) -> dict[str, Any]:
    return load_file(run / "initial.safetensors")


def test_a_run_starts_from_the_average_of_another(tmp_path: Path, base: Path) -> None:
    assert invoke(tmp_path, *TRAIN, "--start", base).code == 0
    journal = bf.Journal.open(base)
    average = journal.state().ema_weights
    assert (average != journal.state().weights).any()
    for spec in journal.config.table:
        assert (initial(tmp_path / "run")[spec.name].reshape(-1) == average[spec.slice]).all()
    assert config(tmp_path / "run")["command"]["start"] == str(base)


def test_a_run_starts_from_one_that_trained_a_part(tmp_path: Path, base: Path) -> None:
    """The tensors that were frozen are not in its rows, but they are part of the model."""
    assert invoke(tmp_path, *TRAIN, "--start", base, "--trainable", "head", "--out", "head").code == 0
    assert invoke(tmp_path, *TRAIN, "--start", "head").code == 0
    found, before, head = (initial(tmp_path / "run"), load_file(base / "model.safetensors"), tmp_path / "head")
    for name in ("1.weight", "1.bias"):
        assert (found[name] == before[name]).all()
    for name, array in load_file(head / "model.safetensors").items():
        assert (found[name] == array).all()
        assert (found[name] != before[name]).any()


STARTS: dict[str, tuple[dict[str, Tensor], str | None, set[str]]] = {
    "all": (tensors(), None, set()),
    "more": (tensors(other=torch.zeros(3)), None, set()),
    "bfloat16": ({n: t.bfloat16() for n, t in tensors().items()}, None, set()),
    "another head": (tensors(_3_weight=torch.ones(7, 12), _3_bias=torch.ones(7)), None, {"3.weight", "3.bias"}),
    "no head": (tensors(_3_weight=None, _3_bias=None), None, {"3.weight", "3.bias"}),
    "missing": (
        tensors(_1_bias=None),
        "x.safetensors: 1.bias: no such tensor: expected [12], as the model has it",
        set(),
    ),
    "another shape": (
        tensors(_1_weight=torch.ones(12, 63)),
        "x.safetensors: 1.weight: shape [12, 63]: expected [12, 64], as the model has it",
        set(),
    ),
    "a head of other inputs": (
        tensors(_3_weight=torch.ones(10, 13)),
        "x.safetensors: 3.weight: shape [10, 13]: expected [10, 12], as the model has it",
        set(),
    ),
    "nothing of it": (
        {"a": torch.ones(3)},
        "x.safetensors: no tensor of the model: expected 1.weight, 1.bias, 3.weight, 3.bias, ...",
        set(),
    ),
    "NaN": (
        tensors(_1_bias=torch.full((12,), torch.nan)),
        "x.safetensors: 1.bias: found NaN or infinity: expected finite numbers",
        set(),
    ),
}


@pytest.mark.parametrize("name", STARTS)
def test_a_run_starts_from_a_file_of_tensors_that_fit(tmp_path: Path, name: str) -> None:
    given, line, kept = STARTS[name]
    save_file(given, tmp_path / "x.safetensors")
    before = tree(tmp_path)
    outcome = invoke(tmp_path, *TRAIN, "--rounds", "1", "--start", "x.safetensors")
    if line is not None:
        refused(outcome, line)
        assert tree(tmp_path) == before
        return
    assert outcome.code == 0, outcome.err
    found, plain = initial(tmp_path / "run"), build("tiny_model:build", (1, 8, 8), 10).state_dict()
    for tensor in SHAPES:
        expected = plain[tensor] if tensor in kept else given[tensor].float()
        assert (found[tensor] == expected.numpy()).all(), tensor


@pytest.mark.parametrize(
    ("start", "line"),
    [
        ("missing", "missing: expected a run folder or a .safetensors file (No such file or directory: ..."),
        ("text", "text: expected a run folder or a .safetensors file (Error while deserializing header: ..."),
        ("empty", "empty: no config.json: expected the folder of a run"),
        ("wide", "wide: 1.weight: shape [13, 64]: expected [12, 64], as the model has it"),
    ],
)
def test_a_start_that_is_none_is_one_line(tmp_path: Path, start: str, line: str) -> None:
    (tmp_path / "text").write_text("hello")
    (tmp_path / "empty").mkdir()
    assert invoke(tmp_path, *TRAIN, "--model", "tiny_model:wide", "--rounds", "1", "--out", "wide").code == 0
    before = tree(tmp_path)
    refused(invoke(tmp_path, *TRAIN, "--start", start), line)
    assert tree(tmp_path) == before


def test_buffers_come_with_the_file(tmp_path: Path) -> None:
    """A frozen backbone has statistics that are no parameters."""
    layers = "nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, classes)"
    text = f"from torch import nn\n\ndef build(shape, classes):\n    return nn.Sequential({layers}).eval()\n"
    (tmp_path / "normed_model.py").write_text(text)
    state = {
        "1.weight": torch.ones(64),
        "1.bias": torch.zeros(64),
        "1.running_mean": torch.full((64,), 0.25),
        "1.running_var": torch.full((64,), 4.0),
        "2.weight": torch.randn((10, 64), generator=torch.Generator().manual_seed(0)),
        "2.bias": torch.zeros(10),
    }
    save_file(state, tmp_path / "x.safetensors")
    options = ("--model", "normed_model:build", "--start", "x.safetensors", "--trainable", "head")
    assert invoke(tmp_path, *TRAIN, *options, "--rounds", "1").code == 0
    x, y = examples(bf.load("digits")[1])
    outputs = ((x.flatten(1) - 0.25) / math.sqrt(4 + 1e-5)) @ state["2.weight"].T
    assert metrics(tmp_path / "run")[0]["loss"] == pytest.approx(float(F.cross_entropy(outputs, y)), rel=1e-4)


# --- what contradicts itself

CONTRADICTIONS: dict[str, tuple[tuple[str, ...], str]] = {
    "runtime": (("--runtime", "tflite"), "runtime = 'tflite': expected one of auto, torch, ort, openvino"),
    "int8 by torch": (("--precision", "int8"), "precision = 'int8': expected one of fp32, bf16, fp16"),
    "bf16 by ort": (
        (*ORT, "--precision", "bf16"),
        "precision = 'bf16': expected one of fp32, fp16, int8-weights, int8 (did you mean fp16?)",
    ),
    "int8 by whichever is faster": (
        ("--runtime", "auto", "--precision", "int8"),
        "precision = 'int8': expected one of fp32, bf16, fp16",
    ),
    "branches by whichever is faster": (
        ("--runtime", "auto", "--branches"),
        "branches = True: expected runtime ort or openvino: torch perturbs weights in float",
    ),
    "branches by torch": (
        ("--branches",),
        "branches = True: expected runtime ort or openvino: torch perturbs weights in float",
    ),
    "gaussian branches": (
        (*ORT, "--branches", "--family", "gaussian"),
        "branches = True: expected family rank1, not gaussian",
    ),
    "branches in fp16": (
        (*ORT, "--branches", "--precision", "fp16"),
        "branches with precision fp16: expected fp32, int8-weights or int8",
    ),
    "pruned branches": (
        (*ORT, "--branches", "--prune", "0.5"),
        "branches: no trainable linear layer or convolution (of one group, not pruned): expected at least one",
    ),
    "lattice": (("--lattice", "9"), "lattice = 9: expected an integer >= 0 and <= 8"),
    "gaussian lattice": (("--lattice", "2", "--family", "gaussian"), "lattice = 2 with family 'gaussian', ..."),
    "local steps on the lattice": (
        ("--lattice", "2", "--local-steps", "2", "--local-lr", "0.1"),
        "lattice = 2 with family 'rank1', local_steps = 2: ...",
    ),
    "sigma": (("--sigma", "nonsense"), "sigma = 'nonsense': expected a number > 0, or auto"),
    "no sigma": (("--sigma", ""), "sigma = '': expected a number > 0, or auto"),
    "sigma 0": (("--sigma", "0"), "sigma = 0.0: expected a finite number > 0"),
    "prune all": (("--prune", "1"), "prune = 1.0: expected a number >= 0 and < 1"),
    "prune nearly all": (("--prune", "0.9999"), "prune = 0.9999: expected at most 0.997748: 2 tensors keep one each"),
    "prune less than nothing": (("--prune", "-0.1"), "prune = -0.1: expected a number >= 0 and < 1"),
    "prune by chance": (
        ("--prune", "0.5", "--prune-by", "chance"),
        "prune_by = 'chance': expected one of magnitude, inputs, channels (did you mean channels?)",
    ),
    "prune nothing by inputs": (("--prune-by", "inputs"), "prune_by = 'inputs': expected prune > 0 with it"),
    "trainable": (
        ("--trainable", "conv*"),
        "trainable = 'conv*': expected all, head, scales, or a pattern of parameter names (1.weight, 1.bias, ...",
    ),
    "int8 with nothing frozen to quantise": (
        (*INT8, "--trainable", "*.weight"),
        "int8: no convolution and no linear layer to quantise among the frozen ones",
    ),
    **{
        f"backprop with {flags[-1]}": (
            ("--backprop", "fedsgd", *flags),
            f"{option} = {value!r}: expected none with backprop fedsgd, which is dense and in float32, by PyTorch",
        )
        for option, value, flags in (
            ("runtime", "ort", ORT),
            ("runtime", "auto", ("--runtime", "auto")),
            ("runtime", "ort", (*ORT, "--branches")),
            ("precision", "bf16", ("--precision", "bf16")),
            ("lattice", 2, ("--lattice", "2")),
            ("prune", 0.5, ("--prune", "0.5")),
        )
    },
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_what_contradicts_itself_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    flags, line = CONTRADICTIONS[name]
    refused(invoke(tmp_path, *TRAIN, *flags), line)
    assert tree(tmp_path) == []


def test_the_baseline_trains_smaller_models_and_parts_of_them(tmp_path: Path) -> None:
    pytest.importorskip("torch_pruning")
    flags = ("--backprop", "fedsgd", "--prune", "0.5", "--prune-by", "channels", "--trainable", "head")
    assert last_json(invoke(tmp_path, *TRAIN, *flags))["parameters"] == 70


def test_a_precision_that_this_processor_has_not_is_refused(tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    has = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    for precision in ("bf16", "fp16"):
        options = ("--runtime", "openvino", "--precision", precision, "--rounds", "1", "--sigma", "0.02")
        outcome = invoke(tmp_path, *TRAIN, *options, "--out", precision)
        if precision.upper() in has:
            assert last_json(outcome)["rounds"] == 1
        else:
            refused(outcome, f"precision = '{precision}': expected one that this processor has: ...")
            assert not (tmp_path / precision).exists()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('sigma = "nonsense"', "sigma = 'nonsense': expected a number > 0, or auto"),
        ("sigma = true", "sigma = True: expected a number > 0, or auto"),
        ("sigma = -1", "sigma = -1.0: expected a finite number > 0"),
        ("lattice = 2.5", "lattice = 2.5: expected `int`, got `float`"),
        ('prune = "half"', "prune = 'half': expected `float`, got `str`"),
        ('branches = "yes"', "branches = 'yes': expected `bool`, got `str`"),
        ('runtime = "tflite"', "runtime = 'tflite': expected one of auto, torch, ort, openvino"),
        ("trainable = 3", "trainable = 3: expected `str`, got `int`"),
        ('prune-by = "channels"', "prune_by = 'channels': expected prune > 0 with it"),
    ],
)
def test_a_toml_file_is_held_to_the_same_rules(tmp_path: Path, text: str, line: str) -> None:
    (tmp_path / "options.toml").write_text(text)
    before = tree(tmp_path)
    refused(invoke(tmp_path, "train", "options.toml", *SMALL, "--out", "run"), line)
    refused(invoke(tmp_path, "calibrate", "options.toml", *MODEL), line)
    assert tree(tmp_path) == before


# --- export

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
    refused(invoke(tmp_path, "export", "./mlp"), "mlp: no config.json: expected the folder of a run")


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
    assert invoke(tmp_path, *TRAIN, "--start", base, *RUNS[name]).code == 0
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
    assert invoke(tmp_path, *TRAIN, "--prune", "0.5").code == 0
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
    assert invoke(tmp_path, *TRAIN, "--trainable", "head", "--out", "head").code == 0
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
    refused(invoke(tmp_path, "export", *flags), line)
    assert tree(tmp_path) == before


def test_a_full_disk_leaves_the_old_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "client.zip").write_text("the old one")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    refused(invoke(tmp_path, "export", "tiny_model:build"), "client.zip: cannot be written: No space left on device")
    assert tree(tmp_path) == [str(tmp_path / "client.zip")]
    assert (tmp_path / "client.zip").read_text() == "the old one"


def test_a_run_of_the_library_or_the_baseline_cannot_be_exported(tmp_path: Path) -> None:
    from helpers import train_digits

    train_digits(tmp_path / "library", 1)
    refused(invoke(tmp_path, "export", "library"), "run = 'library': expected a run of 'baffle train'; ...")
    assert invoke(tmp_path, *TRAIN, "--backprop", "fedsgd").code == 0
    refused(invoke(tmp_path, "export", "run"), "run: a baseline of true gradients (fedsgd) has no journal")


# --- calibrate

FEW = ("--num-directions", "8", "--batch-size", "32")
POINT = {"sigma", "correlation", "slope", "noise", "error", "lattice", "guess"}


def test_the_guessed_sigma_of_a_perceptron_gives_the_derivative(tmp_path: Path) -> None:
    found = last_json(invoke(tmp_path, "calibrate", "--model", "mlp", "--json"))
    assert {k: v for k, v in found.items() if k not in ("points", "sigma", "autograd_correlation")} == {
        "model": "mlp",
        "dataset": "digits",
        "runtime": "torch",
        "precision": "fp32",
        "branches": False,
        "family": "rank1",
        "difference": "forward",
        "batch_size": 64,
        "num_directions": 64,
    }
    assert found["autograd_correlation"] > 0.999999
    assert [point["sigma"] for point in found["points"]] == list(LADDER)
    assert all(point.keys() == POINT for point in found["points"])
    [chosen] = [point for point in found["points"] if point["sigma"] == found["sigma"]]
    assert chosen["correlation"] >= 0.97
    assert chosen["slope"] == pytest.approx(1, abs=0.05)
    assert chosen["guess"] < 0.15
    for point in found["points"]:  # the guess is of the size of the true error
        assert point["error"] / 10 < point["guess"] < 10 * point["error"]


def test_calibrate_prints_a_table_and_says_which_to_use(tmp_path: Path) -> None:
    outcome = invoke(tmp_path, "calibrate", *MODEL, *FEW)
    assert (outcome.code, outcome.err) == (0, "")
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in outcome.out.splitlines() if "│" in line]
    assert [float(row[0]) for row in rows] == list(LADDER)
    assert all(-1 <= float(row[1]) <= 1 for row in rows)
    assert [row[-1] for row in rows].count("use this") == 1
    assert outcome.out.splitlines()[-1] == "float64 differences against autograd: correlation 1.000000"
    for words in ("correlation", "slope", "noise", "guess", "tiny_model:build on digits", "8 directions, 32"):
        assert words in outcome.out


@pytest.mark.parametrize("lattice", [(), ("--lattice", "1")])
def test_calibrate_draws_a_picture(tmp_path: Path, lattice: tuple[str, ...]) -> None:
    pytest.importorskip("matplotlib")
    outcome = invoke(tmp_path, "calibrate", *MODEL, *FEW, *lattice, "--plot", "new/sigma.png")
    assert outcome.code == 0, outcome.err
    assert outcome.out.splitlines()[-1] == "picture: new/sigma.png"
    data = (tmp_path / "new/sigma.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    assert data.endswith(b"IEND\xaeB`\x82")
    assert min(struct.unpack_from(">II", data, 16)) >= 100
    assert len(data) > 5000
    told = last_json(invoke(tmp_path, "calibrate", *MODEL, *FEW, *lattice, "--plot", "b.png", "--json"))
    assert told["plot"] == "b.png"
    assert len(tree(tmp_path)) == 3


def test_calibrate_on_the_lattice_tries_numbers_of_codes(tmp_path: Path) -> None:
    found = last_json(invoke(tmp_path, "calibrate", *MODEL, *FEW, *INT8, "--lattice", "3", "--json"))
    assert found["difference"] == "central"
    assert [point["lattice"] for point in found["points"]] == [1, 2, 4, 8]
    sigmas = [point["sigma"] for point in found["points"]]
    assert sigmas == pytest.approx([sigmas[0] * m for m in (1, 2, 4, 8)])
    best = max(found["points"], key=lambda point: point["correlation"])
    assert found["sigma"] == best["sigma"]
    assert best["correlation"] > 0.9


CALIBRATIONS: dict[str, tuple[tuple[str, ...], float]] = {
    "mlp int8": (("--model", "mlp", *INT8, "--num-directions", "32"), 0.9),
    "branches": ((*MODEL, *FEW, *INT8, "--branches"), 0.9),
    "openvino": ((*MODEL, *FEW, "--runtime", "openvino"), 0.97),
    "pruned head": ((*MODEL, *FEW, "--prune", "0.5", "--trainable", "head"), 0.97),
    "pruned": ((*MODEL, *FEW, *ORT, "--prune", "0.5"), 0.97),
    "gaussian": ((*MODEL, *FEW, "--family", "gaussian", "--difference", "central"), 0.97),
    "int8 scales": ((*MODEL, *FEW, *INT8, "--trainable", "scales"), 0.8),
}


@pytest.mark.parametrize("name", CALIBRATIONS)
def test_the_chosen_sigma_agrees_with_float64(tmp_path: Path, name: str) -> None:
    flags, correlation = CALIBRATIONS[name]
    if "openvino" in flags:
        pytest.importorskip("openvino")
    found = last_json(invoke(tmp_path, "calibrate", *flags, "--json"))
    assert found["autograd_correlation"] > 0.999999
    [chosen] = [point for point in found["points"] if point["sigma"] == found["sigma"]]
    assert chosen["correlation"] > correlation
    assert chosen["correlation"] > max(point["correlation"] for point in found["points"]) - 0.05
    assert tree(tmp_path) == []


def test_calibrate_names_the_runtime_that_it_measured(tmp_path: Path) -> None:
    (tmp_path / "options.toml").write_text('runtime = "auto"\nprecision = "bf16"\n')
    flags = (*MODEL, "--batch-size", "8", "--num-directions", "4", "--json")
    told = last_json(invoke(tmp_path, "calibrate", "options.toml", *flags))
    assert (told["runtime"], told["precision"]) == ("torch", "bf16")
    assert told == last_json(invoke(tmp_path, "calibrate", *flags, "--precision", "bf16"))


def test_calibrate_takes_a_runs_weights_and_a_file_of_options(tmp_path: Path, base: Path) -> None:
    (tmp_path / "o.toml").write_text('model = "tiny_model:build"\nbatch-size = 16\nnum-directions = 5\nrounds = 3\n')
    plain = last_json(invoke(tmp_path, "calibrate", "o.toml", "--json"))
    assert (plain["batch_size"], plain["num_directions"]) == (16, 5)
    trained = last_json(invoke(tmp_path, "calibrate", "o.toml", "--start", base, "--num-directions", "6", "--json"))
    assert (trained["batch_size"], trained["num_directions"]) == (16, 6)
    assert trained["points"] != plain["points"]


BAD_CALIBRATIONS: dict[str, tuple[tuple[str, ...], str]] = {
    "plot": (("--plot", "x.jpg"), "plot = 'x.jpg': expected a file name that ends in .png"),
    "plot without a name": (("--plot", "."), "plot = '.': expected a file name that ends in .png"),
    "a file's place": (("--plot", "file/x.png"), "file/x.png: cannot write: File exists"),
    "lattice": (("--lattice", "9"), "lattice = 9: expected an integer >= 0 and <= 8"),
    "gaussian lattice": (("--lattice", "1", "--family", "gaussian"), "lattice = 1 with family 'gaussian', ..."),
    "directions": (("--num-directions", "0"), "num_directions = 0: expected an integer >= 1 and <= 1048576"),
    "batch": (("--batch-size", "0"), "batch_size = 0: expected an integer >= 1"),
    "precision": (("--precision", "int8"), "precision = 'int8': expected one of fp32, bf16, fp16"),
    "sigma": (("--sigma", "0.1"), "No such option...--sigma... (see --help)"),
    "file": (("nosuch.toml",), "nosuch.toml: cannot be read: No such file or directory"),
    "start": (("--start", "nosuch"), "nosuch: expected a run folder or a .safetensors file ..."),
}


@pytest.mark.parametrize("name", BAD_CALIBRATIONS)
def test_calibrate_refuses_in_one_line_and_writes_nothing(tmp_path: Path, name: str) -> None:
    flags, line = BAD_CALIBRATIONS[name]
    (tmp_path / "file").write_text("x")
    before = tree(tmp_path)
    refused(invoke(tmp_path, "calibrate", *MODEL, *(() if "0" in flags else FEW), *flags), line)
    assert tree(tmp_path) == before


# --- scales


class Shared(nn.Module):
    """One layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.second = self.first
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.second(torch.relu(self.first(x.flatten(1)))))
        return y


@pytest.mark.parametrize("name", ["mlp", "lenet-small", "wrn-10-2", "transformer", "shared"])
def test_gains_of_one_change_nothing(name: str) -> None:
    from baffle.models import train_only

    torch.manual_seed(0)
    model = Shared() if name == "shared" else build(name, (1, 8, 8), 10)
    x = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        before = model(x)
        train_only(model, "scales")
        assert torch.allclose(model(x), before, atol=1e-5)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all(n.endswith(("gain", "bias")) for n in trained)
    if name == "shared":
        assert trained == ["first.gain", "first.bias", "head.gain", "head.bias"]
