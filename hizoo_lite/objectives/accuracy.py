"""Whether the gold answer is chosen: from the scores that a pass has made anyway, so it costs no forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from hizoo_lite.base import Objective
from hizoo_lite.batch import Example


class Accuracy(Objective):
    """1 if the candidate or class with the highest score is the gold one, else 0. Of equal ones the first.

    Example:
        >>> from hizoo_lite.batch import Example
        >>> Accuracy().value(Example({}, ("no", "yes"), gold=1), [-2.5, -0.5], {})
        1.0
    """

    name = "accuracy"
    reads = ("scores",)

    def value(
        self, example: Example, found: list[float], metrics: Mapping[str, Callable[..., float]]
    ) -> float:
        """See `Objective.value`."""
        return float(found.index(max(found)) == example.gold)
