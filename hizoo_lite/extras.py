"""Libraries that come with an extra of the package: imported where they are needed, or named in one line."""

from __future__ import annotations

import importlib
from typing import Any

from hizoo_lite.errors import UserError


def need(module: str, extra: str, what: str) -> Any:
    """The module. UserError if it is not installed, with the extra that brings it.

    what: flag or command that asks for it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:  # one that it needs itself
            raise
        raise UserError(
            f"{what}: {error.name} is not installed; run: pip install 'hizoo-lite[{extra}]'"
        ) from error
