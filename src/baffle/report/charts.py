"""Charts as values, and their drawing to PNG: matplotlib's objects only, no window, no global state.

A chart says what is drawn (panels above one another on one x axis); ``draw`` makes the picture. Long curves are
binned to their mean within the band of their extremes. Colours: Okabe and Ito's palette for the colour-blind
(jfly.uni-koeln.de/color, 2008).
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from baffle.errors import MissingExtraError

try:
    import matplotlib
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator
except ImportError as error:
    raise MissingExtraError("reports need matplotlib: pip install 'baffle[plots]'") from error

Floats = npt.NDArray[np.float64]
Style = Literal["line", "dashed", "dots"]

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES = ("-", (0, (6, 2)), (0, (2, 1)), (0, (8, 2, 2, 2)))
_MARKERS = "osD^vP*X"
_MARK_STYLES = {"no update": ("#666666", ":"), "rollback": ("#B22222", "--")}
_MOST_POINTS, _MOST_MARKERS = 600, 40
_LOG_RANGE = 50.0  # smallest quotient of the extremes that an automatic axis shows as logarithms


@dataclass(frozen=True, eq=False)
class Line:
    """A curve; points that are not finite are left out. ``low`` and ``high`` are the ends of its error bars.

    ``colour`` counts through the palette; curves of one label share an entry of the legend.
    """

    label: str
    x: Floats
    y: Floats
    style: Style = "line"
    colour: int = 0
    low: Floats | None = None
    high: Floats | None = None


@dataclass(frozen=True, eq=False)
class Panel:
    """One y axis: curves, or columns ``(x, heights)``, or an image ``[rows, columns]`` of 0 to ``most``.

    ``shade`` says what an image shows. ``log`` None: a logarithmic axis where the values need it. ``low`` and ``high``
    fix the axis's ends.
    """

    label: str
    lines: tuple[Line, ...] = ()
    columns: tuple[Floats, Floats] | None = None
    image: Floats | None = None
    most: float = 1.0
    shade: str = ""
    extent: tuple[float, float, float, float] = (0, 1, 0, 1)
    log: bool | None = False
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, eq=False)
class Chart:
    """A figure: its file's name, a title, how to read it, and panels that share the x axis.

    ``marks`` are vertical lines: where, and which of "no update" and "rollback". ``log_x``: a logarithmic x axis, on
    which points at 0 are left out.
    """

    name: str
    title: str
    caption: str
    xlabel: str
    panels: tuple[Panel, ...]
    marks: tuple[tuple[float, str], ...] = ()
    log_x: bool = False

    @property
    def alt(self) -> str:
        """The chart in words, for readers who cannot see it."""
        return " ".join([f"{self.title}.", *(self._panel_in_words(panel) for panel in self.panels)])

    def _panel_in_words(self, panel: Panel) -> str:
        parts = [f"{panel.label} against {self.xlabel}"]
        for line in panel.lines:
            x, y = _finite(line.x, line.y)
            if len(x):
                parts.append(f"{line.label} from {y[0]:.4g} at {x[0]:.4g} to {y[-1]:.4g} at {x[-1]:.4g}")
        if panel.columns is not None:
            heights = panel.columns[1]
            parts.append(f"{len(heights)} columns from {heights.min():g} to {heights.max():g}")
        return "; ".join(parts) + "."


def draw(chart: Chart) -> bytes:
    """The chart as a PNG; the same chart gives the same bytes with the same matplotlib."""
    with _style():
        legend = len(_labels(chart))
        height = 1.1 + sum(2.3 if len(chart.panels) == 1 else 1.75 for _ in chart.panels)
        figure = Figure(figsize=(5.4, height + 0.21 * legend), dpi=160, layout="constrained")
        axes: list[Axes] = list(figure.subplots(len(chart.panels), 1, sharex=True, squeeze=False)[:, 0])
        for ax, panel in zip(axes, chart.panels, strict=True):
            _draw_panel(ax, panel)
            for x, kind in chart.marks:
                colour, dash = _MARK_STYLES[kind]
                ax.axvline(x, color=colour, linestyle=dash, linewidth=1, label=kind, zorder=1)
        if chart.log_x:
            axes[0].set_xscale("log", nonpositive="mask")
            axes[0].xaxis.set_major_formatter(FuncFormatter(lambda value, position: f"{value:g}"))
        axes[0].set_title(chart.title, loc="left")
        axes[-1].set_xlabel(chart.xlabel)
        figure.align_ylabels(axes)
        if legend:
            entries = _entries(axes, _labels(chart))
            columns = 1 if max(map(len, entries)) > 24 else 2
            figure.legend(list(entries.values()), list(entries), loc="outside lower left", ncols=columns)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
        return buffer.getvalue()


def drawable(text: str, most: int = 40) -> str:
    """Reduce a text to one line of at most ``most`` characters that the font has.

    Examples:
        >>> drawable("a\\nb"), drawable("0123456789", most=7)
        ('a?b', '012…789')
    """
    known = (range(0x20, 0x250), range(0x370, 0x500))  # Latin, Greek, Cyrillic
    clean = "".join(c if c.isprintable() and any(ord(c) in r for r in known) else "?" for c in text)
    clean = f" {clean}" if clean.startswith("_") else clean  # matplotlib hides such labels
    half = (most - 1) // 2
    return clean if len(clean) <= most else f"{clean[: most - 1 - half]}…{clean[-half:]}"


def thin(x: Floats, y: Floats, most: int = _MOST_POINTS) -> tuple[Floats, Floats, Floats, Floats]:
    """At most ``most`` points: x and y as means of bins of equal length, and each bin's least and largest y.

    Examples:
        >>> [part.tolist() for part in thin(np.arange(4.0), np.array([1.0, 3, 5, 5]), most=2)]
        [[0.5, 2.5], [2.0, 5.0], [1.0, 5.0], [3.0, 5.0]]
    """
    if len(x) <= most:
        return x, y, y, y
    starts = np.arange(most) * len(x) // most
    counts = np.diff(np.append(starts, len(x)))
    x_mean, y_mean = (np.add.reduceat(a, starts) / counts for a in (x, y))
    return x_mean, y_mean, np.minimum.reduceat(y, starts), np.maximum.reduceat(y, starts)


def unit(kind: str, largest: float) -> tuple[float, str]:
    """The unit in which an axis of ``kind`` (rounds, passes, bytes, seconds) is legible: its size and its label.

    Examples:
        >>> unit("bytes", 3e6), unit("seconds", 90)
        ((1000000.0, 'bytes up (MB)'), (1.0, 'time (s)'))
    """
    sizes: dict[str, list[tuple[float, str]]] = {
        "passes": [(1, "forward passes"), (1e3, "forward passes (thousands)"), (1e6, "forward passes (millions)")],
        "bytes": [(1, "bytes up (B)"), (1e3, "bytes up (kB)"), (1e6, "bytes up (MB)"), (1e9, "bytes up (GB)")],
        "seconds": [(1, "time (s)"), (60, "time (min)"), (3600, "time (h)")],
    }
    fitting = [(float(size), label) for size, label in sizes.get(kind, [(1, "round")]) if largest >= 3 * size]
    return fitting[-1] if fitting else (1.0, sizes.get(kind, [(1, "round")])[0][1])


@contextmanager
def _style() -> Iterator[None]:
    """Use matplotlib's defaults and ours instead of the user's settings, which are restored afterwards."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rc("font", size=11)
        matplotlib.rc("axes", titlesize=12, titleweight="bold", grid=True)
        matplotlib.rc("axes.spines", top=False, right=False)
        matplotlib.rc("grid", color="#dddddd", linewidth=0.6)
        matplotlib.rc("legend", frameon=False, fontsize=10)
        matplotlib.rc("text", parse_math=False)  # a dollar in a folder's name is a dollar
        yield


def _draw_panel(ax: Axes, panel: Panel) -> None:
    ax.set_ylabel(panel.label)
    ax.set_axisbelow(True)
    for line in panel.lines:
        _draw_line(ax, line)
    if panel.columns is not None:
        x, heights = panel.columns
        width = 0.8 * (float(x[1] - x[0]) if len(x) > 1 else 1.0)
        ax.bar(x, heights, width, color=_COLOURS[0])
        ax.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    if panel.image is not None:
        ax.grid(False)
        image = ax.imshow(
            panel.image, "Blues", aspect="auto", interpolation="nearest", vmin=0, vmax=panel.most, extent=panel.extent
        )
        if not np.isin(panel.image, (0, 1)).all():
            ax.figure.colorbar(image, ax=ax, label=panel.shade)
        ax.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    if _is_log(panel):
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, position: f"{value:g}"))
        ax.yaxis.set_minor_formatter(FuncFormatter(lambda value, position: ""))
    elif panel.lines:
        ax.yaxis.set_major_locator(MaxNLocator(5))
    if panel.columns is not None or panel.image is not None or _is_whole(panel):
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    else:
        ax.xaxis.set_major_locator(MaxNLocator(6))
    ax.set_ylim(bottom=panel.low, top=panel.high)
    if panel.low is not None and panel.lines:
        ax.set_ylim(bottom=panel.low - 0.03 * (ax.get_ylim()[1] - panel.low))  # a curve on the axis stays in sight


def _draw_line(ax: Axes, line: Line) -> None:
    x, y = _finite(line.x, line.y)
    colour, dash = _COLOURS[line.colour % len(_COLOURS)], _DASHES[line.colour // len(_COLOURS) % len(_DASHES)]
    marker = _MARKERS[line.colour % len(_MARKERS)]
    if line.low is not None and line.high is not None:
        known = np.isfinite(line.x) & np.isfinite(line.y)
        ax.vlines(x, line.low[known], line.high[known], color=colour, linewidth=1.2)
        ax.plot(x, y, marker, color=colour, markersize=5, label=line.label)
    elif line.style == "dots" and len(x) <= _MOST_POINTS:
        ax.plot(x, y, ".", color=colour, markersize=4, alpha=0.6, label=line.label)
    else:
        mean_x, mean, least, most = thin(x, y)
        if len(mean) < len(y):
            ax.fill_between(mean_x, least, most, color=colour, alpha=0.2, linewidth=0)
        few = len(mean) <= _MOST_MARKERS and line.style == "line"
        dash = (0, (4, 2)) if line.style == "dashed" else dash
        ax.plot(
            mean_x,
            mean,
            color=colour,
            linestyle=dash,
            linewidth=1.6 if line.style == "line" else 1.2,
            marker=marker if few else "",
            markersize=3.5,
            label=line.label,
        )


def _labels(chart: Chart) -> dict[str, None]:
    """What a legend must explain: marks, and curves whose axis does not name them."""
    curves = [
        line.label
        for panel in chart.panels
        for line in panel.lines
        if len(panel.lines) > 1 or line.label != panel.label
    ]
    return dict.fromkeys([*curves, *(kind for _, kind in chart.marks)])


def _entries(axes: Sequence[Axes], labels: Iterable[str]) -> dict[str, Artist]:
    """Label -> its first artist, over all panels."""
    artists = {str(artist.get_label()): artist for ax in reversed(axes) for artist in reversed(ax.lines)}
    return {label: artists[label] for label in labels if label in artists}


def _finite(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    known = np.isfinite(x) & np.isfinite(y)
    return x[known], y[known]


def _is_whole(panel: Panel) -> bool:
    """Whether x counts something."""
    return all(bool((x == np.rint(x)).all()) for x in (_finite(line.x, line.y)[0] for line in panel.lines))


def _is_log(panel: Panel) -> bool:
    values = np.concatenate([_finite(line.x, line.y)[1] for line in panel.lines] or [np.empty(0)])
    if panel.log is False or not len(values) or values.min() <= 0:
        return False
    return panel.log is True or math.log(values.max() / values.min()) > math.log(_LOG_RANGE)
