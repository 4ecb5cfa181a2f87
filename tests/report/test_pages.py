"""Pages: self-contained, with the journal's numbers, for ordinary, odd and hostile runs."""

from __future__ import annotations

import base64
import html
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import pytest

import baffle as bf
from baffle.errors import CorruptRunError, DivergedError, JournalError, OptionError
from baffle.report import compare, read_run, report, totals
from baffle.report.figures import progress_charts
from helpers import METHOD, copy_run, flip, places, train_digits
from report_helpers import assert_is_png, train_with_test


class Page(HTMLParser):
    """A page's tags, links, pictures, values and text; fails on tags that do not match."""

    VOID = ("meta", "img", "link", "br", "input")

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.alts: list[str] = []
        self.values: list[str] = []
        self.text = ""
        self.source = file.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            assert not name.startswith("on")
            if name in ("src", "href", "srcset", "action", "data"):
                self.links.append(value or "")
            if name == "alt":
                self.alts.append(value or "")
            if tag == "data" and name == "value":
                self.values.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data if "style" not in self.open else ""


def write_baseline(path: Path, like: Path) -> Path:
    """The folder of a backpropagation baseline: no rows."""
    log = read_run(like)
    path.mkdir()
    config = msgspec.structs.replace(log.config, backprop="fedsgd")
    (path / "config.json").write_bytes(msgspec.json.encode(config))
    lines = [msgspec.json.encode(record) + b"\n" for record in log.records]
    (path / "metrics.jsonl").write_bytes(b"".join(lines) + b'{"cut": ')
    return path


def test_the_page_needs_nothing_but_itself(run: Path, tmp_path: Path) -> None:
    file = report(run, tmp_path / "out")
    page = Page(file)
    assert file == tmp_path / "out" / "report.html"
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert "http" not in page.source
    assert "url(" not in page.source
    assert len(page.links) == page.tags.count("img") == len(list(file.parent.glob("*.png"))) >= 9
    for link in page.links:
        assert link.startswith("data:image/png;base64,")
        assert_is_png(base64.b64decode(link.partition(",")[2], validate=True))
    assert all(len(alt) > 30 for alt in page.alts)
    assert page.tags.count("figcaption") == len(page.links)


def test_the_report_lies_in_the_run_and_is_the_same_twice(run: Path, tmp_path: Path) -> None:
    copied = copy_run(run, tmp_path / "run")
    first = report(copied)
    assert first == copied / "report" / "report.html"
    before = first.read_bytes()
    assert report(copied).read_bytes() == before
    assert bf.Journal.open(copied).damage is None


def test_numbers_are_those_of_the_journal(run: Path, tmp_path: Path) -> None:
    records = bf.Journal.open(run).records
    page = Page(report(run, tmp_path))
    assert records[-1].accuracy is not None
    for value in (
        records[-1].accuracy,
        records[-1].loss,
        sum(r.forward_passes or 0 for r in records),
        sum(r.samples_forwarded or 0 for r in records),
        sum(r.bytes_up or 0 for r in records),
        sum(r.bytes_down or 0 for r in records),
        650,
    ):
        assert repr(value) in page.values
    assert records[-1].weights_sha256 in page.text
    assert f"{records[-1].accuracy:.4g}" in page.text


def test_local_steps_and_own_directions_give_a_page(tmp_path: Path) -> None:
    steps = bf.Method(num_directions=4, batch_size=8, local_steps=2, optimizer=bf.sgd(0.05))
    own = bf.Method(num_directions=4, batch_size=8, participation=0.5, sharing="per-client", family="gaussian")
    for name, method in (("steps", steps), ("own", own)):
        train_with_test(tmp_path / name, method=method)
        page = Page(report(tmp_path / name))
        assert any(alt.startswith("Signal-to-noise") for alt in page.alts)
        assert any(alt.startswith("Who took part when") for alt in page.alts) == (name == "own")


def test_compare_overlays_runs_and_a_baseline(run: Path, tmp_path: Path) -> None:
    train_with_test(tmp_path / "a" / "plain", rounds=4, method=msgspec.structs.replace(METHOD, sigma=0.01))
    baseline = write_baseline(tmp_path / "base", run)
    file = compare([run, tmp_path / "a" / "plain", baseline], tmp_path / "out")
    page = Page(file)
    assert file.name == "compare.html"
    assert "http" not in page.source
    for name in (f"{run.parent.name}/plain", "a/plain", "base", "fedsgd", "backward pass", "0.01"):
        assert name in page.text
    assert "unknown" not in page.text
    for found in (totals(read_run(run)), totals(read_run(tmp_path / "a" / "plain"))):
        assert repr(found["accuracy"]) in page.values
    names = {path.stem for path in file.parent.glob("*.png")}
    assert names == {"progress-round", "progress-passes", "progress-bytes", "progress-seconds", "signal"}
    logs = [replace(read_run(path), name=name) for path, name in ((run, "x"), (tmp_path / "a" / "plain", "y"))]
    for chart in progress_charts(logs):
        assert [[line.label for line in panel.lines] for panel in chart.panels] == [["x", "y"]] * 2


def test_a_baseline_has_a_page_without_what_rows_tell(run: Path, tmp_path: Path) -> None:
    baseline = write_baseline(tmp_path / "base", run)
    log = read_run(baseline)
    assert (len(log.records), log.rows, log.damage) == (7, (), None)
    page = Page(report(baseline))
    assert "backward pass" in page.text
    assert not any("ignal" in alt or "clients" in alt for alt in page.alts)
    (baseline / "metrics.jsonl").write_bytes(b"nonsense\n")
    assert "damaged" in Page(report(baseline)).text
    (baseline / "metrics.jsonl").unlink()
    with pytest.raises(JournalError, match=r"metrics\.jsonl: cannot be read"):
        report(baseline)


def test_compare_says_when_nothing_differs(run: Path, tmp_path: Path) -> None:
    assert "the runs were made alike" in Page(compare([run, run], tmp_path / "out")).text
    with pytest.raises(OptionError, match="at least one"):
        compare([])


def test_a_run_without_data_to_evaluate_on(tmp_path: Path) -> None:
    train_digits(tmp_path / "run", 1)
    page = Page(report(tmp_path / "run"))
    assert "No round was evaluated" in page.text
    assert "unknown" in page.text
    assert not any("oss and accuracy" in alt for alt in page.alts)
    assert compare([tmp_path / "run"], tmp_path / "out").exists()


@pytest.mark.parametrize("rounds", [0, 1, 2])
def test_a_run_that_has_only_begun(run: Path, tmp_path: Path, rounds: int) -> None:
    copied = copy_run(run, tmp_path / "run")
    data = (copied / "rows.bin").read_bytes()
    (copied / "rows.bin").write_bytes(data[: places(run)[rounds].start])
    lines = (copied / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (copied / "metrics.jsonl").write_bytes(b"".join(lines[:rounds]))
    page = Page(report(copied))
    said = {0: "No round is done yet", 1: "No round has updated the weights yet", 2: "1 of 6 rounds are done"}
    assert said[rounds] in page.text
    assert compare([copied, run], tmp_path / "out").exists()


def test_damage_is_said_and_what_is_before_it_is_shown(run: Path, tmp_path: Path) -> None:
    edited = copy_run(run, tmp_path / "edited")
    flip(edited / "rows.bin", places(run)[4].row + 3)
    page = Page(report(edited))
    assert "round 4 fails its checksum" in page.text
    assert len(read_run(edited).rows) == 4
    torn = copy_run(run, tmp_path / "torn")
    lines = (torn / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (torn / "metrics.jsonl").write_bytes(b"".join(lines[:3]))
    page = Page(report(torn))
    assert "What some rounds cost is unknown" in page.text
    assert len(read_run(torn).records) == 7


def test_a_run_that_diverged_has_its_rollbacks_on_the_page(tmp_path: Path) -> None:
    method = bf.Method(num_directions=4, batch_size=8, optimizer=bf.sgd(1e9))
    with pytest.raises(DivergedError):
        train_with_test(tmp_path / "run", rounds=40, method=method)
    log = read_run(tmp_path / "run")
    assert totals(log)["rollbacks"] == sum(row.restores is not None for row in log.rows) > 0
    page = Page(report(tmp_path / "run"))
    assert "found divergence and went back to the state after round" in page.text
    assert "not finished" in page.text


def test_hostile_names_stay_text(run: Path, tmp_path: Path) -> None:
    evil = '<script>alert("$x^2$")</script>'
    folder = copy_run(run, tmp_path / "_<img src=x>\n\u4e2d$a_{$")
    config = msgspec.json.decode((folder / "config.json").read_bytes())
    config["command"] |= {"model": evil, "dataset": "'\"><b>"}
    (folder / "config.json").write_bytes(msgspec.json.encode(config))
    for file in (report(folder, tmp_path / "out"), compare([folder, run], tmp_path / "out")):
        page = Page(file)
        assert not {"script", "b"} & set(page.tags)
        assert page.tags.count("img") == len(page.links)
        assert "_<img src=x>?\u4e2d$a_{$" in page.text
        assert html.escape(evil) in page.source


def test_what_is_no_run_is_refused_in_one_line(run: Path, tmp_path: Path) -> None:
    with pytest.raises(JournalError, match=r"no config\.json"):
        report(tmp_path)
    broken = copy_run(run, tmp_path / "run")
    (broken / "config.json").write_text("{")
    with pytest.raises(CorruptRunError, match=r"config\.json"):
        compare([run, broken], tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(JournalError, match="cannot write the report"):
        report(run, tmp_path / "file")
