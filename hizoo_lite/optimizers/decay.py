"""Decoupled weight decay (Loshchilov and Hutter, 1711.05101), not on biases and norms, as MeZO has it."""

from __future__ import annotations

from collections.abc import Mapping

from hizoo_lite.arrays import Array


def apply_decay(parameters: Mapping[str, Array], decay: float) -> None:
    """p <- (1 - decay) p in place. decay: already times the learning rate."""
    for name, value in parameters.items():
        if decay and not _is_bias_or_norm(name):
            value *= 1 - decay


def _is_bias_or_norm(name: str) -> bool:
    parts = name.lower().split(".")
    return parts[-1] == "bias" or any("norm" in part or part.startswith("ln_") for part in parts)
