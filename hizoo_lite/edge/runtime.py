"""onnxruntime, where it is installed."""

from __future__ import annotations

from typing import Any

from hizoo_lite.errors import UserError


def runtime() -> Any:
    """The onnxruntime module. UserError where it is not installed."""
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError("onnxruntime is not installed; run: pip install onnxruntime") from error
    return onnxruntime
