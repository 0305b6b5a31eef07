"""F1 of the answer that is written, as the task's metric has it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from hizoo_lite.base import Objective
from hizoo_lite.batch import Example
from hizoo_lite.tasks.metrics import squad_f1


class F1(Objective):
    """The task's own F1 of the greedy completion (DROP's counts spans); SQuAD's, if it has none.

    Example:
        >>> from hizoo_lite.batch import Example
        >>> F1().value(Example({}, (" a red car",), 0, references=("a red car",)), "red bus", {})
        0.5
    """

    name = "f1"
    reads = ("text",)

    def value(self, example: Example, found: str, metrics: Mapping[str, Callable[..., float]]) -> float:
        """See `Objective.value`."""
        return metrics.get(self.name, squad_f1)([example], [found])
