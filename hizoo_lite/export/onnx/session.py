"""An exported model in onnxruntime: one session, its adapters swapped from run to run. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import final

import numpy as np
import onnxruntime

from hizoo_lite.errors import StorageError
from hizoo_lite.export.onnx.folder import Export

_ERRORS_ONLY = 3  # warnings speak of the adapter inputs' defaults, one line each


@final
class Session:
    """Runs an export on the CPU; adapters are loaded when they are first used.

    threads: of a product; None is onnxruntime's choice. sparing: use weights as they are in the mapped file,
    in place of copies in the form that is fastest.
    """

    def __init__(self, export: Export, *, threads: int | None = None, sparing: bool = False) -> None:
        """Raises `StorageError` where onnxruntime cannot load the graph."""
        self.export = export
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _ERRORS_ONLY
        if threads is not None:
            options.intra_op_num_threads = threads
        if sparing:
            options.add_session_config_entry("session.disable_prepacking", "1")
            options.enable_cpu_mem_arena = False
        try:
            self.session = onnxruntime.InferenceSession(
                str(export.graph),
                options,
                providers=["CPUExecutionProvider"],
                disabled_optimizers=["ConstantFolding"] if sparing else None,
            )
        except (
            Exception
        ) as error:  # onnxruntime has a class of its own for every code, RuntimeError for others
            raise StorageError(f"{export.graph}: onnxruntime cannot load it: {error}") from error
        self._adapters: dict[str, onnxruntime.LoraAdapter] = {}

    def run(
        self,
        feeds: Mapping[str, np.ndarray],
        adapter: str | None = None,
        outputs: Sequence[str] | None = None,
    ) -> list[np.ndarray]:
        """The outputs (all of them by default) of one run, with an adapter of the export or the bare base.

        feeds: every input in `export.inputs`. Raises `UserError` for an unknown adapter.
        """
        options = onnxruntime.RunOptions()
        if adapter is not None:
            options.add_active_adapter(self._adapter(adapter))
        return self.session.run(outputs, dict(feeds), options)

    def empty_cache(self, rows: int) -> dict[str, np.ndarray]:
        """The cache inputs of a run that begins `rows` texts; none for models without a cache."""
        return {
            f"past_key_values.{layer}.{part}": np.zeros((rows, heads, 0, features), np.float32)
            for layer, (heads, features) in enumerate(self.export.cache)
            for part in ("key", "value")
        }

    def grown_cache(self, outputs: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """The cache inputs of the next run, from all outputs of this one."""
        named = zip(self.export.outputs[1:], outputs[1:], strict=True)
        return {name.replace("present.", "past_key_values.", 1): value for name, value in named}

    def _adapter(self, name: str) -> onnxruntime.LoraAdapter:
        if name not in self._adapters:
            loaded = onnxruntime.LoraAdapter()
            loaded.Load(str(self.export.adapter_file(name)))
            self._adapters[name] = loaded
        return self._adapters[name]
