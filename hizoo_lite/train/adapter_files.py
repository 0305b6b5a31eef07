"""Where the folder of something tuned is, and what PEFT's adapter_config.json says. Needs no torch."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from hizoo_lite.errors import UserError

PEFT_FILE = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
SPACE_FILE = "hizoo_space.json"
#: In front of every name in PEFT's file of weights.
PEFT_PREFIX = "base_model.model."

#: Settings of a PEFT adapter that change its product, and the only values that ours reproduces.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "use_dora": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layers_to_transform": (None, []),
}


def find_adapter(path: Path | str) -> Path:
    """The adapter folder of a run folder, or the path itself. UserError where nothing tuned is in it."""
    for folder in (Path(path) / "adapter", Path(path)):
        if (folder / PEFT_FILE).is_file() or (folder / SPACE_FILE).is_file():
            return folder
    raise UserError(
        f"--adapter: got {str(path)!r}, allowed: a run folder, or a folder with {PEFT_FILE} or {SPACE_FILE}"
    )


def read_peft_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json of a LoRA adapter. UserError, naming the field, where it is of another form."""
    path = folder / PEFT_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: a JSON object wanted, got {type(config).__name__}")
    missing = [key for key in ("r", "lora_alpha", "target_modules") if key not in config]
    if missing:
        raise UserError(f"{path}: no {missing[0]!r}; a LoRA adapter of PEFT has it")
    for key, values in _SUPPORTED.items():
        if key in config and config[key] not in values:
            shown = ", ".join(map(repr, values))
            raise UserError(f"{path}: {key}: got {config[key]!r}, supported: {shown}")
    return config


def scaling(config: dict[str, Any]) -> float:
    """The factor of a LoRA product: alpha / r, or alpha / sqrt(r) with rank-stabilized LoRA."""
    rank = int(config["r"])
    return float(config["lora_alpha"]) / (math.sqrt(rank) if config.get("use_rslora") else rank)
