"""Estimators: which points a step evaluates, and from their losses to the scalars of the step."""

from __future__ import annotations

from hizoo_lite.estimators.hizoo import HiZOO
from hizoo_lite.estimators.mezo import MeZO
from hizoo_lite.registry import ESTIMATORS

__all__ = ["ESTIMATORS", "HiZOO", "MeZO", "get"]

#: See `Registry.make`.
get = ESTIMATORS.make
