"""What ``flwr run`` is given becomes options, or one error that names the option."""

from __future__ import annotations

from pathlib import Path

import pytest

from baffle.deploy.app_config import AppConfig, app_config, options_of
from baffle.errors import OptionError


def test_names_are_those_of_the_command_line() -> None:
    config = app_config({"config": "train.toml", "clients": 3, "deadline": 5.0, "tensorboard": True})
    assert config == AppConfig(config="train.toml", clients=3, deadline=5.0, tensorboard=True)


@pytest.mark.parametrize(
    ("values", "part"),
    [({"clients": "three"}, "clients"), ({"downlink": "carrier pigeon"}, "downlink"), ({"rounds": 3}, "rounds")],
)
def test_values_that_do_not_fit_are_named(values: dict[str, object], part: str) -> None:
    with pytest.raises(OptionError, match=part):
        app_config(values)


def test_options_are_those_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "train.toml").write_text('model = "mlp"\nrounds = 7\n')
    options = options_of(AppConfig(config=str(tmp_path / "train.toml")))
    assert (options.model, options.rounds) == ("mlp", 7)


def test_backpropagation_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.toml").write_text('backprop = "fedsgd"\n')
    with pytest.raises(OptionError, match="clients only infer"):
        options_of(AppConfig(config=str(tmp_path / "train.toml")))
