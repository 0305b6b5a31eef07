"""A run folder as a reader finds it: complete, interrupted, or of an older version without some files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hizoo_lite.errors import UserError
from hizoo_lite.files import parse_json, parse_toml, read_json

_CONFIG, _METRICS, _SUMMARY = "config.toml", "metrics.jsonl", "summary.json"
_PLAN, _MEMORY, _PREDICTIONS = "plan.json", "memory.json", "predictions.jsonl"
_MOST_LEVELS = 32  # of tables in tables; a run writes four
_LARGEST = 1e100  # beyond it the limits of a plot overflow
#: What a report lacks without each file.
_MISSING = {
    _CONFIG: "the configuration is not known",
    _METRICS: "there are no curves: the run took no step",
    _SUMMARY: "the run did not come to an end; there are no totals",
    _PLAN: "there are no predictions to hold the measured bytes against",
    _MEMORY: "memory was not sampled, only its peak is known",
}


@dataclass(frozen=True, eq=False)
class RunRecord:
    """Everything that a report is made from. A file that is not there leaves its part empty."""

    path: Path
    config: dict[str, Any]
    summary: dict[str, Any]
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    plan: dict[str, Any]
    memory: dict[str, Any]
    missing: list[str]  # a sentence for each file that is not there
    predictions: list[dict[str, Any]]  # of test examples, before and after

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.path.resolve().name


def read_run(path: Path | str) -> RunRecord:
    """The record of a run folder. UserError if there is none, or if a file of it is not valid."""
    path = Path(path)
    if not path.is_dir() or not any((path / name).is_file() for name in (_CONFIG, _METRICS, _SUMMARY)):
        raise UserError(f"RUN: got {str(path)!r}, allowed: a run folder (with {_CONFIG} and {_METRICS})")
    lines = _read_lines(path / _METRICS, ("kind", "step"))
    return RunRecord(
        path,
        _read_config(path / _CONFIG),
        _read_json(path / _SUMMARY),
        [line for line in lines if line["kind"] == "step"],
        [line for line in lines if line["kind"] == "eval"],
        _read_json(path / _PLAN),
        _read_json(path / _MEMORY),
        [f"{name} is missing: {what}." for name, what in _MISSING.items() if not (path / name).is_file()],
        _read_lines(path / _PREDICTIONS, ("when", "index")),
    )


def number(value: Any) -> float | None:
    """A finite number, else None: what is missing, null, NaN, too large or of another kind is not shown."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if abs(value) <= _LARGEST else None  # NaN is not


def table(value: Any) -> dict[str, Any]:
    """The value if it is a table, else an empty one."""
    return value if isinstance(value, dict) else {}


def rows(value: Any) -> list[dict[str, Any]]:
    """The tables of a list."""
    return [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []


def _shallow(value: Any, levels: int = _MOST_LEVELS) -> Any:
    """The value; ValueError if it is nested more deeply than what a report walks through."""
    if isinstance(value, dict | list):
        if levels == 0:
            raise ValueError("it is nested too deeply")
        for item in value.values() if isinstance(value, dict) else value:
            _shallow(item, levels - 1)
    return value


def _read_config(path: Path) -> dict[str, Any]:
    """Raw, so that the settings of an older or newer version can be shown too."""
    if not path.is_file():
        return {}
    try:
        return _shallow(parse_toml(_read_text(path)))
    except ValueError as error:
        raise UserError(f"{path}: not valid TOML ({error})") from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    value = read_json(path, "a JSON object")
    try:
        return _shallow(value)
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error


def _read_lines(path: Path, needs: tuple[str, str]) -> list[dict[str, Any]]:
    """The objects of a file, a line each, that have a word and a number by these names."""
    lines = _read_text(path).split("\n") if path.is_file() else [""]
    if lines[-1]:
        raise UserError(
            f"{path}: line {len(lines)} is cut off; remove it, or continue the run (--resume writes it again)"
        )
    return [_read_line(path, count, line, *needs) for count, line in enumerate(lines[:-1], start=1)]


def _read_line(path: Path, count: int, line: str, word: str, figure: str) -> dict[str, Any]:
    try:
        value = _shallow(parse_json(line))
    except ValueError as error:
        raise UserError(f"{path}: line {count} is not valid JSON ({error})") from error
    if not isinstance(value, dict) or word not in value or number(value.get(figure)) is None:
        raise UserError(f"{path}: line {count} is no record of a run; it needs {word} and {figure}")
    return value


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
