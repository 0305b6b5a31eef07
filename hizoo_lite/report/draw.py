"""Charts by matplotlib: SVG for the page, whose colours and font they take on, and all of them in one PNG."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from hizoo_lite.report.charts import Chart
from hizoo_lite.report.headline import Category
from hizoo_lite.units import format_bytes

#: Pixels of a chart in a wide and in a narrow column; the page shows the one whose letters need no scaling.
WIDE, NARROW = (540, 300), (340, 240)
_PALETTE = ("#2563eb", "#d9560b", "#0f8a5f", "#c81e3a", "#9a6700", "#7c3aed", "#5b6472")
_TEXT, _GRID, _FRAME = "#565d67", "#e8ebef", "#dde1e6"
#: The page's name of each colour, which has another value on a dark page.
_VARIABLES = {color: f"var(--c{i})" for i, color in enumerate(_PALETTE)} | {
    _TEXT: "var(--soft)",
    _GRID: "var(--grid)",
    _FRAME: "var(--line)",
}
_STYLES: dict[str, dict[str, Any]] = {
    "line": {"lw": 1.8},
    "faint": {"lw": 0.8, "alpha": 0.4},
    "dashed": {"lw": 1.3, "ls": "--"},
    "dots": {"lw": 0, "marker": "o", "ms": 5},
    "squares": {"lw": 1.3, "ls": ":", "marker": "s", "ms": 5},
    "diamonds": {"lw": 0, "marker": "D", "ms": 7},
    "marks": {"lw": 0, "marker": "v", "ms": 6, "clip_on": False},
}
_SETTINGS = {
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # a dollar sign is one
    "font.size": 12,
    "axes.titlesize": 13,
    "legend.fontsize": 12,
    "legend.frameon": False,
    "text.color": _TEXT,
    **{f"{name}.color": _TEXT for name in ("xtick", "ytick")},
    **{f"axes.{name}": _TEXT for name in ("labelcolor", "titlecolor")},
    "axes.edgecolor": _FRAME,
    "axes.grid": True,
    "grid.color": _GRID,
    "axes.axisbelow": True,
    **{f"axes.spines.{side}": False for side in ("left", "right", "top")},
    "figure.constrained_layout.use": True,
}
_LONGEST = 32  # letters of a label
_INCH = 72  # pixels: what matplotlib calls a point
_LETTER, _SAMPLE, _ROW = 7, 44, 18  # pixels of a legend: a letter's width, a line's sample, a row's height
_WIDTH, _HEIGHT = 600, 400  # pixels of a chart in the PNG
_CATEGORY, _AROUND = 32, 100  # of the bars: a category's two labels, and title, legend and axis together


def svg(chart: Chart, size: tuple[int, int]) -> str:
    """The <svg> of a chart, without its title."""
    width, height = size
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(width / _INCH, (height + _legend_height(chart, width)) / _INCH))
        _draw(figure, chart, width)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*">', "<g>", text)  # they are the same in every chart
    return re.sub("|".join(_VARIABLES), lambda match: _VARIABLES[match[0]], text)


def png(charts: Sequence[Chart], categories: Mapping[str, Sequence[Category]], title: str, out: Path) -> None:
    """Write every chart, and the categories of memory of every run by its name, in two columns."""
    with matplotlib.rc_context(_SETTINGS):
        picture(charts, categories, title).savefig(out, dpi=1.5 * _INCH, format="png")


def picture(charts: Sequence[Chart], categories: Mapping[str, Sequence[Category]], title: str) -> Figure:
    """What `png` writes. A line with many categories is higher, so that their labels have room."""
    bars = {name: found for name, found in categories.items() if found}
    wanted = [_HEIGHT] * len(charts) + [_AROUND + _CATEGORY * len(found) for found in bars.values()]
    heights = [max(_HEIGHT, *wanted[first : first + 2]) for first in range(0, len(wanted), 2)] or [_HEIGHT]
    figure = Figure(figsize=(2 * _WIDTH / _INCH, (sum(heights) + 40) / _INCH))
    figure.suptitle(title, fontsize=15)
    parts = figure.subfigures(len(heights), 2, squeeze=False, height_ratios=heights).ravel().tolist()
    for chart in charts:
        _draw(part := parts.pop(0), chart, _WIDTH)
        part.axes[0].set_title(chart.title)
    for name, found in bars.items():
        _bars(parts.pop(0), found, "Memory by category" + f", {name}" * (len(categories) > 1))
    return figure


def _legend(chart: Chart, width: int) -> tuple[list[str], int]:
    """(labels, columns)."""
    labels = [_cut(series.label) for series in [*chart.series, *chart.marks] if series.label]
    widest = max(map(len, labels), default=1)
    return labels, max(1, min(len(labels), width // (_SAMPLE + _LETTER * widest)))


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def _legend_height(chart: Chart, width: int) -> int:
    labels, columns = _legend(chart, width)
    return _ROW * -(-len(labels) // columns) if len(labels) > 1 else 0


def _draw(figure: Any, chart: Chart, width: int) -> None:
    axes = figure.subplots()
    for series in [*chart.series, *chart.marks]:
        xs, ys = zip(*series.points, strict=True)
        style = _STYLES[series.style]
        style = style if len(xs) > 1 or "marker" in style else _STYLES["dots"]
        over = {"transform": axes.get_xaxis_transform()} if series.style == "marks" else {}
        axes.plot(xs, ys, color=_PALETTE[series.color], label=_cut(series.label) or "_", **style, **over)
    axes.set(xlabel=chart.x_label, ylabel=chart.y_label)
    axes.grid(visible=False, axis="x")
    if chart.log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))  # without formulas
        axes.yaxis.set_minor_formatter(NullFormatter())
    if chart.zero:
        axes.set_ylim(bottom=0)
    if chart.names is None:
        axes.xaxis.set_major_locator(MaxNLocator(width // 60, integer=True))
    else:
        last = len(chart.names) - 1
        every = -(-(last + 1) // (width // 48))
        shown = [i for i in range(0, last + 1, every) if i + every <= last] + [last]
        axes.set_xticks(shown, [chart.names[i] for i in shown])
    labels, columns = _legend(chart, width)
    if len(labels) > 1:
        figure.legend(loc="outside upper center", ncols=columns)


def _bars(figure: Any, categories: Sequence[Category], title: str) -> None:
    axes = figure.subplots()
    for side, name in enumerate(("predicted", "measured")):
        sizes = [getattr(category, f"{name}_bytes") for category in categories]
        places = [row + 0.4 * side for row in range(len(categories))]
        drawn = axes.barh(
            places, [(size or 0) / 2**20 for size in sizes], 0.38, color=_PALETTE[1 - side], label=name
        )
        labels = ["" if size is None else format_bytes(int(size)) for size in sizes]
        axes.bar_label(drawn, labels, padding=2, fontsize=10)
    axes.set_yticks([row + 0.2 for row in range(len(categories))], [_cut(found.name) for found in categories])
    axes.invert_yaxis()
    axes.margins(x=0.18)
    axes.grid(visible=False, axis="y")
    axes.set(title=title, xlabel="MiB")
    figure.legend(loc="outside upper center", ncols=2)
