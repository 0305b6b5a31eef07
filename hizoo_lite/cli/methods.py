"""`hizoo-lite methods`: every member of every axis, with what it costs and when it pays."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from hizoo_lite.config import EMBEDDED, TrainConfig
from hizoo_lite.registry import CURVATURES, ESTIMATORS, SPACES


def command(json: Annotated[bool, typer.Option("--json", help="print JSON, nothing else")] = False) -> None:
    """List the methods: what a step estimates with, what is trained, how curvature is kept.

    Forwards are those of a step with its default settings; `--directions` changes them.

    Examples:

    hizoo-lite methods

    hizoo-lite methods --json
    """
    from hizoo_lite.cli import output

    axes = (ESTIMATORS, SPACES, CURVATURES)
    found = {axis.axis: [_member(axis, name) for name in axis] for axis in axes}
    if json:
        output.print_json(found)
        return
    for axis in axes:
        columns = [
            "name",
            "what it is",
            *(["forwards"] if axis is ESTIMATORS else ["holds"]),
            "pays",
            "source",
        ]
        rows = [[str(member[name]) for name in columns] for member in found[axis.axis]]
        output.print_table(f"--{axis.axis}", columns, rows)


def _member(axis: Any, name: str) -> dict[str, Any]:
    """What is said of a member, and counted."""
    line, settings = axis.lines[name], list(axis.arguments(name).values())
    found: dict[str, Any] = {"name": name, "what it is": line.help, "holds": line.holds}
    if axis is ESTIMATORS:
        config = TrainConfig(model=EMBEDDED, task=EMBEDDED, lr=1e-3, estimator=name)
        found["forwards"] = len(axis.configured(config).points(0))
    return found | {"pays": line.pays, "source": line.source, "settings": settings}
