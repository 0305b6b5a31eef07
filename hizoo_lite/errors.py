"""What a user is told. Imports nothing, so that a wrong flag is reported without waiting for torch."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input. The message names file, field or flag, what was got and what is allowed; exit code 2."""


class BudgetError(UserError):
    """The memory budget cannot be met; the message says what is needed. Exit code 3."""


class TooManyBadSteps(RuntimeError):
    """Too many losses were not finite: the run was stopped, or has no result. Everything is saved."""


class StorageError(RuntimeError):
    """A file could not be read or written while the run used it. The message names it; exit code 1."""


class ExportError(RuntimeError):
    """What was exported does not compute what the model computes; it was removed. Exit code 1."""
