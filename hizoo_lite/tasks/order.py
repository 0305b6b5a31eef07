"""Which output of a classifier is which class of a task, by their names.

A published classifier may have another order than the data: roberta-large-mnli has contradiction, neutral,
entailment, the GLUE data entailment, neutral, contradiction. config.json says which is which (`id2label`); as
in transformers' run_glue.py the names count if they are the same.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

from hizoo_lite.tasks.task import Task

_log = logging.getLogger(__name__)

#: What transformers calls the classes of a model that was told none.
_NO_NAME = re.compile(r"label[ _]?\d+|\d+")


def output_order(task: Task, named: Any) -> tuple[int, ...] | None:
    """The classifier's output for each class of the task; None if output i is class i.

    named: `id2label`, of a configuration or of config.json. Names that say something else than the task's are
    logged, and numbers count then.
    """
    names = _names(named)
    if not task.labels or names is None or len(names) != len(task.labels):
        return None
    wanted = [_plain(label) for label in task.labels]
    if sorted(names) == sorted(wanted) and len(set(names)) == len(names):
        order = tuple(names.index(label) for label in wanted)
        return None if order == tuple(range(len(order))) else order
    if not all(_NO_NAME.fullmatch(name) for name in names):
        _log.warning(
            "%s: its classes are %s, the model calls its own %s (id2label); they are taken by number",
            *(task.name, ", ".join(task.labels), ", ".join(names)),
        )
    return None


def _names(named: Any) -> list[str] | None:
    """The names of outputs 0, 1, ...; None if that is not what is said."""
    if not isinstance(named, Mapping):
        return None
    by_number = {str(number): _plain(str(name)) for number, name in named.items()}
    names = [by_number.get(str(number)) for number in range(len(by_number))]
    return [name for name in names if name is not None] if None not in names else None


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().lower()
