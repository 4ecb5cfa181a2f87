"""What is read from a run folder for a report, and sums over it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np

from baffle.report import read_run, totals
from baffle.report.charts import Chart, Line, Panel, draw, drawable
from baffle.report.figures import progress_charts
from baffle.report.run import cumulative, unique_names
from baffle.report.text import event_sentences
from report_helpers import assert_is_png, log_of, record, train_with_test


def test_totals_are_those_of_the_summary(tmp_path: Path) -> None:
    done = train_with_test(tmp_path / "run")
    found, summary = totals(read_run(tmp_path / "run")), done.summary()
    assert {name: summary[name] for name in found} == found


def test_axes_are_sums_over_the_rounds_so_far(run: Path) -> None:
    log = read_run(run)
    passes = [r.forward_passes or 0 for r in log.records]
    assert cumulative(log, "round").tolist() == list(range(7))
    assert cumulative(log, "passes").tolist() == [sum(passes[: i + 1]) for i in range(7)]
    lost = msgspec.structs.replace(log.records[3], bytes_up=None)
    log = replace(log, records=(*log.records[:3], lost, *log.records[4:]))
    assert np.isnan(cumulative(log, "bytes")).tolist() == [False] * 3 + [True] * 4
    charts = {chart.name: chart for chart in progress_charts([log])}
    loss = charts["progress-passes"].panels[0].lines[0]
    assert loss.y.tolist() == [r.loss for r in log.records[::2]]
    np.testing.assert_allclose(loss.x, [sum(passes[: i + 1]) for i in range(0, 7, 2)])
    assert len(charts["progress-bytes"].panels[0].lines[0].x) == 2  # rounds 0 and 2


def test_rollbacks_are_told_and_do_not_count_as_progress() -> None:
    records = (
        record(0, applied=False, accuracy=0.1),
        record(1),
        record(2, accuracy=0.5),
        record(3, accuracy=0.3),
        record(4, applied=False, restores=2, accuracy=0.2),
        record(5),
        record(6, applied=False, restores=2),
    )
    log = replace(log_of([], "rank1", "shared"), records=records)
    assert event_sentences(log) == [
        "Round 0 only measured the scale of the scalars: no update.",
        "Round 4 found divergence and went back to the state after round 2.",
        "Round 6 found divergence and went back to the state after round 2.",
    ]
    found = totals(log)
    assert (found["updates"], found["rollbacks"], found["accuracy"], found["rounds"]) == (2, 2, 0.5, 6)
    rounds, passes = progress_charts([log])[:2]
    assert rounds.marks == ((0, "no update"), (4, "rollback"), (6, "rollback"))
    assert [kind for _, kind in passes.marks] == ["rollback", "rollback"]
    assert [x for x, _ in passes.marks] == [50, 70]


def test_names_are_told_apart(tmp_path: Path) -> None:
    paths = [tmp_path / "x" / "a", tmp_path / "y" / "a", tmp_path / "b", tmp_path / "b"]
    assert unique_names(paths) == ["x/a", "y/a", "b", "b (2)"]
    assert drawable("_a") == " _a"
    long = ["n" * 60 + c + "n" * 60 for c in "ab"]
    line = Line(drawable(long[0]), np.arange(2.0), np.arange(2.0))
    assert_is_png(draw(Chart("c", "t", "", "x", (Panel("y", (line,)),))))
    log = log_of([], "rank1", "shared")
    logs = [replace(log, name=name, records=(record(0, accuracy=0.1),)) for name in long]
    assert len({line.label for line in progress_charts(logs)[0].panels[0].lines}) == 2
