"""What is plotted of one run, or of two together: series of points, without a word on how they are drawn.

`svg.py` draws them for the page, `png.py` for everything else.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from hizoo_lite.report.headline import labels
from hizoo_lite.report.record import RunRecord, number, rows
from hizoo_lite.units import format_bytes

Style = Literal["line", "faint", "dashed", "dots"]
Point = tuple[float, float]

#: Points a drawn series has at most; of more, the least and the most of each stretch are kept.
MOST_POINTS = 800
#: The running mean reaches over this part of a run.
_SMOOTH_PART = 40
_MIB, _GIB = 2**20, 2**30
#: Names of what a sample holds, in the order of their colours.
_HELD = {
    "allocated_bytes": "allocated (CUDA)",
    "reserved_bytes": "reserved (CUDA)",
    "anon_bytes": "RssAnon: allocated",
    "file_bytes": "RssFile: mapped files",
    "total_bytes": "resident",
}


class Series(NamedTuple):
    """Points joined by a line, or not."""

    label: str  # "" leaves it out of the legend
    points: list[Point]
    style: Style
    color: int  # of the palette


class Mark(NamedTuple):
    """Steps that deserve a sign at the top of a plot."""

    label: str
    steps: list[float]
    color: int


@dataclass(frozen=True)
class Chart:
    """One plot. `names` are texts for the ticks of x = 0, 1, 2, ...; with `zero` y begins at zero."""

    key: str
    title: str
    x_label: str
    y_label: str
    series: list[Series]
    note: str = ""
    marks: list[Mark] = field(default_factory=list)
    names: list[str] | None = None
    zero: bool = False
    log: bool = False

    @property
    def points(self) -> list[Point]:
        """Of all series."""
        return [point for series in self.series for point in series.points]


def make_charts(runs: Sequence[RunRecord]) -> list[Chart]:
    """Every plot that the runs have points for."""
    found = [_loss(runs), _steps_memory(runs)]
    found += [_block_memory(run, label) for run, label in zip(runs, _labels(runs), strict=True)]
    found += [
        _scalar(
            runs, "projected_grad", "Projected gradient", "along d (root mean square of several)", marks=True
        ),
        _scalar(runs, "curvature", "Curvature along the direction", "c"),
        _scalar(runs, "lr", "Learning rate", "learning rate", smooth=False),
        _scalar(runs, "seconds", "Time of a step", "ms", factor=1000.0),
    ]
    return [chart for chart in found if chart.points]


def _labels(runs: Sequence[RunRecord]) -> list[str]:
    return labels(runs) if len(runs) > 1 else [""]


def _said(label: str, what: str) -> str:
    return f"{label}: {what}" if label else what


# ------------------------------------------------------------------------------------- curves


def _loss(runs: Sequence[RunRecord]) -> Chart:
    series, marks = [], []
    for index, (run, label) in enumerate(zip(runs, _labels(runs), strict=True)):
        raw = _points(run.steps, _mean_loss)
        series += [
            Series("" if label else "each step", thin(raw), "faint", index),
            Series(_said(label, "running mean"), thin(running_mean(raw)), "line", index),
            Series(
                _said(label, "evaluation") if run.evaluations else "",
                [(x, y) for x, y in _points(run.evaluations, lambda line: number(line.get("loss")))],
                "dots",
                index if label else 2,
            ),
        ]
        marks += _marks(run, label, index)
    return Chart("loss", "Loss", "step", "loss", series, marks=marks)


def _scalar(
    runs: Sequence[RunRecord],
    key: str,
    title: str,
    y_label: str,
    *,
    marks: bool = False,
    smooth: bool = True,
    factor: float = 1.0,
) -> Chart:
    series: list[Series] = []
    found: list[Mark] = []
    for index, (run, label) in enumerate(zip(runs, _labels(runs), strict=True)):
        kept = [line for line in run.steps if not line.get("skipped")]
        raw = _points(kept, lambda line: _times(number(line.get(key)), factor))
        if smooth:
            mean = Series(_said(label, "running mean"), thin(running_mean(raw)), "line", index)
            series += [Series("" if label else "each step", thin(raw), "faint", index), mean]
        else:
            series.append(Series(label, thin(raw), "line", index))
        found += _marks(run, label, index) if marks else []
    values = [y for s in series for _, y in s.points]
    log = not smooth and bool(values) and min(values) > 0 and max(values) > 30 * min(values)
    zero = key == "seconds"
    return Chart(
        key, title, "step", y_label, [s for s in series if s.points], marks=found, log=log, zero=zero
    )


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _mean_loss(line: Mapping[str, Any]) -> float | None:
    losses = line.get("losses")
    values = [number(loss) for loss in losses] if isinstance(losses, list) else []
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def _points(
    lines: Iterable[Mapping[str, Any]], value: Callable[[Mapping[str, Any]], float | None]
) -> list[Point]:
    pairs = ((float(line["step"]), value(line)) for line in lines)
    return [(step, found) for step, found in pairs if found is not None]


def _marks(run: RunRecord, label: str, index: int) -> list[Mark]:
    kinds = (("skipped", index if label else 3), ("clipped", index if label else 4))
    found = [
        Mark(_said(label, f"{kind} step"), [x["step"] for x in run.steps if x.get(kind)], c)
        for kind, c in kinds
    ]
    return [mark for mark in found if mark.steps]


def running_mean(points: Sequence[Point]) -> list[Point]:
    """An exponential mean over a fortieth of the points, corrected for its start."""
    share = 1 / max(1.0, len(points) / _SMOOTH_PART)
    total = weight = 0.0
    found = []
    for x, y in points:
        total, weight = total + share * (y - total), weight + share * (1 - weight)
        found.append((x, total / weight))
    return found


def thin(points: list[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most `most` points: the least and the most of each stretch, so that no spike is lost."""
    if len(points) <= most:
        return points
    stretch = -(-2 * len(points) // most)
    kept: list[Point] = []
    for first in range(0, len(points), stretch):
        part = points[first : first + stretch]
        ends = {min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])}
        kept += sorted(ends)
    return kept


# ------------------------------------------------------------------------------------- memory


def _steps_memory(runs: Sequence[RunRecord]) -> Chart:
    """What was held after sampled steps, and the peaks between; against the budget."""
    series: list[Series] = []
    for index, (run, label) in enumerate(zip(runs, _labels(runs), strict=True)):
        ends = [
            s
            for s in rows(run.memory.get("samples"))
            if s.get("phase") == "train" and s.get("block") == "update"
        ]
        if not label:
            series += [
                Series(what, thin(_points(ends, lambda s, k=key: number(s.get(k)))), "line", color)  # type: ignore[misc]
                for color, (key, what) in enumerate(_present(ends).items())
            ]
        color = index if label else 5
        peaks = [(float(x), float(y)) for x, y in _pairs(run.memory.get("step_peaks"))]
        series.append(Series(_said(label, "peak"), thin(peaks), "line", color))
        series += _limits(run, label, color, peaks)
    unit, word = _unit(y for s in series for _, y in s.points)
    scaled = [s._replace(points=[(x, y / unit) for x, y in s.points]) for s in series if s.points]
    return Chart("memory", "Memory over the steps", "step", word, scaled, zero=True)


def _limits(run: RunRecord, label: str, color: int, peaks: Sequence[Point]) -> list[Series]:
    """Flat lines: the budget and, of a run alone, the peak of inference."""
    if not peaks:
        return []
    span = (peaks[0][0], peaks[-1][0])
    found = []
    lines = (("budget_bytes", "budget", 3), ("inference_peak_bytes", "inference peak", 6))
    for key, what, c in lines[:1] if label else lines:
        value = number(run.summary.get(key)) or number(run.memory.get(key))
        if value is not None:
            points = [(x, value) for x in span]
            found.append(Series(_said(label, what), points, "dashed", color if label else c))
    return found


def _pairs(value: Any) -> list[Any]:
    found = value if isinstance(value, list) else []
    return [pair for pair in found if isinstance(pair, list) and len(pair) == 2 and None not in pair]


def _present(samples: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The kinds of bytes that these samples have, with their words."""
    return {key: what for key, what in _HELD.items() if any(key in sample for sample in samples)}


def _block_memory(run: RunRecord, label: str) -> Chart:
    """What changed from block to block, in the first and the newest sampled step and in inference."""
    samples = [s for s in rows(run.memory.get("samples")) if s.get("block") != "end"]
    train = [s for s in samples if s.get("phase") == "train"]
    steps = sorted({s["step"] for s in train if number(s.get("step")) is not None})
    styles: tuple[Style, ...] = ("line", "faint")
    passes: list[tuple[str, list[dict[str, Any]], Style]] = [
        (f"step {step}", [s for s in train if s["step"] == step], style)
        for step, style in zip(dict.fromkeys([*steps[:1], *steps[-1:]]), styles, strict=False)
    ]
    passes.append(("inference", [s for s in samples if s.get("phase") == "inference"], "dashed"))
    places = _places([s for _, part, _ in passes for s in part])
    series = [
        Series(f"{words.split(':')[0]}, {what}", _changes(part, key, places), style, color)
        for what, part, style in passes
        for color, (key, words) in enumerate(_present(part).items())
    ]
    if any("CUDA" in one.label for one in series):
        series = [one for one in series if "CUDA" in one.label]  # the host's is in the plot over the steps
    unit, word = _unit(abs(y) for s in series for _, y in s.points)
    scaled = [s._replace(points=[(x, y / unit) for x, y in s.points]) for s in series if s.points]
    named = ["start" if place == "None" else place for place in places]
    title = "Memory through the blocks of a step" + (f", {label}" if label else "")
    note = _block_note(passes[0][1] if steps else [])
    return Chart(f"blocks{label}", title, "block", f"change, {word}", scaled, note=note, names=named)


def _changes(part: Sequence[Mapping[str, Any]], key: str, places: Sequence[str]) -> list[Point]:
    """The most at every place, less what was held at the start."""
    known = [(str(s.get("block")), number(s.get(key))) for s in part]
    start = next((value for _, value in known if value is not None), 0.0)
    highest: dict[str, float] = {}
    for place, value in known:
        if value is not None:
            highest[place] = max(highest.get(place, value - start), value - start)
    return sorted((float(places.index(place)), change) for place, change in highest.items())


def _block_note(step: Sequence[Mapping[str, Any]]) -> str:
    held = [
        f"{format_bytes(int(number(step[0].get(key)) or 0))} {what.split(':')[0]}"
        for key, what in _present(step).items()
    ]
    held = [text for text in held if "CUDA" in text] or held
    if not held:
        return ""
    return (
        f"Change since the start of each pass; step {step[0].get('step')} began with {' and '.join(held)}. "
        "Inference is one evaluation forward of a training batch."
    )


def _places(samples: Sequence[Mapping[str, Any]]) -> list[str]:
    """Places in the order of a traversal: start, blocks, head, update."""
    found = {sample.get("block") for sample in samples}
    blocks = sorted(place for place in found if isinstance(place, int))
    named = [place for place in ("head", "update") if place in found]
    return [*(["None"] if None in found else []), *map(str, blocks), *named]


def _unit(values: Iterable[float]) -> tuple[float, str]:
    most = max(values, default=0.0)
    if most >= 4 * _GIB:
        return _GIB, "GiB"
    return (_MIB, "MiB") if most >= _MIB / 4 else (1024, "KiB")
