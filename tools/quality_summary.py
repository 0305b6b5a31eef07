"""What rows of the quality bench say together: medians, ratios to mezo, the summary, a picture.

A row is one run, as `bench_quality.py` appends it to rows.jsonl.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from quality_cells import CELLS, METHODS


def judged(row: Mapping[str, Any]) -> float:
    """What rates are chosen by: the lowest dev loss; of the demo, without dev examples, the test loss."""
    return min(point[1] for point in points(row))


def points(row: Mapping[str, Any]) -> list[list[Any]]:
    """Evaluations within a run: forwards, loss, metric, seconds; of the demo the last one, on test."""
    last = [row["forwards"], row["loss_after"], row["metric_after"], row.get("seconds")]
    return row["curve"] or [last]


def by_setting(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str, int], list[Mapping[str, Any]]]:
    """The rows of a cell, method and budget at the rate with the most seeds, then the lowest loss."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["cell"], row["method"], row["budget"], row["lr"]), []).append(row)
    best: dict[tuple[str, str, int], list[Mapping[str, Any]]] = {}
    for (cell, method, budget, _), group in groups.items():
        key = (cell, method, budget)
        best[key] = min([group, *([best[key]] if key in best else [])], key=_standing)
    return dict(sorted(best.items()))


def _standing(group: Sequence[Mapping[str, Any]]) -> tuple[int, float]:
    return -len(group), statistics.median(map(judged, group))


#: Of a line of the table, medians over the seeds.
_MIDDLE = ("forwards", "seconds_per_step", "loss_before", "loss_after", "metric_before", "metric_after")


def summarized(rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """A line a cell, method and budget: medians over the seeds, and the worst seed."""
    for (cell, method, _), group in by_setting(rows).items():
        middle = {name: median(row[name] for row in group) for name in _MIDDLE}
        worst = {
            "loss_worst": max(row["loss_after"] for row in group),
            "metric_worst": min(row["metric_after"] for row in group),
        }
        yield {"cell": cell, "method": method, "lr": group[0]["lr"], "seeds": len(group), **middle, **worst}


#: What it costs to come to a point of a run, in rows and in seconds; None if the row does not say.
COSTS: Mapping[str, Callable[[Mapping[str, Any], Sequence[Any]], float | None]] = {
    "forwards": lambda row, point: (
        row["batch_size"] * point[0] + row["kept_examples"] if "kept_examples" in row else None
    ),
    "seconds": lambda row, point: point[3] if len(point) > 3 else None,
}


def to_mezo(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """By cell: what it costs hizoo to be as good as tuned mezo becomes, over what it costs mezo.

    mezo's loss: the lowest on dev (of the demo: on test) at its largest budget, A frozen or trained, the
    better of both, the median over seeds; its cost is what it took to get to its own lowest, likewise.
    hizoo's cost, of each seed: until it was first evaluated with a loss as low, within a run of any budget;
    None if it never was. Forwards are of a row: examples, once a branch, and once where hidden states were
    computed beforehand. Seconds are of steps and of that, without evaluations.
    """
    answer = {}
    for cell in dict.fromkeys(row["cell"] for row in rows):
        mezo, own = tuned_mezo(rows, cell), [r for r in rows if (r["cell"], r["method"]) == (cell, "hizoo")]
        if mezo and own:
            target = statistics.median(map(judged, mezo))
            costs = {name: _ratios(mezo, own, target, cost) for name, cost in COSTS.items()}
            answer[cell] = {"mezo_loss": target, **costs}
    return answer


def _ratios(
    mezo: Sequence[Mapping[str, Any]], own: Sequence[Mapping[str, Any]], target: float, cost: Any
) -> dict[str, Any]:
    """mezo's cost, and hizoo's over that by seed."""
    whole = median(cost(row, min(points(row), key=lambda point: point[1])) for row in mezo)
    known = [row for row in own if cost(row, points(row)[0]) is not None]
    if whole is None or not known:
        return {"mezo": whole, "ratios": {}}
    best: dict[int, float] = {}
    for row in known:
        enough = [cost(row, point) / whole for point in points(row) if point[1] <= target]
        best[row["seed"]] = min([best.get(row["seed"], math.inf), *enough])
    return {"mezo": whole, "ratios": {seed: finite(ratio) for seed, ratio in best.items()}}


def in_equal_seconds(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """By cell: the loss on dev after as many seconds as the quickest method took for its largest budget.

    Of a method the median over its seeds, at its best rate; of evaluations within a run the last one that was
    reached by then; None without any.
    """
    answer: dict[str, dict[str, Any]] = {}
    best = largest([row for row in rows if row["curve"] and COSTS["seconds"](row, row["curve"][-1])])
    for cell in dict.fromkeys(cell for cell, _ in best):
        groups = {method: group for (of, method), group in best.items() if of == cell}
        most = min(statistics.median(row["seconds"] for row in group) for group in groups.values())
        losses = {
            method: median(_last_within(row["curve"], most) for row in group)
            for method, group in groups.items()
        }
        answer[cell] = {"seconds": most, "loss": losses}
    return answer


def _last_within(curve: Sequence[Sequence[float]], seconds: float) -> float | None:
    return next((loss for _, loss, _, taken in reversed(curve) if taken <= seconds), None)


def tuned_mezo(rows: Sequence[Mapping[str, Any]], cell: str) -> Sequence[Mapping[str, Any]]:
    """The rows of a cell at mezo's best setting, with its largest budget; none where there are none."""
    groups = [group for key, group in largest(rows).items() if key[0] == cell and key[1].startswith("mezo")]
    return min(groups, key=lambda group: statistics.median(map(judged, group)), default=())


def largest(
    rows: Sequence[Mapping[str, Any]], most: float = math.inf
) -> dict[tuple[str, str], Sequence[Mapping[str, Any]]]:
    """The rows of a cell and method with the largest budget up to `most`."""
    known = by_setting([row for row in rows if row["budget"] <= most])
    return {(cell, method): group for (cell, method, _), group in known.items()}  # by rising budget


def finite(value: float | None) -> float | None:
    """JSON has no other numbers."""
    return value if value is not None and math.isfinite(value) else None


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def median(values: Iterable[float | None]) -> float | None:
    """Of those that are there; None without any."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


#: Forwards of a run, at most, that the summary is of.
MOST = 1200
_EXACT = "exact, 6 blocks"


def headline(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """What versions are compared by: medians over seeds, with the largest budget up to `MOST`.

    None where rows that are needed are not there. *_accuracy, *_loss: on test. minilm_*_exact_*: of all
    blocks, which are six; elsewhere exact is of the top six, but for the gap. smollm2_*_ratio: see `to_mezo`,
    over all of the model's tasks and seeds; a seed that never was as good counts as infinite.
    exact_peak_over_inference: of a step's memory, the largest over the model's tasks. gap_to_backprop_points:
    by which backpropagation is more accurate than exact gradients, of all blocks where there are such, the
    mean over these tasks. hizoo_over_mezo: the forwards of hizoo as published, at its best rate, to be as
    good as tuned mezo becomes with as many, over those of mezo.
    """
    best = largest(rows, MOST)

    def of(cell: str, method: str, name: str = "metric_after") -> float | None:
        return median(row[name] for row in best.get((cell, method), ()))

    exact = [of("minilm-sst2", method) for method in ("exact, all blocks", _EXACT)]
    smollm2 = [cell for cell in CELLS if CELLS[cell].model == "smollm2"]
    ours = {
        cell: next(filter(None, (of(cell, one) for one in ("exact, all blocks", _EXACT))), None)
        for cell in smollm2
    }
    gaps = [_apart(of(cell, "backpropagation"), ours[cell]) for cell in smollm2]
    return {
        "minilm_sst2_accuracy": of("minilm-sst2", "hizoo"),
        "minilm_sst2_exact_accuracy": next((found for found in exact if found is not None), None),
        "smollm2_forwards_ratio": _ratio(rows, smollm2, "forwards"),
        "smollm2_seconds_ratio": _ratio(rows, smollm2, "seconds"),
        "smollm2_sst2_exact_accuracy": of("smollm2-sst2", _EXACT),
        "exact_peak_over_inference": _peak([best.get((cell, _EXACT), ()) for cell in smollm2]),
        "own_data_accuracy": of("smollm2-tickets", _EXACT),
        "own_data_forward_accuracy": of("smollm2-tickets", "hizoo"),
        "gap_to_backprop_points": _mean(gaps),
        "defaults_smollm2_sst2_accuracy": of("smollm2-sst2", "hizoo"),
        "defaults_smollm2_sst2_loss": of("smollm2-sst2", "hizoo", "loss_after"),
        "hizoo_over_mezo": finite(median(_over_mezo(rows, cell) for cell in CELLS)),
    }


def _ratio(rows: Sequence[Mapping[str, Any]], cells: Sequence[str], name: str) -> float | None:
    """The median over the seeds of these cells."""
    found = [found[name]["ratios"].values() for cell, found in to_mezo(rows).items() if cell in cells]
    ratios = [math.inf if ratio is None else ratio for own in found for ratio in own]
    return finite(statistics.median(ratios)) if ratios else None


def _peak(groups: Sequence[Sequence[Mapping[str, Any]]]) -> float | None:
    """The largest ratio of these groups."""
    ratios = [
        median(row["peak_bytes"] / row["inference_peak_bytes"] for row in group if row.get("peak_bytes"))
        for group in groups
    ]
    return max((ratio for ratio in ratios if ratio is not None), default=None)


def _apart(one: float | None, other: float | None) -> float | None:
    """Points by which `one` is more."""
    return None if one is None or other is None else 100 * (one - other)


def _over_mezo(rows: Sequence[Mapping[str, Any]], cell: str) -> float | None:
    """The median over seeds; infinite counts as such."""
    known = [row for row in rows if row["budget"] <= MOST]
    mezo = tuned_mezo(known, cell)
    own = [r for r in known if r["cell"] == cell and r["method"].startswith("hizoo, as published")]
    if not mezo or not own:
        return None
    target = statistics.median(map(judged, mezo))
    ratios = _ratios(mezo, own, target, COSTS["forwards"])["ratios"].values()
    return statistics.median(math.inf if ratio is None else ratio for ratio in ratios) if ratios else None


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The loss of training batches against forwards, a panel a cell; every row a line, a colour a method."""
    import matplotlib.pyplot as plt

    cells = sorted({row["cell"] for row in rows})
    columns = min(len(cells), 3)
    size = (5.5 * columns, 4.2 * -(-len(cells) // columns))
    figure, axes = plt.subplots(-(-len(cells) // columns), columns, figsize=size, squeeze=False)
    for axis in axes.flat[len(cells) :]:
        axis.set_axis_off()
    names = [name for name in METHODS if any(row["method"] == name for row in rows)]
    colours = {name: f"C{number}" for number, name in enumerate(names)}
    for axis, cell in zip(axes.flat, cells, strict=False):
        shown = set()
        for row in rows:
            points = row.get("train_curve") or row["curve"]
            if row["cell"] != cell or not points:
                continue
            name = row["method"]
            label = name if name not in shown else None
            shown.add(name)
            axis.plot(
                *list(zip(*points, strict=True))[:2], color=colours[name], lw=1.1, alpha=0.8, label=label
            )
        axis.set(title=cell, xlabel="forwards", ylabel="loss")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
