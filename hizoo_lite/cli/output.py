"""Results on stdout: tables for people, JSON for programs."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from hizoo_lite.config import default
from hizoo_lite.registry import ESTIMATORS
from hizoo_lite.units import counted, format_bytes


def say_loading() -> None:
    """Say on stderr, once for all ranks, what the next seconds go to, if torch is still to be imported."""
    if "torch" not in sys.modules and os.environ.get("RANK", "0") == "0":
        typer.echo("loading torch and transformers", err=True)


def say_drawing() -> None:
    """Say on stderr what the next seconds go to, if the plots' library is still to be imported."""
    if "matplotlib" not in sys.modules:
        typer.echo("drawing the report", err=True)


def print_json(value: Mapping[str, Any]) -> None:
    """One JSON document; numbers that are not finite become null."""
    from hizoo_lite.train.folder import plain

    typer.echo(json.dumps(plain(value), indent=2, allow_nan=False))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A title and a table as wide as the terminal; texts are printed as they are."""
    typer.echo(title)
    table = Table()
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*map(_plain, row))
    Console().print(table)


def _plain(text: str) -> str:
    return text.replace("[", r"\[")


def print_run(summary: Mapping[str, Any]) -> None:
    """Before and after, and what it took."""
    rows = _scores(summary, "")
    for task, found in summary.get("tasks", {}).items():
        rows += _scores(found, f"{task}: ")
    title = f"{summary['task']}, {counted(summary['test_examples'] or 0, 'test example')}"
    print_table(title, ["score", "before", "after"], rows)
    speed = summary["seconds_per_step"]
    typer.echo(
        f"{counted(summary['steps'], 'step')} ({_method(summary)}"
        + ("" if summary["objective"] == default("objective") else f", objective {summary['objective']}")
        + "), "
        f"{summary['forward_passes']:,} forward passes"
        + ("" if speed is None else f", {1000 * speed:.0f} ms a step")
        + f", peak memory {format_bytes(summary['measured_peak_bytes'])}"
        + f" (inference {format_bytes(summary['inference_peak_bytes'])})"
    )


def _method(summary: Mapping[str, Any]) -> str:
    """Estimator and curvature; of exact gradients, which no member estimates, the name alone."""
    name = summary["estimator"]
    return f"{name}, curvature {summary['curvature']}" if name in ESTIMATORS else f"{name} gradients"


def _scores(found: Mapping[str, Any], of: str) -> list[list[str]]:
    """Loss and metric before and after, of a task."""
    metric = found["metric"]
    rows = [[f"{of}loss", number(found["loss_before"]), number(found["loss_after"])]]
    if metric != "loss":
        rows.append([of + metric, percent(found["metric_before"]), percent(found["metric_after"])])
    return rows


def print_verdict(folder: Path) -> None:
    """Whether a run has learnt, and what to try next."""
    from hizoo_lite.report import verdict
    from hizoo_lite.report.record import read_run

    said = verdict.of_run(read_run(folder))
    for line in () if said is None else (said.says, said.next):
        if line:
            typer.echo(line)


def print_commands(folder: Path, summary: Mapping[str, Any]) -> None:
    """What to do with what a run has trained, beside the results."""
    from hizoo_lite.report import verdict

    for what, command in verdict.commands(folder, summary).items():
        typer.echo(f"  {what}: {command}", err=True)


def score(name: str, value: float) -> str:
    """A loss as a number, a metric in percent: as `print_run` shows them."""
    return number(value) if name.rpartition("/")[2] == "loss" else percent(value)


def number(value: float | None) -> str:
    """Four digits after the point; "-" for nothing."""
    return "-" if value is None else f"{value:.4f}"


def percent(value: float | None) -> str:
    """Of one; "-" for nothing."""
    return "-" if value is None else f"{100 * value:.1f} %"
