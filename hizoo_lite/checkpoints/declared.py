"""What the config.json of a model's folder says of the model, read without transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hizoo_lite.files import read_json

#: Architectures that count positions from behind the padding token's id.
_BEHIND_PADDING = ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "roberta-prelayernorm", "esm")
#: What it is called; GPT-2 and its like have the second.
_POSITIONS = ("max_position_embeddings", "n_positions")


def positions_of(folder: Path) -> int | None:
    """Tokens that the position codes of the folder's config.json reach; None if it does not say."""
    config = model_config(folder)
    most, padding = next(filter(None, map(config.get, _POSITIONS)), None), config.get("pad_token_id")
    if type(most) is not int or most < 1:
        return None
    unused = padding + 1 if type(padding) is int and config.get("model_type") in _BEHIND_PADDING else 0
    return most - unused


def vocabulary_of(folder: Path) -> int | None:
    """How many tokens the model has, by the folder's config.json; None if it does not say."""
    count = model_config(folder).get("vocab_size")
    return count if type(count) is int and count > 0 else None


def model_config(folder: Path) -> dict[str, Any]:
    """The content of the folder's config.json; nothing if there is none."""
    path = folder / "config.json"
    return read_json(path, "settings of a model") if path.is_file() else {}
