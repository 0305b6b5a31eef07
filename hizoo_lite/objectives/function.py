"""A user's own objective: a Python function, the higher the better.

    def brevity(prompt, text, row):             # what was asked, what was written, the row of the data
        return -len(text.split())

Where the task has answers to choose from, `text` is the chosen one. A function of two arguments is given the
example (fields, answers, gold, references) and the text, or the scores of all answers.

`--objective rewards.py:brevity` runs that file, as `python rewards.py` would: only name files whose code you
trust. A run that is resumed runs it again; evaluations, exports, reports and replays do not.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hizoo_lite.base import Objective
from hizoo_lite.batch import Example
from hizoo_lite.checkpoints.fingerprint import of_files
from hizoo_lite.errors import UserError
from hizoo_lite.tasks.task import ROW, where

#: What a configuration calls a function that was given to `fit`, before its name.
IN_MEMORY = "in memory:"


#: The arguments of a function that reads examples, and of one that reads rows.
_EXAMPLES, _ROWS = ("example", "scores or text"), ("prompt", "text", "row")
_WANTED = " or ".join(f"({', '.join(names)})" for names in (_ROWS, _EXAMPLES))


class Function(Objective):
    """What a function gives. `source`: of its file, or of its own lines."""

    reads = ("scores", "text")

    def __init__(self, name: str, function: Callable[..., Any], source: str) -> None:
        """UserError for a function of another number of arguments."""
        self.name, self.function, self.source = name, function, source
        self.reads_rows = _arguments(name, function) == len(_ROWS)

    @classmethod
    def of(cls, function: Callable[..., Any]) -> Function:
        """One in memory."""
        if not callable(function):
            raise UserError(f"objective: got {function!r:.80}, allowed: a name, or a function")
        name = getattr(function, "__name__", type(function).__name__)
        try:
            source = inspect.getsource(function)
        except (OSError, TypeError):  # it was typed in, or is an object that can be called
            source = name
        return cls(IN_MEMORY + name, function, hashlib.sha256(source.encode()).hexdigest())

    @classmethod
    def from_file(cls, name: str) -> Function:
        """That of "FILE.py:NAME". UserError if the file fails or has no such function."""
        path, _, attribute = name.rpartition(":")
        if not Path(path).is_file():
            raise UserError(f"--objective: no such file: {path}")
        spec = importlib.util.spec_from_file_location("hizoo_objective", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:  # it is a program of others
            raise UserError(f"--objective: {path}: {type(error).__name__}: {error}") from error
        function = getattr(module, attribute, None)
        if not callable(function):
            raise UserError(f"--objective: {path}: has no function {attribute!r}")
        return cls(name, function, of_files([Path(path)]))

    def value(
        self, example: Example, found: Any, metrics: Mapping[str, Callable[..., float]], prompt: str = ""
    ) -> float:
        """See `Objective.value`. UserError for what the function cannot do, and for no number."""
        given: tuple[Any, ...] = (example, found)
        if self.reads_rows:
            row = copy.deepcopy(dict(example.fields[ROW]))  # what it does to it is not the next one's
            given = (prompt, found if isinstance(found, str) else _chosen(example, found), row)
        try:
            return float(self.function(*given))
        except Exception as error:  # a program of others, again
            raise UserError(
                f"--objective: {self.name}: {where(example)}: {type(error).__name__}: {error}; "
                f"wanted: a function of {_WANTED} to a number"
            ) from error


def _chosen(example: Example, scores: Sequence[float]) -> str:
    """The answer with the highest score, the number of its class if it has no words."""
    best = scores.index(max(scores))
    return example.answers[best].strip() if example.answers else str(best)


def _arguments(name: str, function: Callable[..., Any]) -> int:
    """How many arguments the function is given: as many as it must have, if that is known."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # one of C
        return len(_EXAMPLES)
    by_place = [one for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    most = math.inf if any(one.kind is one.VAR_POSITIONAL for one in parameters) else len(by_place)
    least = sum(one.default is one.empty for one in by_place)
    keywords = [one.name for one in parameters if one.kind is one.KEYWORD_ONLY and one.default is one.empty]
    for wanted in (_EXAMPLES, _ROWS):
        if least <= len(wanted) <= most and not keywords:
            return len(wanted)
    raise UserError(f"--objective: {name}: takes {inspect.signature(function)}, allowed: {_WANTED}")
