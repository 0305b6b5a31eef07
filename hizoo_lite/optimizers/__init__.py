"""How a step moves parameters: step sizes, and optimizers by name."""

from __future__ import annotations

from hizoo_lite.base import Optimizer
from hizoo_lite.optimizers.sgd import SGD
from hizoo_lite.registry import Registry

__all__ = ["OPTIMIZERS", "SGD"]

OPTIMIZERS: Registry[Optimizer] = Registry("optimizer", {"sgd": SGD})
