"""Tasks: data sets, prompt templates, metrics, splits, and their encoding as token batches.

task = tasks.get("sst2")                       # or a path to a custom task's .toml
splits = tasks.make_splits(task, "data/sst2", seed=0)
encoder = tasks.Encoder(tokenizer, "causal", task, max_length=256)
batch = encoder.collate([encoder.encode(example, training=True) for example in splits.train[:16]])
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hizoo_lite.errors import UserError
from hizoo_lite.tasks import (
    classification,
    custom,
    multiple_choice,
    question_answering,
    superglue,
    text,
)
from hizoo_lite.tasks.batching import batch_indices, batches
from hizoo_lite.tasks.encoder import Encoded, Encoder
from hizoo_lite.tasks.mixture import of_tasks
from hizoo_lite.tasks.records import Records
from hizoo_lite.tasks.splits import Splits, make_splits
from hizoo_lite.tasks.task import Task
from hizoo_lite.tasks.usable import Usable, usable

__all__ = [
    "Encoded",
    "Encoder",
    "Records",
    "Splits",
    "Task",
    "Usable",
    "batch_indices",
    "batches",
    "get",
    "make_splits",
    "names",
    "of_tasks",
    "usable",
]

_FAMILIES = (classification, superglue, multiple_choice, question_answering, text)
_BUILT_IN: dict[str, Task] = {task.name: task for family in _FAMILIES for task in family.TASKS}


def names() -> list[str]:
    """The built-in tasks' names, in order."""
    return list(_BUILT_IN)


#: What `get` makes a task of.
TaskLike = str | Path | Mapping[str, Any] | Callable[..., Any] | Task


def get(task: TaskLike) -> Task:
    """A task by its name, from a user's own file or keys, from a function, or as it is.

    Args:
        task: a built-in task's name; the path of a `.toml` file, or the keys of one; of a file of several
            tasks `FILE.toml:NAME` is one; a function from a row of the data to (prompt, completion); or a
            task.

    Raises:
        UserError: if the name is unknown, or this is not a valid task.

    Example:
        >>> from hizoo_lite import tasks
        >>> tasks.get("sst2").labels
        ('negative', 'positive')
        >>> task = tasks.get(lambda row: (f"{row['question']} Answer:", f" {row['answer']}"))
        >>> [example] = task.load(tasks.Records([{"question": "1 + 1?", "answer": "2"}]), "train")
        >>> example.answers
        (' 2',)
    """
    if isinstance(task, Task):
        return task
    if isinstance(task, Mapping):
        return of_tasks(custom.from_keys(task))
    if callable(task):
        return custom.from_function(task)
    name = str(task)
    if name in _BUILT_IN:
        return _BUILT_IN[name]
    if name.endswith(".toml"):
        return of_tasks(custom.load(Path(name)))
    stem, suffix, one = name.partition(".toml:")
    if suffix:  # the task's own name may have a colon
        file = f"{stem}.toml"
        found = {part.name: part for part in custom.load(Path(file))}
        if one not in found:
            raise UserError(f"task: {file} has no task {one!r}; allowed: {', '.join(found)}")
        return found[one]
    raise UserError(f"task: unknown name {name!r}; allowed: {', '.join(names())}, or a path to a .toml file")
