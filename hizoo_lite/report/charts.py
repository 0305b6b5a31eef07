"""What is plotted of one run, or of two together: series of points, without a word on how they are drawn."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from hizoo_lite.config import default
from hizoo_lite.report.headline import labels, objective_of
from hizoo_lite.report.record import RunRecord, number, rows
from hizoo_lite.units import format_bytes

Style = Literal["line", "faint", "dashed", "dots", "squares", "diamonds", "marks"]
Point = tuple[float, float]

#: Points a drawn series has at most; of more, the least and the most of each stretch are kept.
MOST_POINTS = 800
#: The running mean reaches over this part of a run, and over so many points at least.
_SMOOTH_PART, _SMOOTH_POINTS = 15, 8.0
_MIB, _GIB = 2**20, 2**30
#: Evaluations of one part of the data: label, `when` in metrics.jsonl, style, colour of a run that is alone.
_EVALUATED: tuple[tuple[str, tuple[str, ...], Style, int], ...] = (
    ("dev evaluation", ("dev",), "squares", 5),
    ("test evaluation", ("before", "after"), "diamonds", 2),
)
#: The unit of a learning rate whose scale the optimizer has by itself.
_SHARE = "share of the highest rate"
#: What a sample of memory holds, in the order of colours.
_HELD = {
    "allocated_bytes": "allocated (CUDA)",
    "reserved_bytes": "reserved (CUDA)",
    "anon_bytes": "private memory",
    "file_bytes": "mapped files",
    "total_bytes": "resident",
}


class Series(NamedTuple):
    """Points joined by a line, or not."""

    label: str  # "" leaves it out of the legend
    points: list[Point]
    style: Style
    color: int  # of the palette


@dataclass(frozen=True)
class Chart:
    """One plot. `names` are texts for the ticks of x = 0, 1, 2, ...; with `zero` y begins at zero."""

    key: str
    title: str
    y_label: str
    series: list[Series]  # none is empty
    x_label: str = "step"
    note: str = ""
    marks: list[Series] = field(default_factory=list)  # steps to mark at the top, where y = 1
    names: list[str] | None = None
    zero: bool = False
    log: bool = False

    @property
    def spoken(self) -> str:
        """A sentence for who does not see the plot: where every line begins and ends."""
        lines = [(s.label, s.points[0][1], s.points[-1][1]) for s in self.series if s.label]
        ends = [f"{label} from {first:.4g} to {last:.4g}" for label, first, last in lines]
        counts = [f"{len(mark.points)} {mark.label}{'s' * (len(mark.points) > 1)}" for mark in self.marks]
        return f"In {self.y_label}: " * (self.y_label in ("ms", "MiB")) + "; ".join(ends + counts)


def make_charts(runs: Sequence[RunRecord]) -> list[Chart]:
    """Every plot that the runs have points for."""
    found = []
    for objective in dict.fromkeys(map(objective_of, runs)):
        alike = [run for run in runs if objective_of(run) == objective]
        if objective is None:
            found.append(_curve(alike, "loss", "Loss", "loss", _mean_loss, marks=True))
        else:  # what a step minimizes is minus the value
            title = f"Objective {objective}"
            found.append(_curve(alike, "objective", title, objective, _mean_value, marks=True))
    found.append(_steps_memory(runs))
    found += [_block_memory(run, label) for run, label in _named(runs)]
    for key, title, y_label in (
        ("projected_grad", "Projected gradient", "slope (RMS over directions)"),
        ("curvature", "Curvature along the direction", "curvature"),
    ):
        found.append(_curve(runs, key, title, y_label, _value(key), marks=key == "projected_grad"))
    for key, title, y_label, alike in (
        ("lr", "Learning rate", "learning rate", [run for run in runs if not _has_shares(run)]),
        ("lr_share", "Learning rate over its highest", _SHARE, [run for run in runs if _has_shares(run)]),
    ):
        if alike:
            whose = f", {alike[0].name}" if len(alike) < len(runs) else ""
            found.append(_curve(alike, key, title + whose, y_label, _value("lr"), smooth=False))
    found.append(_curve(runs, "seconds", "Time of a step", "ms", _value("seconds", 1000.0), zero=True))
    return [chart for chart in found if chart.series]


def _named(runs: Sequence[RunRecord]) -> Iterator[tuple[RunRecord, str]]:
    """Each run with its label, which is empty if it is alone."""
    return zip(runs, labels(runs) if len(runs) > 1 else [""], strict=True)


def _has_shares(run: RunRecord) -> bool:
    """Whether its `lr` is the schedule's share of the highest rate: if all gradients are exact."""
    estimated = any(number(line.get("projected_grad")) is not None for line in run.steps)
    return run.config.get("lr", default("lr")) == "auto" and not estimated


def _of(label: str, what: str) -> str:
    return f"{label}: {what}" if label else what


# ------------------------------------------------------------------------------------- curves


def _curve(
    runs: Sequence[RunRecord],
    key: str,
    title: str,
    y_label: str,
    value: Callable[[Mapping[str, Any]], float | None],
    *,
    smooth: bool = True,
    marks: bool = False,
    zero: bool = False,
) -> Chart:
    """A value of every step, of each run in its colour. smooth: with its running mean.

    The loss comes with that of the evaluations, a series for each part of the data.
    """
    series, marked = [], []
    for color, (run, label) in enumerate(_named(runs)):
        raw = _points(run.steps, value)
        if smooth:
            series.append(Series("" if label else "each step", thin(raw), "faint", color))
            series.append(Series(_of(label, "running mean"), thin(running_mean(raw)), "line", color))
        else:
            series.append(Series(_of(label, y_label), thin(raw), "line", color))
        if key == "loss":
            for what, whens, style, other in _EVALUATED:
                found = _points((e for e in run.evaluations if e.get("when") in whens), _value("loss"))
                series.append(Series(_of(label, what), found, style, color if label else other))
        for kind, other in (("skipped", 3), ("clipped", 4)) if marks else ():
            steps = [(float(line["step"]), 1.0) for line in run.steps if line.get(kind)]
            marked.append(Series(_of(label, f"{kind} step"), steps, "marks", color if label else other))
    series = [one for one in series if one.points]
    values = [y for one in series for _, y in one.points]
    log = not smooth and bool(values) and min(values) > 0 and max(values) > 30 * min(values)
    return Chart(key, title, y_label, series, marks=[m for m in marked if m.points], log=log, zero=zero)


def _value(key: str, factor: float = 1.0) -> Callable[[Mapping[str, Any]], float | None]:
    """Reads a figure of a step that was not skipped, or of an evaluation."""

    def read(line: Mapping[str, Any]) -> float | None:
        value = None if line.get("skipped") else number(line.get(key))
        return None if value is None else number(value * factor)

    return read


def _mean_loss(line: Mapping[str, Any]) -> float | None:
    losses = line.get("losses")
    values = [number(loss) for loss in losses] if isinstance(losses, list) else []
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def _mean_value(line: Mapping[str, Any]) -> float | None:
    found = _mean_loss(line)
    return None if found is None else 0.0 - found


def _points(
    lines: Iterable[Mapping[str, Any]], value: Callable[[Mapping[str, Any]], float | None]
) -> list[Point]:
    pairs = ((float(line["step"]), value(line)) for line in lines)
    return [(step, found) for step, found in pairs if found is not None]


def running_mean(points: Sequence[Point]) -> list[Point]:
    """An exponential mean over a fifteenth of the points, corrected for its start."""
    share = 1 / max(_SMOOTH_POINTS, len(points) / _SMOOTH_PART)
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
        kept += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    return kept


# ------------------------------------------------------------------------------------- memory


def _steps_memory(runs: Sequence[RunRecord]) -> Chart:
    """What was held after sampled steps, and the peaks between; against the budget."""
    series: list[Series] = []
    for index, (run, label) in enumerate(_named(runs)):
        samples = [s for s in rows(run.memory.get("samples")) if s.get("phase") == "train"]
        ends = [s for s in samples if s.get("block") == "update" and number(s.get("step")) is not None]
        for color, (key, what) in enumerate(_present(ends).items() if not label else ()):
            series.append(Series(what, thin(_points(ends, _value(key))), "line", color))
        color = index if label else 5
        peaks = [(float(x), float(y)) for x, y in _pairs(run.memory.get("step_peaks"))]
        series.append(Series(_of(label, "peak of a step"), thin(peaks), "line", color))
        limits = (
            ("budget_bytes", "budget", 3),
            ("measured_peak_bytes", "peak of the run", 1),
            ("inference_peak_bytes", "inference peak", 6),
        )
        for key, what, other in limits[:1] if label else limits:
            value = number(run.summary.get(key)) or number(run.memory.get(key))
            if value is not None:
                level = [(x, value) for x, _ in (peaks[:1] + peaks[-1:])]
                series.append(Series(_of(label, what), level, "dashed", color if label else other))
    scaled, unit = _scaled(series)
    return Chart("memory", "Memory over the steps", unit, scaled, zero=True)


def _pairs(value: Any) -> list[Any]:
    found = value if isinstance(value, list) else []
    return [p for p in found if isinstance(p, list) and len(p) == 2 and None not in map(number, p)]


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
        (f"step {step}", [s for s in train if s.get("step") == step], style)
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
    scaled, unit = _scaled(series)
    named = ["start" if place == "None" else place for place in places]
    title = "Memory through the blocks of a step" + (f", {label}" if label else "")
    note = _block_note(passes[0][1] if steps else [])
    return Chart(f"blocks{label}", title, f"change, {unit}", scaled, "block", note, names=named)


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
    found = {str(sample.get("block")) for sample in samples}
    blocks = sorted((place for place in found if place.isdecimal()), key=int)
    return [*({"None"} & found), *blocks, *(place for place in ("head", "update") if place in found)]


def _scaled(series: Iterable[Series]) -> tuple[list[Series], str]:
    """Series of bytes that are not empty, in a unit that fits, and that unit."""
    series = [one for one in series if one.points]
    most = max((abs(y) for one in series for _, y in one.points), default=0.0)
    size, unit = (_GIB, "GiB") if most >= 4 * _GIB else (_MIB, "MiB") if most >= _MIB / 4 else (1024, "KiB")
    return [one._replace(points=[(x, y / size) for x, y in one.points]) for one in series], unit
