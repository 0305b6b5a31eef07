"""transformers' `TrainingArguments` as settings of a run; what cannot be honoured is refused, all at once.

An argument counts as given if it is not its class's default: the object does not say which were. So
`learning_rate=5e-5`, which is, leaves `lr` to be derived from the measured curvature, and that is told.
"""

from __future__ import annotations

import logging
import math
from dataclasses import fields
from typing import Any

from transformers import TrainingArguments

from hizoo_lite import synonyms
from hizoo_lite.config import refuse, settings

_log = logging.getLogger(__name__)

#: What the trainer's callbacks, or `of`, read by themselves.
_READ = frozenset(
    (
        *("max_steps", "num_train_epochs", "seed", "per_device_train_batch_size"),
        *("gradient_accumulation_steps", "eval_strategy", "eval_steps", "save_strategy", "save_steps"),
        *("warmup_steps", "lr_scheduler_type", "report_to", "use_cpu", "bf16", "load_best_model_at_end"),
        *("logging_strategy", "logging_steps", "logging_first_step", "disable_tqdm"),
        *("metric_for_best_model", "greater_is_better", "remove_unused_columns", "resume_from_checkpoint"),
        *(
            "do_train",
            "do_eval",
            "do_predict",
            "activation_checkpointing",
        ),  # gradient_checkpointing says it too
    )
)
#: What changes nothing that is trained here: beginnings of names.
_WITHOUT_MEANING = (
    *("dataloader_", "ddp_", "hub_", "log_", "trackio_", "project", "logging_dir"),
    *("logging_nan", "eval_accumulation", "eval_do_concat", "eval_use_gather", "average_tokens", "tf32"),
    *("skip_memory", "local_rank", "save_only_model", "save_on_each", "full_determinism", "overwrite_"),
    *("prediction_loss_only", "torch_empty_cache", "use_cache", "save_safetensors", "adam_", "optim_args"),
)
#: Why what people set often is refused, and what to do.
_WHY = {
    "gradient_checkpointing": "there is no backward pass to keep activations for; leave it out",
    "fp16": "there is no loss scaling; allowed: bf16, or HiZOOTrainer(..., compute_dtype='fp16')",
    "deepspeed": "a model runs block by block in one process; allowed: device_budget, residency",
    "fsdp": "a model runs block by block in one process; allowed: device_budget, residency",
    "optim": "steps are the estimator's; allowed: HiZOOTrainer(..., estimator=, curvature=)",
    "push_to_hub": "allowed: trainer.run.push_to_hub(NAME), once it is trained",
}


def of(args: TrainingArguments, read: frozenset[str] = frozenset()) -> dict[str, Any]:
    """The settings of a run, by their names in `TrainConfig`.

    Args:
        args: transformers'.
        read: further arguments that the caller reads.

    Raises:
        UserError: naming every argument that is refused.
    """
    found = _lengths(args) | _schedule(args) | {"seed": args.seed, "out": args.output_dir}
    found["eval_batch_size"] = args.per_device_eval_batch_size
    if args.use_cpu:
        found["device"] = "cpu"
    if args.bf16:
        found["compute_dtype"] = "bf16"
    if args.load_best_model_at_end:
        found["keep"] = "best"
    problems, unused = [], []
    for name in sorted(given(args) - _READ - read):
        ours = name if name in settings() else synonyms.ours(name)
        if name.startswith(_WITHOUT_MEANING):
            unused.append(name)
        elif name in _WHY or ours is None:
            reason = _WHY.get(name, "it has no counterpart here; leave it out")
            problems.append(f"{name}: got {_shown(getattr(args, name))}, {reason}")
        else:
            found[ours] = getattr(args, name)
    refuse([*problems, *_problems(args)], "TrainingArguments")
    if unused:
        _log.warning("TrainingArguments: these have no meaning here: %s", ", ".join(unused))
    return found


def given(args: TrainingArguments) -> set[str]:
    """The names of arguments that are not the defaults of their class."""
    usual = type(args)(output_dir=args.output_dir, use_cpu=args.use_cpu)
    return {f.name for f in fields(args) if getattr(args, f.name) != getattr(usual, f.name)}


def _lengths(args: TrainingArguments) -> dict[str, Any]:
    """Steps and batches: one of ours is of all devices, and goes through in parts."""
    parts = args.gradient_accumulation_steps
    found: dict[str, Any] = {"batch_size": args.per_device_train_batch_size * parts * args.world_size}
    found["accumulate"] = parts
    whole = {"steps": args.max_steps} if args.max_steps > 0 else {"epochs": float(args.num_train_epochs)}
    for name, strategy, steps in (
        ("eval_every", args.eval_strategy, args.eval_steps),
        ("save_every", args.save_strategy, args.save_steps),
    ):
        found[name] = _steps(steps, args) if strategy == "steps" else 0
    return found | whole


def _steps(given: float, args: TrainingArguments) -> int:
    """A number of steps, which may be given as a share of the run's."""
    return math.ceil(given * args.max_steps) if 0 < given < 1 else int(given)


def _schedule(args: TrainingArguments) -> dict[str, Any]:
    name = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    found = {"lr_schedule": "constant" if name == "constant_with_warmup" else name}
    trackers = [args.report_to] if isinstance(args.report_to, str) else list(args.report_to or ())
    return {
        **found,
        "warmup_steps": _steps(args.warmup_steps, args),
        "tracker": trackers[0] if len(trackers) == 1 else "none",
    }


def _problems(args: TrainingArguments) -> list[str]:
    """Arguments whose values are refused."""
    checked = {
        "report_to": (isinstance(args.report_to, list) and len(args.report_to) > 1, "one tracker, or none"),
        **{
            name: (0 < (getattr(args, name) or 0) < 1 > args.max_steps, "a number of steps, or max_steps too")
            for name in ("warmup_steps", "eval_steps", "save_steps")
        },
        "save_strategy": (args.save_strategy == "best", "no, steps, epoch, with load_best_model_at_end"),
        "load_best_model_at_end": (
            args.load_best_model_at_end and args.eval_strategy != "steps",
            "with eval_strategy='steps'",
        ),
    }
    wrong = {name: allowed for name, (is_wrong, allowed) in checked.items() if is_wrong}
    return [
        f"{name}: got {_shown(getattr(args, name))}, allowed: {allowed}" for name, allowed in wrong.items()
    ]


def _shown(value: Any) -> str:
    return f"{getattr(value, 'value', value)!r:.80}"
