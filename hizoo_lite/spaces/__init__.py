"""Spaces: what is trainable, and how each branch's own parameters enter a linear layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hizoo_lite.base import Space, UserError
from hizoo_lite.quant import native  # noqa: F401 - imports bitsandbytes quietly, before peft does so aloud
from hizoo_lite.spaces.dense import Dense
from hizoo_lite.spaces.lora import LoRA
from hizoo_lite.spaces.scales import Scales

__all__ = ["SPACES", "Dense", "LoRA", "Scales", "get"]

SPACES: dict[str, Callable[..., Space]] = {"lora": LoRA, "dense": Dense, "scales": Scales}


def get(name: str, **options: Any) -> Space:
    """The space called `name`, made with `options`; `UserError` for an unknown name or option."""
    if name not in SPACES:
        raise UserError(f"--space: unknown name {name!r}, allowed are {', '.join(sorted(SPACES))}")
    try:
        return SPACES[name](**options)
    except TypeError as error:
        raise UserError(f"--space {name}: {error}") from error
