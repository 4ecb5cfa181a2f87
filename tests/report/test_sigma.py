"""The chart of a calibration."""

from __future__ import annotations

import numpy as np

from baffle.client.calibrate import Agreement
from baffle.report.charts import draw
from baffle.report.sigma import calibration_chart

POINTS = [Agreement(sigma=s, correlation=0.9, slope=1.0, noise=0.1, error=0.2) for s in (0.01, 0.1)]


def test_errors_are_drawn_with_the_guess_and_without() -> None:
    with_guess = calibration_chart("mlp", [0.01, 0.1], POINTS, np.array([0.3, 0.4]), codes=False)
    assert [line.label for line in with_guess.panels[1].lines][2:] == ["error, guessed without a reference"]
    on_lattice = calibration_chart("mlp", [1.0, 2.0], POINTS, None, codes=True)
    assert len(on_lattice.panels[1].lines) == 2
    assert (with_guess.xlabel, on_lattice.xlabel) == ("sigma", "codes")
    assert draw(on_lattice).startswith(b"\x89PNG")
