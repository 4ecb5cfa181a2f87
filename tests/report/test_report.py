"""Reports: self-contained pages whose numbers are the journal's, for ordinary, odd and hostile runs."""

from __future__ import annotations

import base64
import html
import importlib
import json
import math
import struct
import sys
import zlib
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

import baffle as bf
from baffle.core.directions import Directions
from baffle.core.method import examples_per_weight
from baffle.core.scalars import weight_of
from baffle.core.types import Family, Row, Sharing, Table, make_table, pack_int32, table_size
from baffle.errors import CorruptRunError, DivergedError, JournalError, MissingExtraError, OptionError
from baffle.runfolder.config import RunConfig
from baffle.runfolder.metrics import Record
from helpers import METHOD, copy_run, digits_engine, flip, initial_weights, places, train_digits

pytest.importorskip("matplotlib")

from baffle.report import RunLog, compare, read_run, report, totals
from baffle.report.charts import Chart, Line, Panel, draw, drawable, unit
from baffle.report.figures import client_charts, progress_charts, signal_charts
from baffle.report.run import cumulative, unique_names
from baffle.report.signal_noise import measure_power
from baffle.report.text import event_sentences, notes, settings

Vector = npt.NDArray[np.float64]
PNG = b"\x89PNG\r\n\x1a\n"


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


def assert_is_png(data: bytes) -> None:
    """Every chunk's checksum is right, and there are pixels."""
    assert data.startswith(PNG)
    position, names = len(PNG), []
    while position < len(data):
        (length,) = struct.unpack_from(">I", data, position)
        chunk = data[position + 4 : position + 8 + length]
        assert struct.unpack_from(">I", data, position + 8 + length) == (zlib.crc32(chunk),)
        names.append(chunk[:4])
        position += length + 12
    assert names[0] == b"IHDR"
    assert names[-1] == b"IEND"
    assert b"IDAT" in names


def train_with_test(out: Path, rounds: int = 6, method: bf.Method = METHOD) -> bf.Run:
    _, test = bf.load("digits")
    command: dict[str, str | int | float | bool | None] = {"model": "linear", "dataset": "digits", "alpha": None}
    return bf.train(
        method,
        digits_engine(),
        initial_weights(),
        rounds=rounds,
        test=test,
        out=out,
        evaluate_every=2,
        command=command,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "plain"
    train_with_test(path)
    return path


def write_baseline(path: Path, like: Path) -> Path:
    """The folder of a baseline with true gradients: no rows."""
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


def test_totals_are_those_of_the_summary(tmp_path: Path) -> None:
    done = train_with_test(tmp_path / "run")
    found, summary = totals(read_run(tmp_path / "run")), done.summary()
    assert {name: summary[name] for name in found} == found


def test_settings_name_what_was_chosen(run: Path) -> None:
    chosen = settings(read_run(run))
    assert chosen["model"] == "linear"
    assert chosen["clients"] == 3
    assert chosen["directions K"] == METHOD.num_directions
    assert chosen["optimizer"] == "sgd (lr 0.05, momentum 0.5, weight_decay 0.0)"
    assert "alpha" not in chosen


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


TABLE = make_table({"w": (12, 20), "b": (10,)})
WEIGHTS = (60, 30, 10)  # examples of three clients


def make_rows(gradients: Sequence[Vector], family: Family, sharing: Sharing, rounds: int, noise: float) -> list[Row]:
    """Rows of clients whose losses are linear: scalar k is <gradient, direction k>, plus noise."""
    count, exponent, rng = 16, -10, np.random.default_rng(5)
    asked = examples_per_weight(max(WEIGHTS), len(WEIGHTS))
    weights = [weight_of(size, asked) for size in WEIGHTS]
    rows = []
    for round in range(1, rounds + 1):
        vectors = []
        for client, (gradient, weight) in enumerate(zip(gradients, weights, strict=True)):
            owner = 0 if sharing == "shared" else client + 1
            d = Directions(TABLE, family, (9, round), owner)
            entries = np.concatenate([d.entries(i, slice(0, count)) for i in range(len(TABLE))], axis=1) * d.unit
            scalars = entries @ gradient + noise * rng.standard_normal(count)
            vectors.append(weight * np.rint(scalars * 2.0**-exponent).astype(np.int64))
        stacked = np.stack(vectors)[:, None]
        rows.append(
            Row(
                round=round,
                key=9,
                applied=True,
                restores=None,
                rollbacks=0,
                family=family,
                sharing=sharing,
                num_directions=count,
                difference="central",
                sigma=1.0,
                lattice=0,
                exponent=exponent,
                local_steps=1,
                participants=(0, 1, 2),
                weight_sum=sum(weights),
                scalars=pack_int32(stacked if sharing == "per-client" else stacked.sum(axis=0, keepdims=True)),
                clipped=0,
                nonfinite=0,
                clip_factor=1.0,
                optimizer="sgd",
                coefficients={"lr": 0.1, "weight_decay": 0.0},
                ema=0.9,
                weights_sha256=b"",
                state_sha256=b"",
            )
        )
    return rows


def log_of(rows: Sequence[Row], family: Family, sharing: Sharing, table: Table = TABLE) -> RunLog:
    config = RunConfig(
        method=bf.Method(num_directions=16, family=family, sharing=sharing, difference="central"),
        key=9,
        rounds=len(rows),
        evaluate_every=1,
        snapshot_every=1,
        table=table,
        plan={},
        clients=WEIGHTS,
    )
    return RunLog("linear", Path("linear"), config, (), tuple(rows))


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("sharing", ["shared", "per-client"])
@pytest.mark.parametrize("family", ["rank1", "rademacher", "gaussian"])
def test_signal_and_noise_are_those_of_a_known_gradient(family: Family, sharing: Sharing, alike: bool) -> None:
    rounds, n, count, rng = 150, table_size(TABLE), 16, np.random.default_rng(3)
    common = rng.standard_normal(n)
    gradients = [common if alike else common + 2 * rng.standard_normal(n) for _ in WEIGHTS]
    p = np.array(WEIGHTS) / sum(WEIGHTS)
    mean = sum(share * gradient for share, gradient in zip(p, gradients, strict=True))
    squared = float(mean @ mean)
    powers = measure_power(log_of(make_rows(gradients, family, sharing, rounds, 0), family, sharing), samples=rounds)
    signal, noise = (np.array([getattr(q, name) for q in powers]) for name in ("signal", "noise"))

    assert len(powers) == rounds
    error = float(np.std(signal, ddof=1)) / math.sqrt(rounds)
    assert abs(signal.mean() - squared) < 4 * error
    assert error < 0.35 * squared  # so that the line above says something
    predicted = math.sqrt(np.mean([q.variance for q in powers]) / rounds)
    assert 0.7 < predicted / error < 1.4

    factor = n + 1 if family == "gaussian" else n - 1
    scatter = squared if sharing == "shared" else sum(s**2 * float(g @ g) for s, g in zip(p, gradients, strict=True))
    assert noise.mean() == pytest.approx(factor / count * scatter, rel=0.1)
    equal = float(np.mean([q.equal for q in powers]))
    if sharing == "shared":
        assert equal == pytest.approx(squared, rel=0.1)
    elif alike:  # three clients of unequal weight: 1/sum p^2 = 2.17 of them count
        assert equal == pytest.approx(squared, rel=0.1)
        assert float(np.mean([q.equal / q.noise for q in powers])) == pytest.approx(count / factor / (p @ p), rel=1e-6)
    else:
        assert equal > 1.3 * squared


def test_noise_in_the_scalars_is_not_taken_for_signal() -> None:
    gradient = np.random.default_rng(4).standard_normal(table_size(TABLE))
    squared = float(gradient @ gradient)
    rows = make_rows([gradient] * 3, "rank1", "shared", 150, noise=3 * math.sqrt(squared))
    powers = measure_power(log_of(rows, "rank1", "shared"), samples=150)
    signal = np.array([q.signal for q in powers])
    assert float(np.mean([q.equal for q in powers])) > 4 * squared  # what the scalars alone would say
    # a share 1/K of the scalars' own noise is left
    left = (float(np.mean([q.equal for q in powers])) - squared) / 16
    assert abs(signal.mean() - squared - left) < 4 * float(np.std(signal, ddof=1)) / math.sqrt(len(signal))


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


def test_losses_that_are_not_finite_are_left_out(run: Path, tmp_path: Path) -> None:
    log = read_run(run)
    records = [msgspec.structs.replace(r, loss=None if i else math.inf) for i, r in enumerate(log.records)]
    odd = replace(log, records=tuple(records))
    assert any("not a finite number" in note for note in notes(odd))
    for chart in progress_charts([odd]):
        assert [panel.label for panel in chart.panels] == ["accuracy"]
        assert_is_png(draw(chart))


def record(round: int, *, applied: bool = True, restores: int | None = None, accuracy: float | None = None) -> Record:
    return Record(
        round=round,
        applied=applied,
        restores=restores,
        loss=None if accuracy is None else 1 - accuracy,
        accuracy=accuracy,
        lr=0.1,
        sigma=1e-3,
        exponent=-8,
        clip_factor=1.0,
        scalar_rms=0.5,
        participants=3,
        clipped=0,
        nonfinite=0,
        forward_passes=10,
        samples_forwarded=10,
        bytes_up=10,
        bytes_down=10,
        seconds=0.1,
        weights_sha256="00",
    )


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


def test_a_repeated_row_is_no_participation() -> None:
    row = make_rows([np.ones(table_size(TABLE))] * 3, "rank1", "shared", 1, 0)[0]
    rows = [msgspec.structs.replace(row, round=0), row, msgspec.structs.replace(row, round=2, restores=0)]
    bars, raster = client_charts(log_of(rows, "rank1", "shared"))
    assert bars.panels[0].columns is not None
    assert bars.panels[0].columns[1].tolist() == [2, 2, 2]
    assert raster.panels[0].image is not None
    assert raster.panels[0].image.tolist() == [[1, 1, 0]] * 3


def test_loss_on_validation_data_is_called_so(run: Path) -> None:
    log = read_run(run)
    held = replace(log, config=msgspec.structs.replace(log.config, command={"holdout": 100}))
    found = totals(held)
    assert found["accuracy"] == json.loads((run / "summary.json").read_text())["accuracy"]
    assert found["validation_accuracy"] == log.records[-1].accuracy
    assert "on the validation data" in progress_charts([held])[0].caption
    went_on = replace(held, records=held.records[:-1])
    assert "accuracy" not in totals(went_on)


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


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
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
