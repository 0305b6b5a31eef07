"""Charts as inline SVG: text stays text, colours are the page's, and one unit is one pixel.

Each chart is drawn twice, for a wide and for a narrow column; the page shows the one that fits, so that
neither letters nor lines are scaled down on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from hizoo_lite.report.charts import Chart, Mark, Point, Series

#: Pixels of a letter of 12 pixel type, generously.
_LETTER = 7.0
_TOP, _BOTTOM, _RIGHT = 10, 40, 12
#: Height of a row of marks above the plot.
_MARK = 9
#: From so many points on a faint line becomes a band, and is drawn fainter.
_DENSE = 250
WIDE, NARROW = (540, 300), (340, 240)


class _Axis(NamedTuple):
    """A range of values on a range of pixels."""

    low: float
    high: float
    first: float
    last: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        return self.first + (value - low) / (high - low) * (self.last - self.first)


def draw(chart: Chart, size: tuple[int, int] = WIDE, name: str = "") -> str:
    """The <svg> of a chart. `name` makes its ids unique on the page."""
    width, height = size
    y_low, y_high = _range([y for _, y in chart.points], chart.zero, chart.log)
    y_ticks = _log_ticks(y_low, y_high) if chart.log else ticks(y_low, y_high, (height - 54) // 42)
    y_texts = tick_texts(y_ticks, chart.log)
    top = _TOP + _MARK * len(chart.marks)
    left = 26 + _LETTER * max(map(len, y_texts), default=1)
    x_low, x_high = _range([x for x, _ in chart.points], False, False, pad=0.0)
    x_axis = _Axis(x_low, x_high, left, width - _RIGHT)
    y_axis = _Axis(y_low, y_high, height - _BOTTOM, top, chart.log)
    parts = [
        *_y_grid(y_axis, y_ticks, y_texts, left, width - _RIGHT),
        *_x_grid(chart, x_axis, height - _BOTTOM),
        f'<text class="axis" x="{(left + width - _RIGHT) / 2:.0f}" y="{height - 6}">'
        f"{escape(chart.x_label)}</text>",
        f'<text class="axis" transform="translate(13 {(top + height - _BOTTOM) / 2:.0f}) rotate(-90)">'
        f"{escape(chart.y_label)}</text>",
        *(_series(series, x_axis, y_axis) for series in chart.series),
        *(_mark(mark, x_axis, 2 + _MARK * row) for row, mark in enumerate(chart.marks)),
    ]
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-labelledby="{name}-title" '
        f'xmlns="http://www.w3.org/2000/svg"><title id="{name}-title">{escape(_spoken(chart))}</title>'
        + "".join(parts)
        + "</svg>"
    )


def _spoken(chart: Chart) -> str:
    """What a screen reader says: the title, and where every line begins and ends."""
    ends = [
        f"{s.label} from {s.points[0][1]:.4g} to {s.points[-1][1]:.4g}"
        for s in chart.series
        if s.label and s.points
    ]
    return f"{chart.title} ({chart.y_label}): " + "; ".join(ends)


def _range(values: Sequence[float], zero: bool, log: bool, pad: float = 0.06) -> tuple[float, float]:
    low, high = min(values), max(values)
    if log:
        return low / 1.3, high * 1.3
    if zero:
        low = min(0.0, low)
    if high == low:
        room = abs(high) * 0.1 or 1.0
        return low - room * (not zero), high + room
    room = pad * (high - low)
    return low - (0.0 if zero and low == 0.0 else room), high + room


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers between low and high."""
    rough = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    few = [10.0**p for p in powers]
    fine = [f * p for p in few for f in (1, 2, 5)]
    chosen = few if sum(low <= t <= high for t in few) >= 3 else fine
    return [t for t in chosen if low <= t <= high]


def tick_texts(values: Sequence[float], log: bool = False) -> list[str]:
    """With as many digits as tell them apart; very large and small ones in powers of ten."""
    if not values:
        return []
    most = max(map(abs, values))
    if log or most >= 1e6 or 0 < most < 1e-3:
        return ["0" if v == 0 else f"{v:.3g}".replace("e-0", "e-").replace("e+0", "e") for v in values]
    step = abs(values[1] - values[0]) if len(values) > 1 else most or 1.0
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    digits += abs(round(step, digits) - step) > 1e-6 * step  # a step of 2.5
    return [f"{0.0 if v == 0 else v:.{digits}f}" for v in values]


def _y_grid(
    axis: _Axis, values: Sequence[float], texts: Sequence[str], left: float, right: float
) -> list[str]:
    return [
        f'<line class="grid" x1="{left:.1f}" x2="{right:.1f}" y1="{axis(v):.1f}" y2="{axis(v):.1f}"/>'
        f'<text class="tick end" x="{left - 6:.1f}" y="{axis(v) + 4:.1f}">{text}</text>'
        for v, text in zip(values, texts, strict=True)
    ]


def _x_grid(chart: Chart, axis: _Axis, bottom: float) -> list[str]:
    room = axis.last - axis.first
    if chart.names is None:
        values = [v for v in ticks(axis.low, axis.high, int(room // 60)) if v == int(v)]
        pairs = list(zip(values, tick_texts(values), strict=True))
    else:
        pairs = _named_ticks(chart.names, room)
    return [
        f'<line class="grid" x1="{axis(v):.1f}" x2="{axis(v):.1f}" y1="{bottom:.1f}" y2="{bottom + 4:.1f}"/>'
        f'<text class="tick {_anchor(axis, v, text)}" x="{axis(v):.1f}" y="{bottom + 17:.1f}">'
        f"{escape(text)}</text>"
        for v, text in pairs
    ]


def _anchor(axis: _Axis, value: float, text: str) -> str:
    """Centred below the tick, but not beyond the right edge."""
    return "end" if axis(value) + _LETTER * len(text) / 2 > axis.last + _RIGHT else "middle"


def _named_ticks(names: Sequence[str], room: float) -> list[tuple[float, str]]:
    """The first, the last, and round numbers between them, as many as have room beside each other."""
    last = len(names) - 1
    gap = room / max(1, last)
    widest = _LETTER * max(map(len, names)) + 10
    every = next(n for n in (1, 2, 5, 10, 20, 50, 100, 200, 500, len(names)) if n * gap >= widest / 2 + 4)
    ends = (widest / 2, room - widest - _LETTER)  # the last is anchored at its end
    inside = [
        (float(index), name)
        for index, name in enumerate(names[1:-1], start=1)
        if ends[0] < index * gap < ends[1] and (int(name) % every == 0 if name.isdecimal() else every == 1)
    ]
    return [(0.0, names[0]), *inside, (float(last), names[-1])] if last else [(0.0, names[0])]


def _series(series: Series, x_axis: _Axis, y_axis: _Axis) -> str:
    at = [(x_axis(x), y_axis(y)) for x, y in series.points]
    if series.style == "dots" or len(at) == 1:
        return "".join(
            f'<circle class="dot f{series.color}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>' for x, y in at
        )
    dense = " dense" if series.style == "faint" and len(at) > _DENSE else ""
    return f'<polyline class="{series.style}{dense} c{series.color}" points="{_path(at)}"/>'


def _path(points: Sequence[Point]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _mark(mark: Mark, axis: _Axis, y: float) -> str:
    """Triangles in a row above the plot, one for each pixel column that has any."""
    columns = sorted({round(axis(step)) for step in mark.steps})
    return "".join(f'<path class="f{mark.color}" d="M{x - 3.5} {y}h7l-3.5 6z"/>' for x in columns)
