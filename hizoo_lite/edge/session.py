"""onnxruntime on the CPU: a graph, and an export whose adapters are swapped from run to run. Needs no torch.

If a file cannot be opened or run, the error says in words what is wrong with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, final

import numpy as np

from hizoo_lite.edge.adapter import convert
from hizoo_lite.edge.folder import ADAPTER_SUFFIX, Export
from hizoo_lite.edge.onnx_adapter import load_adapter, runtime, save_adapter
from hizoo_lite.errors import UserError
from hizoo_lite.tasks import Task

_PAST, _PRESENT = "past_key_values.", "present."
_SILENT = 4  # what onnxruntime would print, our message says; warnings speak of the adapter inputs' defaults

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


@final
class Graph:
    """A graph that is ready to run; `inputs` are the names that every run gives, in order.

    threads: of a product; None is onnxruntime's choice. low_memory: use weights as they are in the mapped
    file, in place of copies in the form that is fastest.
    """

    def __init__(self, path: Path, threads: int | None = None, *, low_memory: bool = False) -> None:
        """UserError naming the file, and what is wrong, if it cannot be opened."""
        ort = runtime()
        if not path.is_file():
            raise UserError(f"{path}: no such file; allowed: a folder that hizoo-lite export has written")
        options = ort.SessionOptions()
        options.log_severity_level = _SILENT
        options.add_session_config_entry("session.disable_quant_qdq", "1")  # its fusion is lossy
        if threads is not None:
            options.intra_op_num_threads = threads
        if low_memory:
            options.add_session_config_entry("session.disable_prepacking", "1")
            options.enable_cpu_mem_arena = False
        self.path = path
        try:
            self._session = ort.InferenceSession(
                str(path),
                options,
                providers=["CPUExecutionProvider"],
                disabled_optimizers=["ConstantFolding"] if low_memory else None,
            )
        except Exception as error:  # onnxruntime's own classes have no public common base
            raise _explained(path, error) from error
        self.inputs = [item.name for item in self._session.get_inputs()]
        self.outputs = [item.name for item in self._session.get_outputs()]
        both = [*self._session.get_inputs(), *self._session.get_outputs()]
        self._shapes = {item.name: item.shape for item in both}
        self._types = {item.name: item.type for item in self._session.get_inputs()}

    def shape(self, name: str) -> list[Any]:
        """Of an input or output: numbers, and names if any size will do."""
        return list(self._shapes[name])

    def check_classes(self, task: Task, output: str) -> None:
        """UserError unless `output`, (..., classes) of a classifier, is of the task's classes."""
        classes = self.shape(output)[-1]
        if classes != task.num_labels:
            raise UserError(
                f"--task: {task.name} has {task.num_labels} classes (num_labels), the head in {self.path} "
                f"has {classes} outputs; allowed: a task with as many classes"
            )

    def dtype(self, name: str) -> np.dtype[Any]:
        names = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}
        return np.dtype(names[self._types[name]])

    def run(
        self, outputs: Sequence[str] | None, feeds: Mapping[str, np.ndarray], adapter: Any = None
    ) -> list[Any]:
        """Some outputs by name, or all of them. `adapter`: a `LoraAdapter` that is active in this run.

        UserError if onnxruntime refuses, as it does an adapter of another model.
        """
        options = runtime().RunOptions()
        if adapter is not None:
            options.add_active_adapter(adapter)
        try:
            return self._session.run(outputs if outputs is None else list(outputs), dict(feeds), options)
        except Exception as error:  # onnxruntime's own classes have no public common base
            raise UserError(f"{self.path}: a run failed ({error!s:.300})") from error

    def nbytes(self) -> int:
        """Of the graph and the data beside it, on disk."""
        beside = self.path.parent.glob(f"{self.path.name}*")
        return sum(path.stat().st_size for path in beside)


@final
class Session:
    """Runs an export; adapters are loaded when they are first used. threads, low_memory: as for `Graph`."""

    def __init__(self, export: Export, *, threads: int | None = None, low_memory: bool = False) -> None:
        """UserError if onnxruntime cannot load the graph."""
        self.export = export
        self.graph = Graph(export.graph, threads, low_memory=low_memory)
        self._adapters: dict[str, Any] = {}

    def run(
        self,
        feeds: Mapping[str, np.ndarray],
        adapter: str | None = None,
        outputs: Sequence[str] | None = None,
    ) -> list[np.ndarray]:
        """The outputs (all of them by default) of one run, with an adapter or the bare base.

        feeds: every input in `graph.inputs`. adapter: as for `Export.find_adapter`. Raises `UserError` for an
        unknown adapter, and for one of another model.
        """
        return self.graph.run(outputs, feeds, None if adapter is None else self.adapter(adapter))

    def adapter(self, adapter: str) -> Any:
        """The `LoraAdapter` of what `Export.find_adapter` finds. UserError if it is damaged or unfit."""
        if adapter not in self._adapters:
            path = self.export.find_adapter(adapter)
            found = self._converted(path) if path.is_dir() else load_adapter(self.export, path)
            self._adapters[adapter] = found
        return self._adapters[adapter]

    def _converted(self, folder: Path) -> Any:
        """That of a PEFT folder, by way of a file: onnxruntime takes nothing else."""
        with TemporaryDirectory() as place:
            path = Path(place) / f"{folder.name}{ADAPTER_SUFFIX}"
            save_adapter(path, convert(self.export, folder).values)
            return load_adapter(self.export, path)

    def empty_cache(self, rows: int) -> dict[str, np.ndarray]:
        """The cache inputs of a run that begins `rows` texts; none for models without a cache."""
        made = {}
        for name in self.graph.inputs:
            if name.startswith(_PAST):
                _, heads, _, features = self.graph.shape(name)
                made[name] = np.zeros((rows, heads, 0, features), dtype=self.graph.dtype(name))
        return made

    def grown_cache(self, outputs: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """The cache inputs of the next run, from all outputs of this one."""
        named = zip(self.graph.outputs, outputs, strict=True)
        return {name.replace(_PRESENT, _PAST, 1): value for name, value in named if name.startswith(_PRESENT)}


def _explained(path: Path, error: Exception) -> UserError:
    text = str(error)
    meaning = next((words for sign, words in _MEANINGS.items() if sign in text), "it cannot be opened")
    return UserError(f"{path}: {meaning} (onnxruntime {runtime().__version__}: {text:.300})")
