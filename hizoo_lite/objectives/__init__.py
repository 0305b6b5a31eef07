"""Objectives: what the points of a step are compared by, if that is not the loss.

Estimators that need forwards alone need no gradient of it (MeZO 2305.17333, section 3.3). Accuracy and F1 are
flat but for jumps: if no answer of a batch changes between the points, the slope is 0 and nothing moves. A
larger mu sees more of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hizoo_lite.errors import UserError
from hizoo_lite.objectives.accuracy import Accuracy
from hizoo_lite.objectives.f1 import F1
from hizoo_lite.objectives.function import IN_MEMORY, Function
from hizoo_lite.objectives.loss import Loss
from hizoo_lite.registry import OBJECTIVES

if TYPE_CHECKING:
    from hizoo_lite.base import Objective
    from hizoo_lite.config import TrainConfig

__all__ = ["F1", "OBJECTIVES", "Accuracy", "Function", "Loss", "configured", "get"]

#: See `Registry.make`.
get = OBJECTIVES.make


def configured(config: TrainConfig) -> Objective:
    """The objective that settings name. The file of a function is run here, and nowhere else."""
    if config.objective in OBJECTIVES:
        return OBJECTIVES.configured(config)
    if config.objective.startswith(IN_MEMORY):
        raise UserError(
            f"--objective: {config.objective!r} was given to `fit` as a function; "
            "give it again: fit(..., objective=function)"
        )
    return Function.from_file(config.objective)
