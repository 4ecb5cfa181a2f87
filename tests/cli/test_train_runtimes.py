"""``baffle train`` with other runtimes and precisions: resumed, replayed, and refused where options contradict."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

import baffle as bf
from baffle.client.calibrate import DIRECTIONS, LADDER
from baffle.errors import MissingExtraError, OptionError
from baffle.runtimes import choose as choosing
from baffle.training import build as assemble
from baffle.training.options import TrainConfig
from cli_helpers import (
    INT8,
    MODEL,
    ORT,
    TINY_OPTIONS,
    TRAIN_TINY,
    config,
    cut,
    last_json,
    metrics,
    refused_with,
)
from helpers import copy_run, invoke, tree

pytestmark = pytest.mark.usefixtures("tiny_model", "exports")


class RuntimeVariant:
    """Flags of a run, how many tensors it trains, and whether it is also evaluated and reported from its folder."""

    def __init__(self, *flags: str, tensors: int = 4, reads: bool = False) -> None:
        self.flags, self.tensors, self.reads = flags, tensors, reads


RUNTIME_VARIANTS = {
    "sigma": RuntimeVariant("--sigma", "0.01"),
    "bf16": RuntimeVariant("--precision", "bf16"),
    "lattice": RuntimeVariant("--lattice", "4", reads=True),
    "fp32": RuntimeVariant(*ORT, "--local-steps", "2", "--local-lr", "0.05"),
    "fp16": RuntimeVariant(*ORT, "--precision", "fp16", "--sigma", "0.02"),
    "int8": RuntimeVariant(*INT8, reads=True),
    "int8 weights": RuntimeVariant(*ORT, "--precision", "int8-weights", "--lattice", "4"),
    "branches": RuntimeVariant(*INT8, "--branches", "--sharing", "per-client"),
    "openvino": RuntimeVariant("--runtime", "openvino", "--sigma", "1e-3"),
    "pruned": RuntimeVariant("--prune", "0.8", reads=True),
    "pruned by inputs": RuntimeVariant(*INT8, "--prune", "0.5", "--prune-by", "inputs"),
    "shrunk": RuntimeVariant("--prune", "0.5", "--prune-by", "channels", reads=True),
    "from a run": RuntimeVariant("--start", "base"),
    "head": RuntimeVariant(*INT8, "--start", "base", "--trainable", "head", tensors=2, reads=True),
    "scales": RuntimeVariant("--trainable", "scales", "--start", "base", reads=True),
    "pattern": RuntimeVariant("--trainable", "*.bias", "--prune", "0.3", tensors=2),
}


RUNTIME_RESULTS = ("weights_sha256", "accuracy", "loss", "rounds", "updates", "sigma", "lattice", "parameters")


@pytest.mark.parametrize("name", RUNTIME_VARIANTS)
def test_a_run_is_resumed_to_the_undisturbed_weights_and_replayed_without_exporting(
    tmp_path: Path, base: Path, exports: dict[Any, bf.Bundle], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    variant, run = RUNTIME_VARIANTS[name], tmp_path / "run"
    if "openvino" in variant.flags:
        pytest.importorskip("openvino")
    if "channels" in variant.flags:
        pytest.importorskip("torch_pruning")
    if "--start" in variant.flags:
        copy_run(base, tmp_path / "base")
    undisturbed = last_json(invoke(tmp_path, *TRAIN_TINY, *variant.flags))
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
    assert [resumed[name] for name in RUNTIME_RESULTS] == [undisturbed[name] for name in RUNTIME_RESULTS]
    if variant.reads:
        tested = last_json(invoke(tmp_path, "evaluate", "run", "--json"))
        assert (tested["accuracy"], tested["loss"]) == (undisturbed["accuracy"], undisturbed["loss"])
        monkeypatch.setattr("baffle.report.pages.draw", lambda chart: b"")
        assert last_json(invoke(tmp_path, "report", "run", "--json"))["weights_sha256"] == undisturbed["weights_sha256"]

    monkeypatch.setattr("baffle.training.build.assemble", None)  # calling it would fail
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
    outcome = invoke(tmp_path, *TRAIN_TINY, *flags)
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
    outcome = invoke(tmp_path, "train", "options.toml", *TRAIN_TINY[1:], "--rounds", "1")
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
    refused_with(invoke(tmp_path, "up", "options.toml", "--out", "run"), line)
    assert tree(tmp_path) == before


def test_a_measured_sigma_costs_passes_and_equals_one_that_is_given(tmp_path: Path) -> None:
    copies = ("--strategy", "copies")  # not measured, as another strategy rounds differently
    measured = last_json(invoke(tmp_path, *TRAIN_TINY, *copies, "--sigma", "auto"))
    same = last_json(invoke(tmp_path, *TRAIN_TINY, *copies, "--sigma", str(measured["sigma"]), "--out", "given"))
    assert same["weights_sha256"] == measured["weights_sha256"]
    assert measured["forward_passes"] - same["forward_passes"] == len(LADDER) * (DIRECTIONS + 1)
    (tmp_path / "auto.toml").write_text('sigma = "auto"')
    (tmp_path / "given.toml").write_text(f"sigma = {measured['sigma']}")
    for name in ("auto", "given"):
        by_file = last_json(
            invoke(tmp_path, "train", f"{name}.toml", *TINY_OPTIONS, *copies, "--json", "--out", f"{name} by file")
        )
        assert by_file["weights_sha256"] == measured["weights_sha256"]
        assert config(tmp_path / f"{name} by file")["command"]["sigma"] == {"auto": "auto"}.get(name, same["sigma"])
    flags_win = last_json(
        invoke(tmp_path, "train", "auto.toml", *TINY_OPTIONS, "--json", "--out", "won", "--sigma", "0.5")
    )
    assert flags_win["sigma"] == 0.5


RUNTIME_CONTRADICTIONS: dict[str, tuple[tuple[str, ...], str]] = {
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


@pytest.mark.parametrize("name", RUNTIME_CONTRADICTIONS)
def test_runtime_options_that_contradict_each_other_are_refused_in_one_line(tmp_path: Path, name: str) -> None:
    flags, line = RUNTIME_CONTRADICTIONS[name]
    refused_with(invoke(tmp_path, *TRAIN_TINY, *flags), line)
    assert tree(tmp_path) == []


def test_the_baseline_trains_smaller_models_and_parts_of_them(tmp_path: Path) -> None:
    pytest.importorskip("torch_pruning")
    flags = ("--backprop", "fedsgd", "--prune", "0.5", "--prune-by", "channels", "--trainable", "head")
    assert last_json(invoke(tmp_path, *TRAIN_TINY, *flags))["parameters"] == 70


def test_a_precision_that_this_processor_has_not_is_refused(tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    has = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    for precision in ("bf16", "fp16"):
        options = ("--runtime", "openvino", "--precision", precision, "--rounds", "1", "--sigma", "0.02")
        outcome = invoke(tmp_path, *TRAIN_TINY, *options, "--out", precision)
        if precision.upper() in has:
            assert last_json(outcome)["rounds"] == 1
        else:
            refused_with(outcome, f"precision = '{precision}': expected one that this processor has: ...")
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
def test_a_toml_file_is_held_to_the_rules_of_runtimes(tmp_path: Path, text: str, line: str) -> None:
    (tmp_path / "options.toml").write_text(text)
    before = tree(tmp_path)
    refused_with(invoke(tmp_path, "train", "options.toml", *TINY_OPTIONS, "--out", "run"), line)
    refused_with(invoke(tmp_path, "calibrate", "options.toml", *MODEL), line)
    assert tree(tmp_path) == before
