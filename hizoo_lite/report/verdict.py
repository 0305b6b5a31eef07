"""What came of a run, in a sentence with its error bar, and what to try next."""

from __future__ import annotations

import math
import shlex
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hizoo_lite.config import as_one_or_several, default, one_or_several
from hizoo_lite.registry import ESTIMATORS, SPACES
from hizoo_lite.report.record import RunRecord, number
from hizoo_lite.units import counted

#: A change of so many standard errors is no chance.
CERTAIN = 2.0
#: Of fewer a share says nothing.
LEAST_EXAMPLES = 20
#: A bar that hides most of what a run may have learnt.
WIDE_BAR = 0.2
#: By which a loss must have fallen for it to count, of itself.
LEAST_FALL = 0.02
#: Metrics that are shares of examples which are right.
_SHARES = ("accuracy",)


class Verdict(NamedTuple):
    """learnt: whether the change is more than chance; None if it cannot be said."""

    learnt: bool | None
    says: str
    next: str  # what to try; "" for nothing


def of_run(run: RunRecord) -> Verdict | None:
    """The verdict on what was held out; None for a run without an evaluation at both ends."""
    found = {name: number(run.summary.get(name)) for name in ("loss_before", "loss_after")}
    before, after = found["loss_before"], found["loss_after"]
    if before is None or after is None:
        return None
    fell = after < before - LEAST_FALL * abs(before)
    losses = f"loss {before:.3f} to {after:.3f}"
    metric, count = str(run.summary.get("metric")), number(run.summary.get("test_examples"))
    first, last = (number(run.summary.get(f"metric_{when}")) for when in ("before", "after"))
    if metric == "loss" or first is None or last is None or not count:
        return _of_loss(run, before, after, fell=fell)
    examples = counted(int(count), "example")
    figures = f"{metric} {100 * first:.1f} % to {100 * last:.1f} % of {examples}, {losses}"
    if count < LEAST_EXAMPLES:  # what their loss does is chance as well
        says = f"Too few held-out examples to say: {figures}."
        return Verdict(None, says, f"Next: {_hold_out(['test'])}.")
    if metric not in _SHARES:
        says = f"{figures}; an error bar is known of {' and '.join(_SHARES)} alone."
        return Verdict(None, says, "" if last > first and fell else _next(run, fell=fell))
    error = standard_error(run.predictions, first, last, int(count))
    change, bar = last - first, CERTAIN * error
    bars = f"{100 * bar:.1f} points"
    if change > bar:
        return Verdict(True, f"Learnt: {figures}; more than chance makes of so many (± {bars}).", "")
    if change < -bar:
        return Verdict(False, f"Worse than before: {figures} (± {bars}).", _next(run, fell=fell))
    says = "Not learnt yet" if fell else "Not learnt"
    return Verdict(
        False, f"{says}: {figures}; within ± {bars}.", _next(run, fell=fell, is_wide=bar > WIDE_BAR)
    )


def _of_loss(run: RunRecord, before: float, after: float, *, fell: bool) -> Verdict:
    """The verdict on a task that has only a loss."""
    says = f"loss {before:.3f} to {after:.3f}"
    error = loss_error(run.predictions, after - before)
    if error is None:
        says = f"{says}, on held-out examples: " + ("it fell" if fell else "it did not fall")
        return Verdict(None, f"{says}.", "" if fell else _next(run, fell=False))
    bar, count = CERTAIN * error, number(run.summary.get("test_examples")) or 0
    says = f"{says} on {counted(int(count), 'held-out example')}"
    if count < LEAST_EXAMPLES:
        return Verdict(None, f"Too few held-out examples to say: {says}.", f"Next: {_hold_out(['test'])}.")
    if abs(after - before) <= bar:
        begins = "Not learnt yet" if after < before else "Not learnt"
        return Verdict(False, f"{begins}: {says}; within ± {bar:.3f}.", _next(run, fell=after < before))
    if after > before:
        return Verdict(False, f"Worse than before: {says} (± {bar:.3f}).", _next(run, fell=False))
    says = f"Learnt: {says}; more than chance makes of so many (± {bar:.3f})."
    return Verdict(True, says, "" if fell else _next(run, fell=True))


def too_few(counts: Mapping[str, int], metric: str) -> str:
    """What can be told before a run of examples whose metric says nothing after it; "" if they are enough.

    counts: examples by their part, test or dev.
    """
    few = {part: count for part, count in counts.items() if 0 < count < LEAST_EXAMPLES}
    if not few:
        return ""
    examples = " and ".join(counted(count, f"{part} example") for part, count in few.items())
    bar = 100 * CERTAIN * sampling_error(0.5, count=min(few.values()))  # where it is widest
    said = f"an {metric} of so few is uncertain by ± {bar:.0f} points"
    said = said if metric in _SHARES else "too few to tell chance"
    return f"{examples}: {said}; {_hold_out([*few])}"


def _hold_out(parts: Sequence[str]) -> str:
    """How a run has enough examples in these parts."""
    flags = " and ".join(f"--{part}-examples" for part in parts)
    return f"hold out {LEAST_EXAMPLES} or more with {flags}, or give them a file of their own"


def commands(path: Path, summary: Mapping[str, Any]) -> dict[str, str]:
    """Commands for what the run in `path` has trained, by what they do; none if nothing is saved."""
    folder = shlex.quote(str(path))
    if not (path / "adapter").is_dir():
        return {}
    form = "peft" if summary.get("space") in SPACES.having("rank") else "merged"
    found = {"evaluate": f"hizoo-lite eval --adapter {folder}"}
    if summary.get("kind") == "causal":
        found["ask"] = f'hizoo-lite generate --adapter {folder} --prompt "..."'
    out = shlex.quote(f"{path}-{form}")
    return {**found, "export": f"hizoo-lite export {folder} --to {form} --out {out}"}


def standard_error(
    predictions: Sequence[Mapping[str, Any]], before: float, after: float, count: int
) -> float:
    """Of the change of a share of examples, of the same ones before and after.

    From the examples that changed sides if each is known; else as if they were two samples, which is more.
    """
    sides: dict[Any, list[bool]] = {}
    for line in predictions:
        if line.get("when") in ("before", "after") and isinstance(line.get("right"), bool):
            sides.setdefault(line.get("index"), []).append(line["right"])
    pairs = [pair for pair in sides.values() if len(pair) == 2]
    if pairs and len(pairs) == count:
        gained = sum(not first and last for first, last in pairs)
        lost = sum(first and not last for first, last in pairs)
        spread = gained + lost - (gained - lost) ** 2 / count
        return math.sqrt(max(spread, 1.0)) / count
    return sampling_error(before, after, count=count)


def sampling_error(*shares: float, count: int) -> float:
    """The standard error of a share of `count` examples, or of the difference of two such samples."""
    spread = sum(share * (1 - share) for share in shares)
    return math.sqrt(max(spread, min(1 / count, 0.25)) / count)  # none or all right is not certain either


def bar_of(scores: Mapping[str, float], metric: str, count: int) -> str:
    """The error bar of one evaluation's main metric, as "± 2.7 points".

    "" if none is known: of what is no share of right answers, and of a mean over several tasks.
    """
    if metric not in _SHARES or any("/" in name for name in scores):
        return ""
    return f"± {100 * CERTAIN * sampling_error(scores[metric], count=count):.1f} points"


def loss_error(predictions: Sequence[Mapping[str, Any]], change: float) -> float | None:
    """The standard error of the change of a mean loss, from what each example's loss changed by.

    None if fewer than two examples are known at both ends, or if the change is not their mean: that of
    several tasks is a mean over the tasks.
    """
    ends: dict[Any, dict[str, float]] = {}
    for line in predictions:
        loss = number(line.get("loss"))
        if line.get("when") in ("before", "after") and loss is not None:
            ends.setdefault(line.get("index"), {})[line["when"]] = loss
    changes = [each["after"] - each["before"] for each in ends.values() if len(each) == 2]
    if len(changes) < 2 or not math.isclose(math.fsum(changes) / len(changes), change, abs_tol=1e-6):
        return None
    return statistics.stdev(changes) / math.sqrt(len(changes))


def _can_begin(config: Mapping[str, Any]) -> bool:
    """Whether a run may begin with the adapter of one of these settings."""
    return config.get("space", default("space")) in SPACES.having("rank")


def _next(run: RunRecord, *, fell: bool, is_wide: bool = False) -> str:
    """What to try, the most useful first."""
    config, blocks = run.config, number(run.summary.get("trained_blocks")) or 6
    known = {n: config.get(n, default(n)) for n in ("exact_blocks", "objective", "space", "estimator")}
    secret = known["estimator"] in ESTIMATORS and ESTIMATORS[known["estimator"]].secret
    could_be_exact = (
        known["exact_blocks"] == 0
        and known["objective"] == default("objective")
        and known["space"] in SPACES.having("exact_blocks")
        and not secret
    )
    found = []
    if could_be_exact:
        found.append(f"--exact-blocks {blocks:.0f}, which learns in a fraction of the steps")
    if fell:
        begin = f" from here (--init-adapter {shlex.quote(str(run.path))})" if _can_begin(config) else ""
        found.append(f"more steps{begin}: the loss fell, which comes before the answers change")
    if is_wide:
        found.append("more held-out examples with --test-examples, whose error bar is smaller")
    model = shlex.quote(str(config.get("model") or "MODEL"))
    data = shlex.join(map(str, one_or_several(as_one_or_several(config.get("data") or "DATA"))))
    found.append(f"hizoo-lite data inspect {data} --model {model}, to see what the model is asked")
    return "Next: " + "; or ".join(found) + "."
