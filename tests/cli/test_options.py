"""Options that are made from the fields of ``TrainConfig``."""

from __future__ import annotations

import inspect
from typing import get_args

import msgspec
import pytest

from baffle.cli.options import Flag, with_flags
from baffle.errors import OptionError
from baffle.training.options import TrainConfig

chosen: list[dict[str, object]] = []


@with_flags([Flag(name) for name in TrainConfig.__struct_fields__])
def command(*, before: int = 1, flags: dict[str, object], after: str = "x") -> None:
    """What it does."""
    chosen.append({"before": before, **flags, "after": after})


def test_every_field_is_an_option_without_a_default_of_its_own() -> None:
    parameters = inspect.signature(command).parameters
    assert list(parameters) == ["before", *TrainConfig.__struct_fields__, "after"]
    for name in TrainConfig.__struct_fields__:
        assert parameters[name].default is None
    assert command.__doc__ == "What it does."


@pytest.mark.parametrize(
    ("field", "kind"),
    [("dataset", str), ("augment", bool), ("clients", int), ("alpha", float), ("sigma", str), ("family", str)],
)
def test_an_option_has_the_type_of_its_field_as_typed(field: str, kind: type) -> None:
    annotation, _ = get_args(inspect.signature(command).parameters[field].annotation)
    assert annotation == kind | None


def test_help_and_default_come_from_the_field_unless_the_command_says_otherwise() -> None:
    [own] = [f for f in msgspec.structs.fields(TrainConfig) if f.name == "rounds"]
    description = own.type.__metadata__[0].description

    @with_flags([Flag("rounds", "Panel", default=3), Flag("seed", help="Another one.")])
    def other(*, flags: dict[str, object]) -> None: ...

    rounds, seed = (get_args(p.annotation)[1] for p in inspect.signature(other).parameters.values())
    assert rounds.help == f"{description} [dim]\\[default: 3][/dim]"
    assert rounds.rich_help_panel == "Panel"
    assert (seed.help, seed.rich_help_panel) == ("Another one. [dim]\\[default: 0][/dim]", "Run")


def test_a_command_gets_the_options_that_were_set() -> None:
    command(before=2, rounds=3, sigma="0.5", lr=None, after="y")
    assert chosen.pop() == {"before": 2, "rounds": 3, "sigma": 0.5, "after": "y"}
    command(sigma="auto")
    assert chosen.pop()["sigma"] == "auto"
    with pytest.raises(OptionError, match="sigma = 'x': expected a number > 0, or auto"):
        command(sigma="x")
