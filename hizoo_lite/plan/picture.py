"""The picture of a plan: one stacked bar for each residency, and the budget as a line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

from hizoo_lite.plan.plan import Plan
from hizoo_lite.units import format_bytes

#: What is drawn as one piece, from the bottom up, with its colour (safe for the colour-blind).
_PIECES: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("framework", ("framework",), "#999999"),
    ("embeddings and head", ("embeddings_and_head",), "#0072B2"),
    ("blocks", ("resident_blocks", "block_slots", "prefetch_buffers", "pinned_host"), "#56B4E9"),
    ("norms, biases", ("small_parameters",), "#CC79A7"),
    ("adapters, Sigma, noise", ("adapters", "curvature", "moments", "noise"), "#F0E442"),
    ("scratch", ("scratch",), "#009E73"),
    (
        "activations",
        (
            *("between_blocks", "batch_states", "boundaries", "attention", "mlp", "logits", "cache"),
            *("update", "loading", "heap"),
        ),
        "#E69F00",
    ),
)
_BUDGET_COLOUR = "#D55E00"


def draw(path: Path, model: str, plan: Plan, bars: Mapping[str, Plan]) -> None:
    """Write a PNG (or what the file's ending says)."""
    figure = Figure(figsize=(8.0, 1.9 + 0.75 * len(bars)), layout="constrained")
    axes = figure.add_subplot()
    unit, divisor = _unit(max(one.peak_bytes for one in bars.values()))
    names = list(bars)
    for label, categories, colour in _PIECES:
        sizes = [sum(bars[name].ledger.device.get(c, 0) for c in categories) / divisor for name in names]
        below = [_below(bars[name], label) / divisor for name in names]
        axes.barh(
            names, sizes, left=below, color=colour, label=label, height=0.6, edgecolor="white", linewidth=0.5
        )
    widest = max(one.peak_bytes for one in bars.values()) / divisor
    budget = plan.device_budget_bytes
    near = budget is not None and budget / divisor < 2.5 * widest
    right = max(widest, budget / divisor if near and budget else 0) * 1.3
    for row, name in enumerate(names):
        size = bars[name].peak_bytes / divisor
        said = f"{size:.2f} {unit}" + ("" if budget is None else f", {_verdict(bars[name])}")
        behind = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # the budget's line may cross it
        axes.text(size + right * 0.008, row, said, va="center", fontsize=9, bbox=behind)
    if near and budget is not None:
        axes.axvline(budget / divisor, color=_BUDGET_COLOUR, linewidth=1.5, linestyle="--", label="budget")
    axes.set_xlim(0, right)
    axes.invert_yaxis()
    axes.set_xlabel(f"peak memory of the device, {unit}")
    beyond = "" if near or budget is None else f"; budget {format_bytes(budget)}, outside of the picture"
    title = f"{Path(model).name} {_verdict(plan)}: {plan.settings()}{beyond}"
    axes.set_title(title, fontsize=10, loc="left")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def _verdict(plan: Plan) -> str:
    return "fits" if plan.fits else "does not fit"


def _below(plan: Plan, label: str) -> int:
    """Bytes of the pieces under this one."""
    total = 0
    for name, categories, _ in _PIECES:
        if name == label:
            break
        total += sum(plan.ledger.device.get(category, 0) for category in categories)
    return total


def _unit(size: int) -> tuple[str, int]:
    return ("GiB", 2**30) if size >= 2**30 else ("MiB", 2**20)
