"""Estimators: which points a step evaluates, and from their losses to the scalars of the step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hizoo_lite.estimators.dp import DP
from hizoo_lite.estimators.exact import Exact
from hizoo_lite.estimators.fzoo import FZOO
from hizoo_lite.estimators.grzo import GRZO
from hizoo_lite.estimators.hizoo import HiZOO
from hizoo_lite.estimators.kerzoo import KerZOO
from hizoo_lite.estimators.mezo import MeZO
from hizoo_lite.registry import ESTIMATORS

if TYPE_CHECKING:
    from hizoo_lite.base import Estimator
    from hizoo_lite.config import TrainConfig

__all__ = ["DP", "ESTIMATORS", "FZOO", "GRZO", "Exact", "HiZOO", "KerZOO", "MeZO", "configured", "get"]

#: See `Registry.make`.
get = ESTIMATORS.make


def configured(config: TrainConfig) -> Estimator:
    """The estimator of a run: the one that is named, if anything is estimated."""
    return ESTIMATORS.configured(config) if config.estimates else Exact()
