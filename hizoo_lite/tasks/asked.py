"""One text put to a model as a task would put it: to try a tuned model on what has no label yet."""

from __future__ import annotations

from hizoo_lite.batch import Example
from hizoo_lite.errors import UserError
from hizoo_lite.tasks.files import Row
from hizoo_lite.tasks.task import Task
from hizoo_lite.tasks.templates import fields_of


def asked(task: Task, text: str) -> Example | None:
    """The example of a task that asks about one column, with `text` in it and some label.

    None for a task that asks about more, for several tasks, conversations and plain texts.
    """
    if len(task.parts) > 1 or task.chat or task.kind == "lm" or len(fields_of(task.causal)) != 1:
        return None
    labels = task.labels[:1] if task.kind == "choice" else (text,)
    for column in task.columns:  # one of them has the labels
        for label in labels:
            values = dict.fromkeys(task.columns, text) | {column: label}
            try:
                found = list(task.build(Row("--prompt", values)))
            except UserError:
                continue
            if found and found[0].fields.get(fields_of(task.causal)[0]) == text.strip():
                return found[0]
    return None
