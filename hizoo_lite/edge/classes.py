"""Whether a classifier's graph and a task have the same classes."""

from __future__ import annotations

from hizoo_lite.edge.session import Graph
from hizoo_lite.errors import UserError
from hizoo_lite.tasks import Task


def check_classes(task: Task, graph: Graph, output: str) -> None:
    """UserError where the output of a classifier's graph, (..., classes), is not of the task's classes."""
    classes = graph.shape(output)[-1]
    if classes != task.num_labels:
        raise UserError(
            f"--task: {task.name} has {task.num_labels} classes (num_labels), the head in {graph.path} has "
            f"{classes} outputs; allowed: a task with as many classes"
        )
