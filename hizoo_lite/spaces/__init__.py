"""Spaces: what is trainable, and how each branch's own parameters enter a linear layer."""

from __future__ import annotations

from hizoo_lite.quant import native  # noqa: F401 - imports bitsandbytes quietly, before peft does so aloud
from hizoo_lite.registry import SPACES
from hizoo_lite.spaces.dense import Dense
from hizoo_lite.spaces.lora import LoRA
from hizoo_lite.spaces.scales import Scales

__all__ = ["SPACES", "Dense", "LoRA", "Scales", "get"]

#: See `Registry.make`.
get = SPACES.make
