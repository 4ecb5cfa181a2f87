"""``baffle calibrate``: the sigma to use, against float64."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from baffle.client.calibrate import LADDER
from cli_helpers import INT8, MODEL, ORT, last_json, refused_with
from helpers import invoke, tree

pytestmark = pytest.mark.usefixtures("tiny_model", "exports")


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
    refused_with(invoke(tmp_path, "calibrate", *MODEL, *(() if "0" in flags else FEW), *flags), line)
    assert tree(tmp_path) == before
