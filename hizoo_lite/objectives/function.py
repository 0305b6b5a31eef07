"""A user's own objective: a Python function of (example, scores or text), the higher the better.

    def brevity(example, text):                 # example: fields, answers, gold, references
        return -len(text.split())

`--objective rewards.py:brevity` runs that file, as `python rewards.py` would: only name files whose code you
trust. A run that is resumed runs it again; evaluations, exports, reports and replays do not.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hizoo_lite.base import Objective
from hizoo_lite.batch import Example
from hizoo_lite.checkpoints.fingerprint import of_files
from hizoo_lite.errors import UserError
from hizoo_lite.tasks.task import where

#: What a configuration calls a function that was given to `fit`, before its name.
IN_MEMORY = "in memory:"


class Function(Objective):
    """What a function gives. `source`: of its file, or of its own lines."""

    reads = ("scores", "text")

    def __init__(self, name: str, function: Callable[..., Any], source: str) -> None:
        self.name, self.function, self.source = name, function, source

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
        """See `Objective.value`. UserError for what the function cannot do, and for no number."""
        try:
            return float(self.function(example, found))
        except Exception as error:  # a program of others, again
            raise UserError(
                f"--objective: {self.name}: {where(example)}: {type(error).__name__}: {error}; "
                "wanted: a function of (example, scores or text) to a number"
            ) from error
