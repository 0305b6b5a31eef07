"""What a run on a device held at most, phase by phase: its memory.json.

    start_bytes           what was held before the graph was opened: the interpreter and numpy
    session_bytes         what opening it added, onnxruntime itself included
    phases                {evaluate, inference, train, save: {peak_bytes, seconds}}
    inference_peak_bytes  of one evaluation forward of the first training batch
    training_peak_bytes   of the steps; training_over_inference is their ratio
    resident              anon_bytes, file_bytes, total_bytes and peak_bytes (VmHWM) as they are now

Peaks are the kernel's high-water mark of anonymous memory (see `memory/peak.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from hizoo_lite.memory.peak import PeakMeter
from hizoo_lite.process import resident

Phase = Literal["evaluate", "inference", "train", "save"]


class Memory:
    """Told by the loop what is going on."""

    def __init__(self, meter: PeakMeter, start_bytes: int) -> None:
        """After the graph was opened; `start_bytes` are what was held before."""
        self.meter = meter
        self._start_bytes, self._session_bytes = start_bytes, resident().held_bytes - start_bytes
        self._phases: dict[str, dict[str, float]] = {}

    @contextmanager
    def phase(self, name: Phase, step: int) -> Iterator[None]:
        """A step, an evaluation or a checkpoint, from its start to its end."""
        began = time.perf_counter()
        self.meter.lap_bytes()
        try:
            yield
        finally:
            total = self._phases.setdefault(name, {"peak_bytes": 0, "seconds": 0.0})
            total["peak_bytes"] = max(total["peak_bytes"], self.meter.lap_bytes())
            total["seconds"] += time.perf_counter() - began

    def measure_inference(self, step: int, forward: Callable[[], object]) -> None:
        """The peak of `forward`, an evaluation of a training batch; freed memory is given back around it."""
        self.meter.restart()
        with self.phase("inference", step):
            forward()
        self.meter.restart()

    def figures(self) -> dict[str, Any]:
        """The peaks that summary.json has too."""
        peaks = {name: self._phases.get(name, {}).get("peak_bytes") for name in ("inference", "train")}
        found: dict[str, Any] = {
            "inference_peak_bytes": peaks["inference"],
            "training_peak_bytes": peaks["train"],
        }
        if peaks["inference"] and peaks["train"]:
            found["training_over_inference"] = peaks["train"] / peaks["inference"]
        return found

    def record(self) -> dict[str, Any]:
        """The contents of memory.json."""
        return {
            "device": "cpu",
            "start_bytes": {"anon_bytes": self._start_bytes},
            "session_bytes": self._session_bytes,
            "phases": self._phases,
            **self.figures(),
            "resident": resident()._asdict(),
            "peak_from": "kernel",
        }
