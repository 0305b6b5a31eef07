"""The figures at the top of a report, and the tables below: which there are, and how each is written."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from hizoo_lite.config import default
from hizoo_lite.report.record import RunRecord, number, rows, table
from hizoo_lite.units import format_bytes

Unit = Literal["share", "number", "bytes", "seconds", "count", "ratio"]
DASH = "–"
#: Keys of an evaluation's line that are not metrics of its task.
_NOT_METRICS = ("kind", "when", "step", "loss", "examples", "seconds", "inference_peak_bytes")


class Figure(NamedTuple):
    """One headline number of summary.json or memory.json."""

    key: str
    label: str
    unit: Unit


FIGURES = (
    Figure("metric_before", "before", "share"),
    Figure("metric_after", "after", "share"),
    Figure("loss_before", "loss before", "number"),
    Figure("loss_after", "loss after", "number"),
    Figure("measured_peak_bytes", "peak memory", "bytes"),
    Figure("predicted_peak_bytes", "predicted peak", "bytes"),
    Figure("budget_bytes", "memory budget", "bytes"),
    Figure("training_peak_bytes", "training peak", "bytes"),
    Figure("inference_peak_bytes", "inference peak", "bytes"),
    Figure("training_over_inference", "training / inference peak", "ratio"),
    Figure("seconds_per_step", "time a step (median)", "seconds"),
    Figure("tokens_per_second", "tokens a second", "number"),
    Figure("steps", "steps", "count"),
    Figure("forward_passes", "forward passes", "count"),
    Figure("skipped_steps", "skipped steps", "count"),
    Figure("clipped_steps", "clipped steps", "count"),
    Figure("trainable_parameters", "trainable parameters", "count"),
    Figure("model_bytes", "model", "bytes"),
)


def headline(run: RunRecord) -> dict[str, float | None]:
    """The value of every figure; None for what is not known. What an unfinished run has is counted."""
    planned = {key: run.plan.get(key) for key in ("predicted_peak_bytes", "budget_bytes")}
    ended = {key: value for key, value in run.summary.items() if number(value) is not None}
    counted = {key: value for key, value in _counted(run).items() if key not in run.summary}
    known = {**planned, **counted, **run.memory, **ended}
    return {figure.key: number(known.get(figure.key)) for figure in FIGURES}


def _counted(run: RunRecord) -> dict[str, Any]:
    """What the lines of metrics.jsonl say, for a run that has no summary yet."""
    found: dict[str, Any] = {}
    for line in run.evaluations:
        if line.get("when") in ("before", "after"):
            found[f"loss_{line['when']}"] = line.get("loss")
            found[f"metric_{line['when']}"] = line.get(metric_name(run))
    if not run.steps:
        return found
    seconds = [value for line in run.steps if (value := number(line.get("seconds"))) is not None]
    return found | {
        "steps": len(run.steps),
        "forward_passes": sum(int(number(line.get("forwards")) or 0) for line in run.steps),
        "skipped_steps": sum(bool(line.get("skipped")) for line in run.steps),
        "clipped_steps": sum(bool(line.get("clipped")) for line in run.steps),
        "seconds_per_step": statistics.median(seconds) if seconds else None,
    }


def metric_name(run: RunRecord) -> str:
    """The name of the task's main metric: the summary's, or the first of an evaluation's own."""
    own = [name for name in (run.evaluations[0] if run.evaluations else {}) if name not in _NOT_METRICS]
    return str(run.summary.get("metric") or next(iter(own), "metric"))


def show(value: Any, unit: Unit) -> str:
    """As people read it; a dash for what is missing or not finite."""
    value = number(value)
    if value is None:
        return DASH
    if unit == "bytes":
        return format_bytes(int(value))
    if unit == "share":
        return f"{100 * value:.1f} %"
    if unit == "count":
        return f"{value:,.0f}".replace(",", " ")
    if unit == "ratio":
        return f"{value:.3f}"
    if unit == "seconds":
        return f"{1000 * value:.1f} ms" if abs(value) < 1 else f"{value:.2f} s"
    if 100 <= abs(value) < 1e6:
        return f"{value:.1f}" if abs(value) < 1000 else f"{value:.0f}"
    return f"{value:.4f}" if 1e-3 <= abs(value) < 100 or value == 0 else f"{value:.4g}"


def difference(first: float | None, second: float | None, unit: Unit) -> str:
    """Second minus first, signed, with the change in percent if that says something."""
    if first is None or second is None:
        return DASH
    change = second - first
    if not change:
        return "±0"
    sign = "+" if change > 0 else "-"
    if unit == "share":
        return f"{sign}{abs(100 * change):.1f} points"
    text = sign + show(abs(change), unit)
    return f"{text} ({100 * change / abs(first):+.1f}\u00a0%)" if first else text


def objective_of(run: RunRecord) -> str | None:
    """What its points were compared by; None if that was the loss."""
    found = str(run.config.get("objective", default("objective")))
    return None if found == default("objective") else found


def about(run: RunRecord) -> str:
    """What was run, in a line."""
    known = {**run.config, **run.summary}
    model, task, bits, space, estimator, curvature, device = (
        str(known.get(name, DASH))
        for name in ("model", "task", "bits", "space", "estimator", "curvature", "device")
    )
    ended = "; interrupted" if run.summary.get("interrupted") else ""
    method = f"{space}, {estimator}, curvature {curvature}"
    method += "" if (objective := objective_of(run)) is None else f", objective {objective}"
    return f"Model {model} in {bits}, tuned on {task}, {method}, on {device}{ended}"


def _short(value: float | None) -> str:
    """Bytes in three digits."""
    text = show(value, "bytes")
    amount, _, unit = text.partition(" ")
    return f"{float(amount):.3g} {unit}" if unit not in ("", "B") and float(amount) < 1000 else text


class Card(NamedTuple):
    """One number at the top."""

    title: str
    value: str
    detail: str


def cards(run: RunRecord) -> list[Card]:
    """The six that matter most."""
    found = headline(run)
    name, metric = metric_name(run), "number" if metric_name(run) == "loss" else "share"
    peak, budget = found["measured_peak_bytes"], found["budget_bytes"]
    share = f"{100 * peak / budget:.0f} % of {_short(budget)}" if peak and budget else "no budget set"
    clipped, skipped = (show(found[key], "count") for key in ("clipped_steps", "skipped_steps"))
    made = [
        Card("Loss", show(found["loss_after"], "number"), f"before {show(found['loss_before'], 'number')}"),
        Card("Peak of the run", _short(peak), share),
        Card(
            "Peak over inference",
            show(found["training_over_inference"], "ratio") + " x" * bool(found["training_over_inference"]),
            f"{_short(found['training_peak_bytes'])} / {_short(found['inference_peak_bytes'])}",
        ),
        Card(
            "Time a step",
            show(found["seconds_per_step"], "seconds"),
            f"{show(found['tokens_per_second'], 'number')} tokens a second",
        ),
        Card(
            "Forward passes",
            show(found["forward_passes"], "count"),
            f"{show(found['steps'], 'count')} step{'s' * (found['steps'] != 1)}, {skipped} skipped, "
            f"{clipped} clipped",
        ),
    ]
    if name == "loss":
        return made
    shown = [show(found[key], metric) for key in ("metric_after", "metric_before")]  # type: ignore[arg-type]
    return [Card(name.capitalize(), shown[0], f"before {shown[1]}"), *made]


def compared(first: RunRecord, second: RunRecord) -> list[tuple[str, str, str, str]]:
    """(label, first, second, difference) of every figure that one of them has."""
    left, right = headline(first), headline(second)
    names = {metric_name(first), metric_name(second)} - {"metric"}
    metric = " / ".join(sorted(names)) or "metric"
    found = []
    for key, label, unit in FIGURES:
        if left[key] is None and right[key] is None:
            continue
        if key.startswith("metric_"):
            label, unit = f"{metric} {label}", "number" if metric == "loss" else unit
        found.append(
            (label, show(left[key], unit), show(right[key], unit), difference(left[key], right[key], unit))
        )
    return found


class Category(NamedTuple):
    """Bytes of one category: predicted and measured, and both as shares of the most."""

    name: str
    predicted_bytes: float | None
    measured_bytes: float | None
    predicted_percent: float
    measured_percent: float


def categories(run: RunRecord) -> list[Category]:
    """Predicted beside measured, the largest first; empty if neither is known."""
    found = [
        (str(row.get("owner")), number(row.get("predicted_bytes")), number(row.get("measured_bytes")))
        for row in rows(run.memory.get("owners"))
    ]
    if not found:
        found = [(str(k), number(v), None) for k, v in table(run.plan.get("owners")).items()]
    most = max((max(p or 0, m or 0) for _, p, m in found), default=0) or 1
    made = [Category(n, p, m, 100 * (p or 0) / most, 100 * (m or 0) / most) for n, p, m in found]
    return sorted(made, key=lambda c: -max(c.predicted_percent, c.measured_percent))


class Table(NamedTuple):
    """A titled table; the last column is marked if its row's values differ."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    changed: list[bool]


def tables(runs: Sequence[RunRecord]) -> list[Table]:
    """Scores of several tasks, plan, machine, versions, configuration, of one run or of two side by side."""
    parts = {
        "Tasks": [_scalars(table(run.summary.get("tasks"))) for run in runs],
        "Plan": [_scalars({k: v for k, v in run.plan.items() if k != "owners"}) for run in runs],
        "Machine": [_scalars(_machine(run)) for run in runs],
        "Versions": [_scalars(table(run.summary.get("versions"))) for run in runs],
        "Configuration": [_scalars(run.config) for run in runs],
    }
    return [_side_by_side(title, runs, found) for title, found in parts.items() if any(found)]


def _machine(run: RunRecord) -> Mapping[str, Any]:
    names = ("device", "compute_dtype", "bits", "residency", "noise")
    return {**table(run.memory.get("machine")), **{n: run.summary[n] for n in names if n in run.summary}}


def _scalars(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Texts by dotted name; lists in one line, long ones cut."""
    found: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= _scalars(value, f"{prefix}{name}.")
        else:
            found[prefix + str(name)] = _text(str(name), value, is_bytes=prefix.startswith(_OF_BYTES))
    return found


#: Where a plan's numbers are bytes, whatever they are called.
_OF_BYTES = ("ledger.", "moments.")


def _text(name: str, value: Any, *, is_bytes: bool = False) -> str:
    if value is None or (isinstance(value, float) and number(value) is None):
        return DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if (is_bytes or name.endswith("_bytes")) and number(value) is not None:
        return format_bytes(int(value))
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 400 else text[:399] + "…"


def _side_by_side(title: str, runs: Sequence[RunRecord], found: Sequence[Mapping[str, str]]) -> Table:
    names = list(dict.fromkeys(name for part in found for name in part))
    lines = [[name, *(part.get(name, DASH) for part in found)] for name in names]
    changed = [len(set(line[1:])) > 1 for line in lines]
    columns = ["", *(labels(runs) if len(runs) > 1 else ["value"])]
    return Table(title, columns, lines, changed)


def labels(runs: Sequence[RunRecord]) -> list[str]:
    """What the runs are called: their folders' names, lettered if these are the same."""
    names = [run.name for run in runs]
    if len(set(names)) == len(names):
        return names
    return [f"{name} ({letter})" for name, letter in zip(names, "AB", strict=True)]
