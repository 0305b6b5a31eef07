"""What settings are called elsewhere: by transformers' Trainer, PEFT, TRL, axolotl, LLaMA-Factory and MeZO.

Nobody should have to look up a name that they know: a flag, a key or an argument that is none of ours is
answered with ours.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

#: Their names of a setting, by ours.
THEIRS = {
    "model": "model_name_or_path base_model model_name pretrained_model",
    "data": "dataset dataset_name datasets data_path train_file dataset_path",
    "task": "task_name",
    "out": "output_dir output save_dir",
    "lr": "learning_rate",
    "lr_schedule": "lr_scheduler_type lr_scheduler scheduler",
    "warmup_steps": "warmup num_warmup_steps",
    "steps": "max_steps num_steps iters total_steps",
    "epochs": "num_train_epochs num_epochs",
    "batch_size": "per_device_train_batch_size micro_batch_size train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "accumulate": "gradient_accumulation_steps",
    "max_length": "max_seq_length max_seq_len sequence_len cutoff_len block_size",
    "rank": "lora_r r lora_rank",
    "alpha": "lora_alpha",
    "targets": "target_modules lora_target_modules lora_target lora_targets",
    "bits": "load_in_4bit load_in_8bit quantization_bit bnb_4bit_quant_type",
    "double_quant": "bnb_4bit_use_double_quant double_quantization",
    "compute_dtype": "bf16 fp16 dtype torch_dtype bnb_4bit_compute_dtype",
    "eval_every": "eval_steps evaluation_steps",
    "save_every": "save_steps save_interval",
    "keep": "load_best_model_at_end",
    "clip": "max_grad_norm gradient_clipping clip_grad",
    "mu": "zo_eps eps perturbation_scale",
    "train_examples": "num_train max_train_samples max_samples",
    "dev_examples": "num_dev max_eval_samples",
    "test_examples": "num_eval max_predict_samples",
    "tracker": "report_to logger",
    "resume": "resume_from_checkpoint",
    "residency": "offload device_map offload_folder",
    "device_budget": "max_memory",
    "init_adapter": "adapter_name_or_path lora_model_dir peft_model_id",
}
_OURS = {theirs: ours for ours, names in THEIRS.items() for theirs in names.split()}


def ours(name: str) -> str | None:
    """Our name of a setting that is called `name` elsewhere; None if it is called so nowhere."""
    return _OURS.get(name)


def meant(name: str, known: Iterable[str]) -> str | None:
    """The one of `known` names that somebody who writes `name` has in mind; None if that cannot be told.

    Dashes and underscores are alike.
    """
    wanted, own = name.strip("-").replace("-", "_").lower(), list(known)
    plain = {each.strip("-").replace("-", "_"): each for each in own}
    found = _OURS.get(wanted)
    if found in plain:
        return plain[found]
    close = difflib.get_close_matches(wanted, plain, n=1)
    return plain[close[0]] if close else None


def hint(name: str, known: Iterable[str]) -> str:
    """How a message about an unknown name ends."""
    own = list(known)
    found = meant(name, own)
    return f"; did you mean {found!r}?" if found else f"; allowed: {', '.join(own)}"
