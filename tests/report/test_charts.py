"""Charts as they are drawn."""

from __future__ import annotations

import importlib
import math
import sys
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

import baffle.report
from baffle.core.types import table_size
from baffle.errors import MissingExtraError
from baffle.report.charts import Chart, Line, Panel, draw, unit
from baffle.report.figures import client_charts
from report_helpers import TABLE, assert_is_png, log_of, make_rows


@pytest.mark.parametrize(
    ("kind", "largest", "expected"),
    [
        ("round", 1e9, (1.0, "round")),
        ("passes", 2999, (1.0, "forward passes")),
        ("passes", 3e6, (1e6, "forward passes (millions)")),
        ("bytes", 0, (1.0, "bytes up (B)")),
        ("seconds", 4 * 3600, (3600.0, "time (h)")),
    ],
)
def test_units_keep_axes_legible(kind: str, largest: float, expected: tuple[float, str]) -> None:
    assert unit(kind, largest) == expected


def test_many_points_and_many_clients_are_drawn_binned(tmp_path: Path) -> None:
    x = np.arange(20000.0)
    chart = Chart("c", "t", "", "x", (Panel("y", (Line("s", x, np.sin(x), "dots"), Line("n", x, x * math.nan))),))
    assert_is_png(draw(chart))
    rows = make_rows([np.ones(table_size(TABLE))] * 3, "rank1", "shared", 1, 0)
    rng = np.random.default_rng(0)
    many = [
        msgspec.structs.replace(rows[0], round=r, participants=tuple(sorted(rng.choice(500, 50, replace=False))))
        for r in range(400)
    ]
    log = log_of(many, "rank1", "shared")
    log = replace(log, config=msgspec.structs.replace(log.config, clients=(7,) * 500))
    bars, raster = client_charts(log)
    assert bars.panels[0].columns is not None
    assert bars.panels[0].columns[1].sum() == 500
    assert raster.panels[0].image is not None
    assert raster.panels[0].image.shape == (72, 134)
    assert raster.panels[0].image.mean() == pytest.approx(0.1, rel=0.02)
    assert_is_png(draw(bars))
    assert_is_png(draw(raster))


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(baffle, "report", baffle.report)  # put back afterwards: importing it again replaces it
    for name in [name for name in sys.modules if name.startswith("baffle.report")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(MissingExtraError, match=r"pip install 'baffle\[plots\]'"):
        _ = importlib.import_module("baffle.report").report


def test_the_users_style_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib

    chart = Chart("c", "t", "", "x", (Panel("y", (Line("s", np.arange(3.0), np.arange(3.0)),)),))
    before = draw(chart)
    with matplotlib.rc_context():
        matplotlib.rc("font", size=30)
        matplotlib.rc("savefig", dpi=20, bbox="tight")
        assert draw(chart) == before
        assert matplotlib.rcParams["font.size"] == 30
