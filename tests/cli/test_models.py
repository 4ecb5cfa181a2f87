"""``baffle models``."""

from __future__ import annotations

from pathlib import Path

import pytest

import baffle as bf
from baffle.models import MODELS
from baffle.runtimes import choose
from cli_helpers import last_json, refused
from helpers import invoke

pytestmark = pytest.mark.usefixtures("no_network", "no_environment")


PARAMETERS = {
    "lenet": (26730, 27530),
    "lenet-small": (57450, 67850),
    "wrn-10-2": (302506, 302794),
    "mlp": (784 * 200 + 200 + 200 * 64 + 64 + 64 * 10 + 10, 3072 * 200 + 200 + 200 * 64 + 64 + 64 * 10 + 10),
    "transformer": (71306, 74314),
}


def test_models_lists_every_model_with_its_parameters_and_measures_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choose, "passes_per_second", None)  # who calls it, fails
    outcome = invoke(tmp_path, "models", "--seconds", "0")
    assert (outcome.code, outcome.err) == (0, "")
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in outcome.out.splitlines() if "│" in line]
    assert rows == [[name, f"{grey:,}", "", f"{colour:,}", ""] for name, (grey, colour) in PARAMETERS.items()]
    assert list(PARAMETERS) == list(MODELS)


def test_models_as_json(tmp_path: Path) -> None:
    outcome = invoke(tmp_path, "models", "--seconds", "0", "--json", "--batch-size", "5")
    found = last_json(outcome)
    assert outcome.out.count("\n") == 1
    assert found["batch_size"] == 5
    assert found["models"] == [
        {
            "model": name,
            "about": MODELS[name].about,
            "grey_parameters": grey,
            "grey_passes_per_second": None,
            "colour_parameters": colour,
            "colour_passes_per_second": None,
        }
        for name, (grey, colour) in PARAMETERS.items()
    ]
    assert all(len(architecture.about) > 20 for architecture in MODELS.values())


def test_models_measures_every_speed(tmp_path: Path) -> None:
    arguments = ("models", "--seconds", "0.01", "--threads", "1", "--batch-size", "2", "--json")
    models = last_json(invoke(tmp_path, *arguments))["models"]
    assert isinstance(models, list)
    assert len(models) == len(MODELS)
    assert all(model[f"{kind}_passes_per_second"] > 0 for model in models for kind in ("grey", "colour"))


def test_models_measures_what_it_was_asked_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def measure(runtime: bf.TorchRuntime, batch: bf.Dataset, seconds: float) -> float:
        asked.append((batch.x.shape, len(runtime.initial_weights()), runtime.plan["threads"], seconds))
        return 1234.56

    monkeypatch.setattr(choose, "passes_per_second", measure)
    arguments = ("models", "--batch-size", "3", "--threads", "3", "--seconds", "0.25")
    assert invoke(tmp_path, *arguments).out.count("1,235") == 2 * len(MODELS)
    expected = [
        ((3, *shape), parameters, 3, 0.25)
        for both in PARAMETERS.values()
        for shape, parameters in zip(((1, 28, 28), (3, 32, 32)), both, strict=True)
    ]
    assert asked == expected
    models = last_json(invoke(tmp_path, *arguments, "--json"))["models"]
    assert isinstance(models, list)
    assert {model["colour_passes_per_second"] for model in models} == {1234.6}


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--batch-size", "0"), "--batch-size"),
        (("--batch-size", "many"), "--batch-size"),
        (("--threads", "0"), "--threads"),
        (("--seconds", "-1"), "--seconds"),
        (("--seconds", "nan"), "--seconds"),
        (("--seconds", "601"), "--seconds"),
        (("--model", "mlp"), "--model"),
        (("mlp",), "mlp"),
    ],
)
def test_models_refuses_bad_options_in_one_line(tmp_path: Path, arguments: tuple[str, ...], word: str) -> None:
    refused(invoke(tmp_path, "models", *arguments), word)
