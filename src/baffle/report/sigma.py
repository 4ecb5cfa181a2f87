"""The chart of ``baffle calibrate``: how well finite differences approximate derivatives, for each sigma."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from baffle.client.calibrate import Agreement
from baffle.report.charts import Chart, Line, Panel, drawable


def calibration_chart(
    title: str,
    x: Sequence[float],
    points: Sequence[Agreement],
    guess: npt.NDArray[np.float64] | None,
    *,
    codes: bool,
) -> Chart:
    """Correlation and relative error against sigma, or on the lattice against codes.

    ``guess`` is the error that was estimated without a reference.
    """
    at = np.array(x, np.float64)

    def line(field: str, colour: int) -> Line:
        return Line(field, at, np.array([getattr(p, field) for p in points], np.float64), colour=colour)

    errors = [line("error", 1), line("noise", 2)]
    if guess is not None:
        errors.append(Line("error, guessed without a reference", at, guess, "dashed", colour=3))
    caption = (
        "Correlation of finite differences with derivatives in float64 along the same directions (1 is best), and "
        "their relative error: rounding makes it large on the left, curvature on the right."
    )
    panels = (
        Panel("correlation", (line("correlation", 0),), low=0.0, high=1.02),
        Panel("error", tuple(errors), log=None),
    )
    return Chart("calibration", drawable(title, 60), caption, "codes" if codes else "sigma", panels, log_x=True)
