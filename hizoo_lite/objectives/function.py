"""A user's own objective: a Python function to a number, the higher the better.

    def exact(prompt, text, row):               # row: every column of the data, a dict
        return float(text.strip() == row["answer"])

    def brevity(example, text):                 # example: fields, answers, gold, references
        return -len(text.split())

The first form is told from the second, of (example, scores or text), by its three parameters; of a function
that can do with two, by the third being called `row`. A row is a copy, as JSON has it if it was given in
memory: a run that is resumed from its folder has the same.

`--objective rewards.py:brevity` runs that file, as `python rewards.py` would: only name files whose code you
trust. A run that is resumed runs it again; evaluations, exports, reports and replays do not.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import inspect
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hizoo_lite.base import Objective
from hizoo_lite.batch import Answered, Example
from hizoo_lite.checkpoints.fingerprint import of_files
from hizoo_lite.errors import UserError
from hizoo_lite.tasks.task import ROW, where

#: What a configuration calls a function that was given to `fit`, before its name.
IN_MEMORY = "in memory:"
#: Functions that can be given: what they are of.
_PAIR, _TRIPLE = "(example, scores or text)", "(prompt, text, row)"


class Function(Objective):
    """What a function gives. `source`: of its file, or of its own lines."""

    reads = ("scores", "text")

    def __init__(self, name: str, function: Callable[..., Any], source: str) -> None:
        """UserError for a function of other parameters."""
        self.name, self.function, self.source = name, function, source
        self.of_row = _is_of_row(name, function)

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

    def value(self, example: Example, found: Any, metrics: Mapping[str, Callable[..., float]]) -> float:
        """See `Objective.value`. UserError for what the function cannot do, and for no finite number."""
        called = f"--objective: {self.name}: {where(example)}"
        try:
            value = self.function(*self._arguments(example, found))
        except Exception as error:  # a program of others, again
            raise UserError(
                f"{called}: {type(error).__name__}: {error}; wanted: a function of "
                f"{_TRIPLE if self.of_row else _PAIR} to a number"
            ) from error
        try:
            number = float(value)
        except Exception as error:  # such as a tensor of several numbers
            raise UserError(_no_number(called, value)) from error
        if not math.isfinite(number):
            raise UserError(_no_number(called, value))
        return number

    def _arguments(self, example: Example, found: Any) -> tuple[Any, ...]:
        """What the function is called with. The row is a copy: what is done to it is not seen again."""
        if not self.of_row:
            return example, found
        answered: Answered = found
        return answered.prompt, answered.text, copy.deepcopy(example.fields[ROW])


def _no_number(called: str, value: Any) -> str:
    return f"{called}: it returned {value!r:.80}, allowed: a finite number"


def _is_of_row(name: str, function: Callable[..., Any]) -> bool:
    """Whether a function is of (prompt, text, row). UserError if it is of neither form."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a built-in one
        return False
    may = [_takes(signature, count) for count in (2, 3)]
    if not any(may):
        raise UserError(
            f"--objective: {name}: got a function of {signature}, allowed: one of {_TRIPLE}, or of {_PAIR}"
        )
    third = [*signature.parameters][2:3]
    return may == [False, True] or (may[1] and third == ["row"])


def _takes(signature: inspect.Signature, count: int) -> bool:
    """Whether so many arguments, without names, are what a function needs."""
    try:
        signature.bind(*[None] * count)
    except TypeError:
        return False
    return True
