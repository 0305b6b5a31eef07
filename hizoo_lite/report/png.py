"""The same charts as one PNG, through matplotlib, for where a page cannot go: an issue, a slide, a chat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hizoo_lite.report.charts import Chart
from hizoo_lite.report.headline import Owner
from hizoo_lite.units import format_bytes

PALETTE = ("#2563eb", "#d9560b", "#0f8a5f", "#c81e3a", "#9a6700", "#7c3aed", "#5b6472")
_MIB = 2**20
_COLUMNS = 2
_LINES: dict[str, dict[str, Any]] = {
    "line": {"lw": 1.6},
    "faint": {"lw": 0.7, "alpha": 0.35},
    "dashed": {"lw": 1.2, "ls": "--"},
    "dots": {"lw": 0, "marker": "o", "ms": 4},
}


def save(charts: Sequence[Chart], owners: Mapping[str, Sequence[Owner]], title: str, out: Path) -> None:
    """Write every chart, and the owners of memory of every run by its name, in two columns."""
    import matplotlib
    from matplotlib.figure import Figure

    known = {name: found for name, found in owners.items() if found}
    count = len(charts) + len(known)
    lines = max(1, -(-count // _COLUMNS))
    with matplotlib.rc_context({"font.size": 9, "axes.titlesize": 10, "axes.grid": True, "grid.alpha": 0.25}):
        figure = Figure(figsize=(11, 3.2 * lines + 0.5), layout="constrained")
        figure.suptitle(_literal(title), fontsize=12)
        for index, chart in enumerate(charts):
            _draw(figure.add_subplot(lines, _COLUMNS, index + 1), chart)
        for index, (name, found) in enumerate(known.items(), start=len(charts)):
            label = f", {name}" if len(owners) > 1 else ""
            _bars(figure.add_subplot(lines, _COLUMNS, index + 1), found, f"Memory by owner{label}")
        figure.savefig(out, dpi=130, format="png")


def _literal(text: str) -> str:
    """A dollar sign would begin a formula."""
    return text.replace("$", r"\$")


def _draw(axes: Any, chart: Chart) -> None:
    for series in chart.series:
        xs, ys = zip(*series.points, strict=True) if series.points else ((), ())
        label = _literal(series.label) or "_none"
        axes.plot(xs, ys, color=PALETTE[series.color], label=label, **_LINES[series.style])
    for mark in chart.marks:
        axes.plot(
            mark.steps,
            [1.0] * len(mark.steps),
            "v",
            ms=5,
            color=PALETTE[mark.color],
            label=_literal(mark.label),
            transform=axes.get_xaxis_transform(),
            clip_on=False,
        )
    axes.set(title=_literal(chart.title), xlabel=chart.x_label, ylabel=chart.y_label)
    if chart.log:
        axes.set_yscale("log")
    if chart.zero:
        axes.set_ylim(bottom=0, top=1.06 * max(y for _, y in chart.points) or None)
    if chart.names is not None:
        every = -(-len(chart.names) // 10)
        shown = [i for i in range(len(chart.names)) if i % every == 0 and i + every < len(chart.names)]
        shown.append(len(chart.names) - 1)
        axes.set_xticks(shown, [chart.names[i] for i in shown])
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(fontsize=7, framealpha=0.8)


def _bars(axes: Any, owners: Sequence[Owner], title: str) -> None:
    for side, (key, label) in enumerate((("predicted_bytes", "predicted"), ("measured_bytes", "measured"))):
        sizes = [getattr(owner, key) for owner in owners]
        places = [index + 0.4 * side for index in range(len(owners))]
        drawn = axes.barh(
            places, [(s or 0) / _MIB for s in sizes], 0.38, color=PALETTE[1 - side], label=label
        )
        texts = ["" if s is None else format_bytes(int(s)) for s in sizes]
        axes.bar_label(drawn, texts, fontsize=7, padding=2)
    axes.set_yticks([i + 0.2 for i in range(len(owners))], [_literal(owner.name) for owner in owners])
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set(title=_literal(title), xlabel="MiB")
    axes.legend(fontsize=7)
