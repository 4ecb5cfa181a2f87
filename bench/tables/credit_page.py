"""The results of ``bench.tables.credit``, and the tables and the picture of docs/credit.md that are made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from baffle.report.charts import Chart, Line, Panel, draw
from bench.performance.results import insert

Way = Literal["local", "feature", "exact", "published", "backprop", "local-backprop"]
BACKWARD = 3
"""Forward passes that a forward and a backward pass are counted as."""
TITLES: dict[Way, str] = {
    "local": "rows, local heads",
    "feature": "rows before the last layer",
    "exact": "one scalar, exact head",
    "published": "one scalar (published)",
    "backprop": "FedSGD",
    "local-backprop": "local losses, backpropagation",
}
PICTURE = "images/credit-passes.png"


class Cell(msgspec.Struct, frozen=True):
    """One run: data and model, where gradients come from and how, and the random seed."""

    data: str
    model: str
    way: Way
    num_directions: int
    slices: int
    bits: int
    lr: float
    rounds: int
    seed: int

    @property
    def order(self) -> tuple[str | float, ...]:
        """Where it stands among others."""
        return msgspec.structs.astuple(self)

    @property
    def title(self) -> str:
        """In words."""
        how = f", K = {self.num_directions}, {self.slices} slices, {self.bits} bits"
        many = "" if "backprop" in self.way else how
        return f"{self.data}, {self.model}: {TITLES[self.way]}{many}, lr {self.lr:g}, {self.rounds} rounds"


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What a run reached, and its cost; passes are those over each example in a round, bytes per client and round."""

    cell: Cell
    accuracy: float
    loss: float
    passes: int
    weights: int
    heads: int
    bytes_up: int
    bytes_down: int
    clipped: int
    seconds: int


class Group(msgspec.Struct, frozen=True):
    """Runs that differ by their seed."""

    cell: Cell
    runs: tuple[Result, ...]

    @property
    def accuracy(self) -> float:
        """The mean."""
        return float(np.mean([r.accuracy for r in self.runs]))

    @property
    def shown(self) -> str:
        """The mean, and the range of several seeds."""
        values = [r.accuracy for r in self.runs]
        return f"{self.accuracy:.3f}" + (f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else "")

    def mean(self, field: str) -> float:
        """The mean of another figure."""
        return float(np.mean([getattr(r, field) for r in self.runs]))


def groups(found: Iterable[Result], keep: Callable[[Cell], bool]) -> list[Group]:
    """Runs by everything but their seed, in order."""
    by_cell: dict[Cell, list[Result]] = {}
    for result in sorted(found, key=lambda r: r.cell.order):
        if keep(result.cell):
            by_cell.setdefault(msgspec.structs.replace(result.cell, seed=0), []).append(result)
    return [Group(cell, tuple(runs)) for cell, runs in by_cell.items()]


def best(of: Sequence[Group]) -> Group | None:
    """The learning rate that did best."""
    return max(of, key=lambda g: g.accuracy, default=None)


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def kilobytes(count: float) -> str:
    """Bytes in thousands."""
    return f"{count / 1000:,.1f}"


def beside_backprop(found: Sequence[Result], data: str, model: str) -> str:
    """Credit by rows and FedSGD of as many rounds, all learning rates."""
    mine = groups(found, lambda c: (c.data, c.model) == (data, model) and c.way in ("local", "backprop"))
    mine = [g for g in mine if g.cell.way == "backprop" or (g.cell.slices, g.cell.bits) == (8, 8)]
    rounds = sorted({g.cell.rounds for g in mine if g.cell.way == "local"})
    rows = []
    for count in rounds:
        same = [g for g in mine if g.cell.rounds == count]
        reference = best([g for g in same if g.cell.way == "backprop"])
        for group in sorted(same, key=lambda g: (g.cell.way, -g.mean("passes"), g.cell.lr)):
            cell = group.cell
            share = f"{group.accuracy / reference.accuracy:.1%}" if reference else ""
            rows.append(
                [
                    TITLES[cell.way] + (f", K = {cell.num_directions}" if cell.way == "local" else ""),
                    f"{cell.lr:g}",
                    str(count),
                    f"{group.mean('passes'):.0f}",
                    group.shown,
                    str(len(group.runs)),
                    share,
                    kilobytes(group.mean("bytes_up")),
                    kilobytes(group.mean("bytes_down")),
                ]
            )
    heads = ["gradient", "lr", "rounds", "passes", "accuracy", "seeds", "of the best FedSGD", "kB up", "kB down"]
    return table(heads, rows) if rows else "Not run yet."


def by_bits(found: Sequence[Result]) -> str:
    """Accuracy and bytes by the bits of a number, beside FedSGD."""
    rows = []
    setting = ("mnist", "lenet", 172)
    mine = groups(found, lambda c: (c.data, c.model, c.rounds) == setting)
    reference = best([g for g in mine if g.cell.way == "backprop"])
    up = reference.mean("bytes_up") if reference else None
    local = [g for g in mine if (g.cell.way, g.cell.num_directions, g.cell.slices) == ("local", 5, 8)]
    for group in sorted(local, key=lambda g: -g.cell.bits):
        share = f"{group.mean('bytes_up') / up:.1%}" if up else ""
        measured = [kilobytes(group.mean(field)) for field in ("bytes_up", "bytes_down")]
        rows.append([str(group.cell.bits), group.shown, str(len(group.runs)), *measured, share])
    if reference:
        measured = [kilobytes(reference.mean(field)) for field in ("bytes_up", "bytes_down")]
        rows.append(["FedSGD, 32", reference.shown, str(len(reference.runs)), *measured, "100.0%"])
    return table(["bits", "accuracy", "seeds", "kB up", "kB down", "up, of FedSGD's"], rows)


def ablation(found: Sequence[Result], data: str, rounds: int) -> str:
    """Ways and slices by K; a dash where a cell was not run."""
    mine = groups(found, lambda c: (c.data, c.rounds, c.bits) == (data, rounds, 15) and c.model == "lenet")
    by_place = {(g.cell.way, g.cell.slices, g.cell.num_directions): g for g in mine if "backprop" not in g.cell.way}
    ks = sorted({k for _, _, k in by_place})
    ways: tuple[Way, ...] = ("published", "exact", "feature", "local")
    rows = []
    for way in ways:
        for slices in sorted({s for w, s, _ in by_place if w == way}):
            cells = [by_place.get((way, slices, k)) for k in ks]
            shown = ["-" if g is None else f"{g.accuracy:.3f} ({g.mean('passes'):.0f})" for g in cells]
            rows.append([TITLES[way], str(slices), *shown])
    return table(["gradient", "slices", *(f"K = {k}" for k in ks)], rows) if rows else "Not run yet."


def local_losses(found: Sequence[Result]) -> str:
    """The whole loss, local losses and rows, side by side."""
    rows = []
    models = ("mnist", "lenet"), ("cifar10", "convolutions"), ("cifar10", "wrn-10-2"), ("cifar10", "transformer")
    for data, model in models:
        mine = groups(found, lambda c, d=data, m=model: (c.data, c.model) == (d, m))  # type: ignore[misc]
        exact = [g for g in mine if g.cell.way == "local-backprop"]
        for rounds in sorted({g.cell.rounds for g in exact}):
            same = [g for g in mine if g.cell.rounds == rounds]
            ways = [
                best([g for g in same if g.cell.way == "backprop"]),
                best([g for g in same if g.cell.way == "local-backprop"]),
                best([g for g in same if (g.cell.way, g.cell.num_directions, g.cell.bits) == ("local", 5, 8)]),
            ]
            shown = ["-" if g is None else f"{g.accuracy:.3f} (lr {g.cell.lr:g})" for g in ways]
            rows.append([f"{data}, {model}", str(rounds), *shown])
    heads = ["model", "rounds", "the loss, backpropagation", "local losses, backpropagation", "rows, K = 5"]
    return table(heads, rows) if rows else "Not run yet."


def chart(found: Sequence[Result]) -> Chart:
    """Accuracy against passes over each example, an epoch of MNIST, the first seed."""
    mine = [r for r in found if (r.cell.data, r.cell.rounds, r.cell.seed) == ("mnist", 172, 0)]
    mine = [r for r in mine if r.cell.model == "lenet" and r.cell.bits in (8, 15, 32)]
    ways: tuple[tuple[Way, int, int], ...] = (("local", 8, 8), ("exact", 8, 15), ("published", 1, 15))
    lines = []
    for colour, (way, slices, bits) in enumerate(ways):
        points: dict[int, float] = {}
        for r in mine:
            if (r.cell.way, r.cell.slices, r.cell.bits) == (way, slices, bits):
                points[r.passes] = max(points.get(r.passes, 0.0), r.accuracy)
        if not points:
            continue
        x = sorted(points)
        label = TITLES[way] + (f", {slices} slices" if slices > 1 else "")
        lines.append(Line(label, np.array(x, np.float64), np.array([points[p] for p in x], np.float64), colour=colour))
    exact = max((r.accuracy for r in mine if r.cell.way == "backprop"), default=np.nan)
    lines.append(Line("backpropagation", np.array([BACKWARD], np.float64), np.array([exact]), colour=len(ways)))
    caption = f"A forward and a backward pass are counted as {BACKWARD} passes. One seed."
    title = "LeNet on MNIST after 172 rounds"
    return Chart("credit", title, caption, "passes over each example", (Panel("accuracy", tuple(lines)),), log_x=True)


def parts(found: Sequence[Result]) -> dict[str, str]:
    """What is measured, by its place in the page."""
    picture = chart(found)
    return {
        "mnist": beside_backprop(found, "mnist", "lenet"),
        "bits": by_bits(found),
        "convolutions": beside_backprop(found, "cifar10", "convolutions"),
        "wrn": beside_backprop(found, "cifar10", "wrn-10-2"),
        "transformer": beside_backprop(found, "cifar10", "transformer"),
        "passes": f"![{picture.alt}]({PICTURE})",
        "ablation mnist": ablation(found, "mnist", 86),
        "ablation cifar10": ablation(found, "cifar10", 100),
        "losses": local_losses(found),
    }


def write(found: Sequence[Result], docs: Path) -> None:
    """Write the picture, and what is measured into the page."""
    (docs / PICTURE).write_bytes(draw(chart(found)))
    page = docs / "credit.md"
    text = page.read_text()
    for name, part in parts(found).items():
        text = insert(text, name, part)
    page.write_text(text)
