"""One onnxruntime session on the CPU, and in words what is wrong where it cannot be opened or run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hizoo_lite.errors import UserError

#: What onnxruntime says, and what that means to a user.
_MEANINGS = {
    "INVALID_PROTOBUF": "it is truncated, or no ONNX graph",
    "Protobuf parsing failed": "it is truncated, or no ONNX graph",
    "xternal data": "its external data (the .data file beside it) is missing or truncated",
    "xternal initializer": "its external data (the .data file beside it) is missing or truncated",
    "NOT_IMPLEMENTED": "this onnxruntime lacks one of its operators; use a newer one",
    "No Op registered": "this onnxruntime lacks one of its operators; use a newer one",
    "is not a registered function/op": "this onnxruntime lacks one of its operators; use a newer one",
    "No opset import": "it is truncated, or no ONNX graph",
    "Unsupported model IR version": "it is of a newer format than this onnxruntime reads; use a newer one",
    "ONNX Runtime only *guarantees* support": "it is of a newer format than this onnxruntime reads",
}


class Session:
    """A graph that is ready to run; `inputs` are its names in order, `outputs` likewise."""

    def __init__(self, path: Path, threads: int | None = None) -> None:
        """UserError naming the file, and what is wrong, where it cannot be opened."""
        ort = runtime()
        if not path.is_file():
            raise UserError(f"{path}: no such file; allowed: a folder that hizoo-lite export has written")
        options = ort.SessionOptions()
        options.log_severity_level = 4  # what it would print, the message below says
        options.add_session_config_entry("session.disable_quant_qdq", "1")  # its fusion is lossy
        if threads is not None:
            options.intra_op_num_threads = threads
        self.path = path
        try:
            self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own classes have no public common base
            raise _explained(path, error) from error
        self.inputs = [item.name for item in self._session.get_inputs()]
        self.outputs = [item.name for item in self._session.get_outputs()]
        self._shapes = {item.name: item.shape for item in self._session.get_inputs()}
        self._types = {item.name: item.type for item in self._session.get_inputs()}

    def shape(self, name: str) -> list[Any]:
        """Of an input: numbers, and names where any size will do."""
        return list(self._shapes[name])

    def dtype(self, name: str) -> np.dtype[Any]:
        """Of an input."""
        names = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}
        return np.dtype(names[self._types[name]])

    def run(self, outputs: Sequence[str], feeds: Mapping[str, np.ndarray], adapter: Any = None) -> list[Any]:
        """Some outputs by name. `adapter`: a `LoraAdapter` that is active in this run.

        UserError where onnxruntime refuses, as it does an adapter of another model.
        """
        options = runtime().RunOptions()
        if adapter is not None:
            options.add_active_adapter(adapter)
        try:
            return self._session.run(list(outputs), dict(feeds), options)
        except Exception as error:  # onnxruntime's own classes have no public common base
            raise UserError(f"{self.path}: a run failed ({error!s:.300})") from error

    def nbytes(self) -> int:
        """Of the graph and the data beside it, on disk."""
        beside = self.path.parent.glob(f"{self.path.name}*")
        return sum(path.stat().st_size for path in beside)


def runtime() -> Any:
    """The onnxruntime module. UserError where it is not installed."""
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError("onnxruntime is not installed; run: pip install onnxruntime") from error
    return onnxruntime


def _explained(path: Path, error: Exception) -> UserError:
    text = str(error)
    meaning = next((words for sign, words in _MEANINGS.items() if sign in text), "it cannot be opened")
    return UserError(f"{path}: {meaning} (onnxruntime {runtime().__version__}: {text:.300})")
