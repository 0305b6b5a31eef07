"""hatchling's hook: the wheel has the files that `files.included` finds in the sources two folders above."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

sys.path.insert(0, str(Path(__file__).resolve().parent))
from files import included


class Files(BuildHookInterface):
    """The one hook of this file."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Before the wheel is written."""
        build_data["force_include"].update(included(Path(self.root).parents[1]))
