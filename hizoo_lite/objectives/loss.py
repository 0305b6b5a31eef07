"""The task's own loss."""

from __future__ import annotations

from hizoo_lite.base import Objective


class Loss(Objective):
    """Points are compared by their losses, as they are."""

    name = "loss"
