"""What a method refuses when it is built."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

import baffle as bf
from baffle.core.method import Method
from baffle.errors import BaffleError, OptionError, PlanError


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Method(num_directions=0), "num_directions = 0"),
        (lambda: Method(num_directions=-3), "num_directions = -3"),
        (lambda: Method(num_directions=True), "num_directions = True"),
        (lambda: Method(sigma=0.0), "sigma = 0.0"),
        (lambda: Method(sigma=-1e-3), "sigma = -0.001"),
        (lambda: Method(sigma=math.nan), "sigma = nan"),
        (lambda: Method(batch_size=0), "batch_size = 0"),
        (lambda: Method(participation=0.0), "participation = 0.0"),
        (lambda: Method(participation=1.1), "participation = 1.1"),
        (lambda: Method(local_steps=0), "local_steps = 0"),
        (lambda: Method(local_lr=0.0), "local_lr = 0.0"),
        (lambda: Method(ema=1.0), "ema = 1.0"),
        (lambda: bf.clip_scalars(0.0), "clip_scalars.limit = 0.0"),
        (lambda: Method(family="rank-1"), "did you mean rank1"),  # type: ignore[arg-type]  # on purpose
    ],
)
def test_bad_options_are_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make()


def test_contradictions_are_refused_when_built() -> None:
    with pytest.raises(PlanError, match="per-client"):
        Method(local_steps=2, sharing="per-client", optimizer=bf.sgd(0.1))
    with pytest.raises(PlanError, match="expected local_lr"):
        Method(local_steps=2, optimizer=bf.adam(0.1))
    assert issubclass(PlanError, BaffleError)
    assert issubclass(PlanError, ValueError)


@pytest.mark.parametrize(
    "changes",
    [
        {"family": "gaussian"},
        {"local_steps": 2, "optimizer": bf.sgd(0.1)},
    ],
)
def test_the_lattice_refuses_what_does_not_fit_whole_steps(changes: dict[str, object]) -> None:
    fits: dict[str, object] = {"lattice": 2}
    Method(**fits)  # type: ignore[arg-type]  # options by name
    with pytest.raises(PlanError, match=r"lattice = 2 with family .*: expected rank1 or rademacher, and 1"):
        Method(**{**fits, **changes})  # type: ignore[arg-type]  # options by name


@pytest.mark.parametrize("codes", [-1, 9, 1.5, True])
def test_steps_that_do_not_fit_eight_bits_are_refused(codes: int) -> None:
    with pytest.raises(OptionError, match=rf"lattice = {codes}: expected an integer >= 0 and <= 8"):
        Method(lattice=codes, difference="central")
