"""How a step moves parameters: step sizes, and optimizers by name."""

from __future__ import annotations

from hizoo_lite.optimizers.sgd import SGD
from hizoo_lite.registry import OPTIMIZERS

__all__ = ["OPTIMIZERS", "SGD"]
