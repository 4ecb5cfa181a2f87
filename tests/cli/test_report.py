"""``baffle report`` and ``baffle compare``."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli_helpers import TRAIN_SHORT, assert_is_png, last_json, refused
from helpers import Outcome, copy_run, invoke, tree

pytestmark = pytest.mark.usefixtures("no_network", "no_environment")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, dict[str, object]]:
    """Two short runs, one with held-out data, and what they printed."""
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("runs")
    first = last_json(invoke(folder, *TRAIN_SHORT, "--out", "first"))
    second = last_json(invoke(folder, *TRAIN_SHORT, "--out", "second", "--holdout", "5", "--partition", "shards"))
    return {folder / "first": first, folder / "second": second}


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages without their pictures, which take most of the time."""
    monkeypatch.setattr("baffle.report.pages.draw", lambda chart: b"")


COSTS = {"forward_passes", "samples_forwarded", "bytes_up", "bytes_down", "seconds", "parameters"}


def assert_totals(found: dict[str, object], summary: dict[str, object]) -> None:
    """What a page tells as JSON is what the run printed."""
    assert found.keys() >= COSTS | {"rounds", "updates", "rollbacks", "weights_sha256"}
    shown = "validation_loss" if summary["validation_loss"] is not None else "loss"
    assert found[shown] is not None
    for name, value in found.items():
        assert value == summary[name], name


def test_report_writes_a_page_and_prints_where(tmp_path: Path, runs: dict[Path, dict[str, object]]) -> None:
    run = copy_run(next(iter(runs)), tmp_path / "run")
    before = {path: Path(path).read_bytes() for path in tree(run) if Path(path).is_file()}
    outcome = invoke(tmp_path, "report", "run")
    assert outcome == Outcome(0, "run/report/report.html\n", "")
    page = (tmp_path / "run/report/report.html").read_text()
    assert page.startswith("<!DOCTYPE html>")
    assert page.rstrip().endswith("</html>")
    assert str(runs[next(iter(runs))]["weights_sha256"]) in page
    pictures = [path for path in (run / "report").iterdir() if path.suffix == ".png"]
    assert len(pictures) >= 4
    for picture in pictures:
        assert_is_png(picture)
    assert {path: Path(path).read_bytes() for path in before} == before
    assert invoke(tmp_path, "replay", "run").code == 0


def test_report_as_json_has_the_runs_own_totals(
    tmp_path: Path, runs: dict[Path, dict[str, object]], undrawn: None
) -> None:
    for run, summary in runs.items():
        outcome = invoke(tmp_path, "report", run, "--out", f"pages/{run.name}", "--json")
        found = last_json(outcome)
        assert (outcome.err, outcome.out.count("\n")) == ("", 1)
        assert found.pop("report") == f"pages/{run.name}/report.html"
        assert (tmp_path / "pages" / run.name / "report.html").is_file()
        assert_totals(found, summary)
        assert not (run / "report").exists()


def test_compare_writes_a_page_of_every_run(tmp_path: Path, runs: dict[Path, dict[str, object]], undrawn: None) -> None:
    outcome = invoke(tmp_path, "compare", *runs)
    assert outcome == Outcome(0, "comparison/compare.html\n", "")
    page = (tmp_path / "comparison/compare.html").read_text()
    for word in ("first", "second", "shards", "holdout"):
        assert word in page
    outcome = invoke(tmp_path, "compare", *runs, "--out", "new/place", "--json")
    found = last_json(outcome)
    assert (outcome.err, outcome.out.count("\n")) == ("", 1)
    assert found["report"] == "new/place/compare.html"
    assert (tmp_path / "new/place/compare.html").read_text() == page
    assert isinstance(found["runs"], list)
    for told, (run, summary) in zip(found["runs"], runs.items(), strict=True):
        assert told.pop("run") == str(run)
        assert_totals(told, summary)


@pytest.mark.parametrize("command", ["report", "compare"])
def test_pages_of_what_is_no_run_are_refused(
    tmp_path: Path, runs: dict[Path, dict[str, object]], command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd/config.json").write_text("{}")
    good, before = next(iter(runs)), tree(tmp_path)
    others = (good,) if command == "compare" else ()
    for name in ("missing", "empty", "file", "odd"):
        refused(invoke(tmp_path, command, *others, name), name)
    refused(invoke(tmp_path, command), "RUN")
    read_bytes = Path.read_bytes

    def guarded(path: Path) -> bytes:
        if path.name == locked and path.parent == good:
            raise PermissionError(13, "Permission denied", str(path))
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", guarded)
    for locked in ("config.json", "initial.safetensors", "rows.bin", "metrics.jsonl"):
        refused(invoke(tmp_path, command, *others, good), locked, "Permission denied")
    assert tree(tmp_path) == before


def test_pages_that_cannot_be_written_are_one_line(
    tmp_path: Path, runs: dict[Path, dict[str, object]], undrawn: None
) -> None:
    (tmp_path / "file").write_text("x")
    for command in ("report", "compare"):
        refused(invoke(tmp_path, command, next(iter(runs)), "--out", "file"), "file", "cannot write")
    assert (tmp_path / "file").read_text() == "x"
