"""Curvatures: how Sigma, the inverse of a diagonal Hessian estimate, is kept."""

from __future__ import annotations

from typing import Any

from hizoo_lite.base import Curvature, Estimator
from hizoo_lite.curvature.diagonal import Diagonal
from hizoo_lite.curvature.factored import Factored
from hizoo_lite.curvature.grouped import Grouped
from hizoo_lite.curvature.none import NoCurvature
from hizoo_lite.registry import CURVATURES, SPACES

__all__ = ["CURVATURES", "Diagonal", "Factored", "Grouped", "NoCurvature", "for_estimator", "get"]

#: See `Registry.make`.
get = CURVATURES.make


def for_estimator(config: Any, estimator: Estimator) -> Curvature:
    """The curvature of a `TrainConfig`; the identity if its estimator measures none in all its steps.

    So it is if the noise of its space is `structured`.
    """
    line = SPACES.lines.get(config.space)
    learns = estimator.measures_within(config.steps) and not (line is not None and line.structured)
    return CURVATURES.configured(config) if learns else NoCurvature()
