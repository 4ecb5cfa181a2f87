"""Options of a training run as a value: from files and flags, to a method."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

import baffle as bf
from baffle.core.aggregate import SecureSum
from baffle.core.guard import Guard
from baffle.core.optim import AdamW, Cosine
from baffle.errors import JournalError, OptionError
from baffle.training.options import TrainConfig, train_config


def test_flags_win_over_a_file_and_names_may_have_dashes(tmp_path: Path) -> None:
    file = tmp_path / "options.toml"
    file.write_text("num-directions = 7\nlr = 1\nrounds = 5\n")
    options = train_config(file, {"rounds": 9, "seed": None})
    assert (options.num_directions, options.lr, options.rounds, options.seed) == (7, 1.0, 9, 0)


def test_integers_become_floats_where_a_number_is_meant() -> None:
    options = TrainConfig(partition="dirichlet", alpha=1, lr=1, local_lr=2, clip_scalars=3, sigma=4)
    values = (options.alpha, options.lr, options.local_lr, options.clip_scalars, options.sigma)
    assert [type(value) for value in values] == [float] * 5


def test_options_describe_a_method() -> None:
    options = TrainConfig(optimizer="adamw", weight_decay=0.1, rounds=9, secure_sum=True, guard="stop", clip_update=1.0)
    method = options.method()
    assert method.optimizer == AdamW(lr=0.01, weight_decay=0.1, schedule=Cosine(9))
    assert isinstance(method.aggregate, SecureSum)
    assert method.guard == Guard(rollbacks=0)
    assert method.server == (bf.clip_update(1.0),)


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({}, "forward"),
        ({"precision": "bf16"}, "central"),
        ({"lattice": 2}, "central"),
        ({"difference": "central"}, "central"),
    ],
)
def test_where_passes_round_differences_are_central(changes: dict[str, object], difference: str) -> None:
    assert train_config(None, changes).differences == difference


def test_every_option_says_what_it_is_for() -> None:
    for field in msgspec.structs.fields(TrainConfig):
        [meta] = field.type.__metadata__
        assert meta.description.endswith(".")
        assert meta.extra["group"] in ("Data and clients", "Method", "Run")


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="did you mean rounds"):
        train_config(None, {"round": 1})
    with pytest.raises(OptionError, match="rounds"):
        train_config(None, {"rounds": "many"})
    with pytest.raises(JournalError, match="cannot be read"):
        train_config(tmp_path / "missing.toml", {})
