"""Which charts describe a run."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np

from baffle.core.types import Credit, table_size
from baffle.report import read_run
from baffle.report.charts import draw
from baffle.report.figures import client_charts, progress_charts, signal_charts
from baffle.report.signal_noise import measure_power
from baffle.report.text import describe, notes, settings
from report_helpers import TABLE, assert_is_png, log_of, make_rows


def test_the_chart_of_signal_and_noise_pools_rounds() -> None:
    gradient = np.random.default_rng(4).standard_normal(table_size(TABLE))
    log = log_of(make_rows([gradient] * 3, "rank1", "shared", 80, 0), "rank1", "shared")
    seen: list[tuple[int, int]] = []
    (chart,) = signal_charts([log], progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i, 80) for i in range(1, 81)]
    measured, theory = chart.panels[0].lines
    assert len(measured.x) == 8
    np.testing.assert_allclose(theory.y, math.sqrt(16 / (table_size(TABLE) - 1)))
    assert abs(float(np.mean(measured.y)) / float(theory.y[0]) - 1) < 0.35
    assert len(measure_power(log, samples=5)) == 5
    assert [q.round for q in measure_power(log, samples=2)] == [1, 80]


def test_losses_that_are_not_finite_are_left_out(run: Path, tmp_path: Path) -> None:
    log = read_run(run)
    records = [msgspec.structs.replace(r, loss=None if i else math.inf) for i, r in enumerate(log.records)]
    odd = replace(log, records=tuple(records))
    assert any("not a finite number" in note for note in notes(odd))
    for chart in progress_charts([odd]):
        assert [panel.label for panel in chart.panels] == ["accuracy"]
        assert_is_png(draw(chart))


def test_a_repeated_row_is_no_participation() -> None:
    row = make_rows([np.ones(table_size(TABLE))] * 3, "rank1", "shared", 1, 0)[0]
    rows = [msgspec.structs.replace(row, round=0), row, msgspec.structs.replace(row, round=2, restores=0)]
    bars, raster = client_charts(log_of(rows, "rank1", "shared"))
    assert bars.panels[0].columns is not None
    assert bars.panels[0].columns[1].tolist() == [2, 2, 2]
    assert raster.panels[0].image is not None
    assert raster.panels[0].image.tolist() == [[1, 1, 0]] * 3


def test_of_runs_with_other_numbers_than_scalars_the_noise_is_not_guessed() -> None:
    gradient = np.random.default_rng(4).standard_normal(table_size(TABLE))
    log = log_of(make_rows([gradient] * 3, "rank1", "shared", 3, 0), "rank1", "shared")
    rows = tuple(msgspec.structs.replace(spec, credit=Credit(0, "rows", ((spec.shape[0], 0, 1),))) for spec in TABLE)
    of_rows = replace(log, config=msgspec.structs.replace(log.config, table=rows))
    assert signal_charts([of_rows]) == []
    assert any("Signal and noise of the estimate are not shown" in note for note in notes(of_rows))
    assert not any("Signal and noise" in note for note in notes(log))
    assert settings(of_rows)["numbers by kind"] == f"{16 * 12} of rows (1 unit)"
    assert settings(log)["numbers by kind"] == "16 of the loss (1 unit)"
    assert "returns 192 numbers a round, along K = 16 shared rank1 directions" in describe(of_rows)
