"""Where the folder of something tuned is, and what PEFT's adapter_config.json says. Needs no torch."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hizoo_lite.arrays import Shape
from hizoo_lite.base import ModelKind
from hizoo_lite.errors import UserError
from hizoo_lite.files import read_json

PEFT_FILE = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
SPACE_FILE = "hizoo_space.json"
SPACE_FORMAT = 1
#: In front of every name in PEFT's file of weights.
PEFT_PREFIX = "base_model.model."
#: Of that file.
PEFT_METADATA = {"format": "pt"}

_MOST_RANK = 1 << 31

#: Settings of a PEFT adapter that change its product, and the only values that ours reproduces.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "use_dora": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layers_to_transform": (None, []),
    # Others (pissa, olora, corda, loftq, lora_ga) have PEFT change the base whenever it loads the adapter.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal", "mica"),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
    "lora_bias": (False, None),
    "use_qalora": (False, None),
    "use_bdlora": (None, False),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
}

#: What the owner of an adapter can do about a setting that is not supported.
_REMEDIES = {
    "init_lora_weights": "; PEFT makes a plain LoRA adapter of it with "
    "save_pretrained(..., path_initial_model_for_weight_conversion=...)",
}


def find_adapter(path: Path | str) -> Path:
    """The adapter folder of a run folder, or the path itself. UserError if nothing tuned is in it."""
    for folder in (Path(path) / "adapter", Path(path)):
        if (folder / PEFT_FILE).is_file() or (folder / SPACE_FILE).is_file():
            return folder
    if (Path(path) / "config.toml").is_file() or (Path(path) / "checkpoints").is_dir():
        raise UserError(
            f"{path}: the run has no result yet; finish it with --resume, or give one of its checkpoints, "
            f"{Path(path) / 'checkpoints' / 'step-N'}"
        )
    lacking = "" if Path(path).exists() else " (no such folder)"
    raise UserError(
        f"--adapter: got {str(path)!r}{lacking}, allowed: a run folder, or a folder with {PEFT_FILE} or "
        f"{SPACE_FILE}"
    )


def read_peft_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json of a LoRA adapter. UserError, naming the field, if it is of another form."""
    path = folder / PEFT_FILE
    config = read_json(path, "the settings of a LoRA adapter of PEFT, a JSON object")
    missing = [key for key in ("r", "lora_alpha", "target_modules") if key not in config]
    if missing:
        raise UserError(f"{path}: no {missing[0]!r}; a LoRA adapter of PEFT has it")
    _check_numbers(path, config)
    targets = config["target_modules"]
    names = targets if isinstance(targets, list) else [targets]
    if not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}: target_modules: got {targets!r:.80}, allowed: a text, or a list of texts")
    check_supported(str(path), config)
    return config


def check_supported(where: str, config: Mapping[str, Any]) -> None:
    """UserError, naming the field, for settings of a LoRA adapter that ours do not reproduce."""
    for key, values in _SUPPORTED.items():
        if key in config and config[key] not in values:
            shown = ", ".join(map(repr, values))
            raise UserError(
                f"{where}: {key}: got {config[key]!r}, supported: {shown}{_REMEDIES.get(key, '')}"
            )


def read_record(folder: Path) -> dict[str, Any]:
    """hizoo_space.json of a folder; `UserError` if it is missing, not valid or of another version."""
    path = folder / SPACE_FILE
    record = read_json(path, "what a run writes of the weights that it tuned, a JSON object")
    missing = {"format", "space", "targets", "base_model", "kind", "bits"} - set(record)
    if missing:
        raise UserError(f"{path}: lacks {', '.join(sorted(missing))}")
    if record["format"] != SPACE_FORMAT:
        raise UserError(f"{path}: format: got {record['format']!r:.80}, this version reads {SPACE_FORMAT}")
    targets = record["targets"]
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise UserError(f"{path}: targets: got {targets!r:.80}, allowed: a list of layers' names")
    if not isinstance(record["space"], str):
        raise UserError(f"{path}: space: got {record['space']!r:.80}, allowed: a space's name")
    return record


def _check_numbers(path: Path, config: dict[str, Any]) -> None:
    rank, alpha = config["r"], config["lora_alpha"]
    if type(rank) is not int or not 1 <= rank <= _MOST_RANK:
        raise UserError(f"{path}: r: got {rank!r:.80}, allowed: a whole number from 1 to {_MOST_RANK}")
    if type(alpha) not in (int, float) or not abs(alpha) <= sys.float_info.max:
        raise UserError(f"{path}: lora_alpha: got {alpha!r:.80}, allowed: a finite number")


def check_heads(path: Path, names: Iterable[str], kind: ModelKind, trunk: str) -> None:
    """UserError if an adapter in `path` has other parameters in full than those of a classifier's head.

    names: of the model's parameters, but for A and B. trunk: name of the module below the head. PEFT's
    `modules_to_save` may name an embedding, a norm or a causal model's head, which may be tied: none of
    that is computed here, whether the adapter is evaluated or exported.
    """
    inside = f"{trunk}."
    for name in sorted(names):
        if kind != "classifier" or (name.startswith(inside) and ".pooler." not in name):
            raise UserError(
                f"{path}: {name} was tuned as a whole (modules_to_save); supported: a classifier's head alone"
                "; PEFT merges such an adapter with merge_and_unload"
            )


def scaling(config: dict[str, Any]) -> float:
    """The factor of a LoRA product: alpha / r, or alpha / sqrt(r) with rank-stabilized LoRA."""
    rank = config["r"]
    return float(config["lora_alpha"]) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def peft_weights(folder: Path | str) -> Path:
    """The adapter's tensors. UserError if the folder has none."""
    path = Path(folder) / PEFT_WEIGHTS
    if not path.is_file():
        raise UserError(f"{path}: no such file; a PEFT adapter folder holds {PEFT_WEIGHTS}")
    return path


def check_fits(path: Path, found: Mapping[str, Shape], wanted: Mapping[str, Shape]) -> None:
    """UserError unless a file has the wanted names (without PEFT_PREFIX) and shapes."""
    wrong = sorted(set(found) ^ set(wanted))
    if wrong:
        raise UserError(f"{path}: does not fit this model and space; first of {len(wrong)}: {wrong[0]!r}")
    for name, shape in wanted.items():
        if tuple(found[name]) != tuple(shape):
            got, want = tuple(found[name]), tuple(shape)
            raise UserError(f"{path}: {name} has shape {got}, the model wants {want}")
