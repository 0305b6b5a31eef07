"""summary.json: what a run was and what came of it, from its configuration and its metrics."""

from __future__ import annotations

import importlib.metadata
import platform
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hizoo_lite.base import trained_count
from hizoo_lite.noise import GENERATORS
from hizoo_lite.tasks import Task
from hizoo_lite.train.evaluate import of_part

if TYPE_CHECKING:
    from hizoo_lite.model.model import Model
    from hizoo_lite.train.setup import Setup

_PACKAGES = ("hizoo-lite", "torch", "transformers", "bitsandbytes", "accelerate", "numpy")


def peaks_of_run(earlier: Mapping[str, Any], figures: Mapping[str, Any]) -> dict[str, Any]:
    """Peaks of inference and of steps over all parts of a run, and their ratio.

    earlier: the summary before this part. figures: the profiler's of this part, which may have had no step.
    """
    names = ("inference_peak_bytes", "training_peak_bytes")
    parts = [figures, earlier if earlier.get(names[1]) else {}]  # else inference's is of the first evaluation
    inference, training = (max(part.get(name) or 0 for part in parts) for name in names)
    if not (inference and training):
        return dict(figures)
    return {
        **dict(zip(names, (inference, training), strict=True)),
        "training_over_inference": training / inference,
    }


def summarize(
    setup: Setup, metrics: Sequence[Mapping[str, Any]], measured_peak_bytes: int, interrupted: bool
) -> dict[str, Any]:
    """The summary of a run as it stands. Bytes are whole numbers, seconds and losses floats.

    forward_passes counts the branches of the training steps, not evaluations; tokens_per_second the
    tokens of the batches, each once whatever the number of branches.
    """
    from hizoo_lite.device import like  # needs torch, which a run on a device has not

    config, model = setup.config, setup.model
    return {
        **outcome(metrics, setup.task),
        "trainable_parameters": trained_count(setup.space),
        "budget_bytes": setup.resolved.budgets.device_bytes,
        "profile": config.profile,
        "predicted_peak_bytes": None if setup.plan is None else setup.plan.peak_bytes,
        "measured_peak_bytes": measured_peak_bytes,
        "inference_peak_bytes": _last(metrics, "before").get("inference_peak_bytes"),
        "model_bytes": model.nbytes(),
        "device": str(model.device),
        "bits": model.bits,
        "compute_dtype": str(model.compute).removeprefix("torch."),
        "kind": model.kind,
        "space": setup.space.name,
        "estimator": setup.stepper.estimator.name,
        "objective": config.objective,
        "curvature": setup.stepper.curvature.name,
        "residency": model.residency.name,
        **({} if setup.stepper.estimator.secret else _streaming(model)),
        "noise": GENERATORS["parameters" if setup.space.weights is None else like(model.device)],
        "model": config.model,
        "task": config.task_name,
        "seed": config.seed,
        "interrupted": interrupted,
        "versions": versions(),
    }


def outcome(metrics: Sequence[Mapping[str, Any]], task: Task) -> dict[str, Any]:
    """What the lines of metrics.jsonl come to. Of several tasks `tasks` has what there is of each."""
    steps = [line for line in metrics if line["kind"] == "step"]
    before, after = _last(metrics, "before"), _last(metrics, "after")
    taken = max((line["step"] + (line["kind"] == "step") for line in metrics), default=0)
    if after.get("step") != taken:  # of an earlier end, before the run was given more steps
        after = {}
    found = _of_task(before, after, task.metric)
    several = {part.name: _of_task(before, after, part.metric, part.name) for part in task.parts}
    return {
        "steps": taken,
        "skipped_steps": sum(line["skipped"] for line in steps),
        "forward_passes": sum(line["forwards"] for line in steps),
        **_speed(steps),
        **found,
        **({"tasks": several} if len(several) > 1 else {}),
        "test_examples": before.get("examples"),
    }


def _of_task(
    before: Mapping[str, Any], after: Mapping[str, Any], metric: str, name: str = ""
) -> dict[str, Any]:
    """Loss and metric of both evaluations; name: of one task of several."""
    loss, own = of_part(name, "loss"), of_part(name, metric)
    return {
        "loss_before": before.get(loss),
        "loss_after": after.get(loss),
        "metric": metric,
        "metric_before": before.get(own),
        "metric_after": after.get(own),
    }


def _streaming(model: Model) -> dict[str, Any]:
    """What a streamed run moved, and how long it waited for it."""
    from hizoo_lite.engine.residency import Streamed

    if not isinstance(model.residency, Streamed):
        return {}
    return {
        "blocks_on_device": len(model.residency.kept_blocks),
        "blocks_streamed": len(model.blocks) - len(model.residency.kept_blocks),
        "slot_bytes": model.residency.slot_bytes,
        "moved_bytes": model.residency.moved_bytes,
        "waited_seconds": model.residency.waited_seconds,
    }


def _last(metrics: Sequence[Mapping[str, Any]], when: str) -> Mapping[str, Any]:
    """The newest evaluation of this name; empty if there was none."""
    return next((line for line in reversed(metrics) if line.get("when") == when), {})


def _speed(steps: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Of the steps whose time is known: lines that were lost are written again without it."""
    timed = [line for line in steps if line.get("seconds") is not None and line.get("tokens") is not None]
    if not timed:
        return {"seconds_per_step": None, "tokens_per_second": None}
    seconds = [line["seconds"] for line in timed]
    total = sum(seconds)
    return {
        "seconds_per_step": statistics.median(seconds),
        "tokens_per_second": sum(line["tokens"] for line in timed) / total if total > 0 else None,
    }


def versions(packages: Sequence[str] = _PACKAGES) -> dict[str, str]:
    """Of Python and of the libraries that decide about numbers; "not installed" for a source checkout."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
