"""Curvatures: how Sigma, the inverse of a diagonal Hessian estimate, is kept."""

from __future__ import annotations

from hizoo_lite.base import Curvature
from hizoo_lite.curvature.diagonal import Diagonal
from hizoo_lite.curvature.factored import Factored
from hizoo_lite.curvature.grouped import Grouped
from hizoo_lite.curvature.none import NoCurvature
from hizoo_lite.registry import Registry

__all__ = ["CURVATURES", "Diagonal", "Factored", "Grouped", "NoCurvature", "get"]

CURVATURES: Registry[Curvature] = Registry(
    "curvature",
    {
        "none": NoCurvature,
        "diagonal": Diagonal,
        "grouped": Grouped,
        "factored": Factored,
    },
)

#: See `Registry.make`.
get = CURVATURES.make
