"""Estimators: which points a step evaluates, and from their losses to the scalars of the step."""

from __future__ import annotations

from hizoo_lite.base import Estimator
from hizoo_lite.config import TrainConfig
from hizoo_lite.estimators.hizoo import HiZOO
from hizoo_lite.estimators.mezo import MeZO
from hizoo_lite.registry import Registry

__all__ = ["ESTIMATORS", "HiZOO", "MeZO", "get", "make_estimator"]

ESTIMATORS: Registry[Estimator] = Registry("estimator", {"hizoo": HiZOO, "mezo": MeZO})

#: See `Registry.make`.
get = ESTIMATORS.make


def make_estimator(config: TrainConfig) -> Estimator:
    """The estimator that a configuration names, with its own options.

    If it leaves the directions of a step open: 2 for parameters in memory, with curvature from predictions
    (`hizoo.py`); 1 otherwise.
    """
    several = config.space == "lora" and config.curvature_from == "predictions"
    if several and config.directions == "auto" and config.estimator == "hizoo":
        return ESTIMATORS.configured(config, directions=2)
    return ESTIMATORS.configured(config)
