"""Small JSON files of an exported folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hizoo_lite.errors import UserError

#: No export.json, train.json or tokenizer_config.json is larger.
_MOST_BYTES = 64 << 20


def read_json(path: Path, wanted: str) -> dict[str, Any]:
    """The object in a file, which is `wanted`. UserError naming it where it is missing or something else."""
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise UserError(f"{path}: {path.stat().st_size} bytes; allowed: {wanted}, at most {_MOST_BYTES}")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; allowed: {wanted}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"{path}: not sound JSON ({error}); allowed: {wanted}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: got a {type(value).__name__}, allowed: {wanted}")
    return value
