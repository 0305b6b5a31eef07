"""Samples memory while a run goes on, and says at the end where it went: memory.json.

Samples are taken at block boundaries by `Model.observer`: of the first steps, then of whole steps that are
so far apart that there are 20 samples a second, and half as many whenever the list has become too long.
Peaks are the kernel's or the allocator's own high-water marks, so that they miss nothing between two samples;
if the kernel does not let them be reset, a thread looks every ten milliseconds instead.

memory.json has
    device, machine       where the run was
    first_step            the step that this process began with (a resumed run begins anew)
    start_bytes           what was held when the run began: libraries, model, adapters
    samples               [{seconds, step, phase, block, *_bytes}]; block: the one that has just run, "head",
                          "update" (of a step), "end" (of another phase), null (before the first)
    phases                {evaluate, inference, train, save: {peak_bytes, seconds, sampling_seconds}}
    step_peaks            [[step, peak_bytes]]: of the steps since the entry before
    owners                [{owner, predicted_bytes, measured_bytes}], null if not known
    sampling_share        time spent on sampling / time of the steps; sampled_steps, every_steps (on average)
    inference_peak_bytes  of one evaluation forward of the first training batch
    training_peak_bytes   of the steps; training_over_inference is their ratio
    peak_from             "kernel", "allocator" or "samples"
"""

from __future__ import annotations

import mmap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, final

import torch

from hizoo_lite.device import gpu_of, is_gpu
from hizoo_lite.memory import machine
from hizoo_lite.memory.peak import PeakMeter
from hizoo_lite.process import reset_peak, resident

Phase = Literal["evaluate", "inference", "train", "save"]
Reader = Callable[[], dict[str, int]]
#: Steps of a run and batches of an evaluation that are always sampled.
FIRST_STEPS, FIRST_BATCHES = 3, 2
#: Samples a second of the steps, on average. One takes 15 microseconds, on a GPU 100: below 0.2 %.
RATE = 20
MOST_SAMPLES = 3000  # of some 100 bytes of JSON each
_POLL_SECONDS = 0.01
_STATM = Path("/proc/self/statm")


def make_reader(device: torch.device) -> Reader:
    """Reads what is held now: anon_bytes and file_bytes (or total_bytes), on a GPU allocated and reserved."""

    def read() -> dict[str, int]:
        held = _statm_bytes() if _STATM.is_file() else {"total_bytes": resident().total_bytes}
        if not is_gpu(device):
            return held
        allocated_bytes, reserved_bytes = gpu_of(device).held_bytes(device)
        return {"allocated_bytes": allocated_bytes, "reserved_bytes": reserved_bytes, **held}

    return read


def _statm_bytes() -> dict[str, int]:
    """A fifth of the time that /proc/self/status takes; file_bytes is RssFile and RssShmem together."""
    total, shared = (int(pages) * mmap.PAGESIZE for pages in _STATM.read_bytes().split()[1:3])
    return {"anon_bytes": total - shared, "file_bytes": shared}


@final
class Watcher:
    """A thread that looks every ten milliseconds and remembers the most. A peak in between is missed."""

    def __init__(self, read: Reader, seconds: float = _POLL_SECONDS) -> None:
        self._read, self._seconds = read, seconds
        self._most = 0
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory", daemon=True)
        self._thread.start()

    def lap_bytes(self) -> int:
        """The most since the last lap; begins the next one."""
        now = sum(self._read().values())
        with self._lock:
            most, self._most = max(self._most, now), now
        return most

    def close(self) -> None:
        """End the thread."""
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(self._seconds):
            now = sum(self._read().values())
            with self._lock:
                self._most = max(self._most, now)


@dataclass
class _Total:
    """What a phase has come to."""

    peak_bytes: int = 0
    seconds: float = 0.0
    sampling_seconds: float = 0.0


@final
class Profiler:
    """Made by a run, told its phases by the loop and its blocks by the model."""

    def __init__(
        self,
        device: torch.device,
        meter: PeakMeter,
        *,
        read: Reader | None = None,
        clock: Callable[[], float] = time.perf_counter,
        most_samples: int = MOST_SAMPLES,
    ) -> None:
        self.device, self.meter = device, meter
        # is told the peak of steps, and that of the host if it is not the device
        self.on_peak: Callable[[int, int | None], None] = lambda peak_bytes, host_peak_bytes: None
        self._read, self._clock = read or make_reader(device), clock
        self._traversals: list[list[dict[str, Any]]] = []  # samples by step, or by batch of an evaluation
        self._most_samples, self._stride = most_samples, 1
        self._peaks: list[tuple[int, int]] = []  # (last step, bytes)
        self._totals: dict[str, _Total] = {}
        self._steps = self._sampled = self._batches = 0
        self._first_step: int | None = None
        self._phase, self._step, self._sampling = "", 0, False
        self._began, self._due = clock(), 0.0
        self._start = self._read()
        resettable = is_gpu(device) or reset_peak()
        self._watcher = None if resettable else Watcher(self._read)  # no GPU: the values are the host's

    # --------------------------------------------------------------------- what the run tells

    @contextmanager
    def phase(self, name: Phase, step: int) -> Iterator[None]:
        """A step, an evaluation or a checkpoint, from its start to its end."""
        began = self._clock()
        if self._phase and name != self._phase:
            self._lap()
        self._phase, self._step, self._batches = name, step, 0
        self._sampling = name != "save" and (name != "train" or self._is_due())
        train_step = name == "train"
        if self._sampling or not train_step:
            self._begin()
            self._sample(None)
        try:
            yield
        finally:
            if self._sampling or not train_step:
                self._sample("update" if train_step else "end")
                self._lap()
            self._total(name).seconds += self._clock() - began
            if train_step:
                self._steps, self._sampled = self._steps + 1, self._sampled + self._sampling
            if train_step and self._sampling:
                self._due = began + self._stride * len(self._traversals[-1]) / RATE
            self._sampling = False

    def reached(self, place: int | str) -> None:
        """Called by the model: a block has run and is still present, or the head has its logits."""
        if self._phase == "evaluate" and place == 0:
            self._batches += 1
            self._sampling = self._batches <= FIRST_BATCHES
            if self._sampling:
                self._begin()
        if self._sampling:
            self._sample(place)

    def measure_inference(self, step: int, forward: Callable[[], object]) -> None:
        """The peak of `forward`, an evaluation of a training batch; freed memory is given back around it.

        That is what training is held against: the same batch, the same engine, no branches.
        """
        self.meter.restart()
        with self.phase("inference", step):
            forward()
        self._phase = ""  # what comes before the next phase belongs to none
        self.meter.restart()

    def close(self) -> None:
        """End the watching thread, if there is one."""
        if self._watcher is not None:
            self._watcher.close()

    # ------------------------------------------------------------------------------- figures

    @property
    def sampling_share(self) -> float:
        """Of the time of the steps, what was spent on sampling them."""
        train = self._total("train")
        return train.sampling_seconds / train.seconds if train.seconds else 0.0

    def figures(self) -> dict[str, Any]:
        """The peaks that summary.json has too; empty until they are measured."""
        inference, training = self._total("inference").peak_bytes, self._total("train").peak_bytes
        found: dict[str, Any] = {"inference_peak_bytes": inference, "training_peak_bytes": training}
        if inference and training:
            found["training_over_inference"] = training / inference
        return {name: value for name, value in found.items() if value}

    def record(self, categories: list[dict[str, Any]]) -> dict[str, Any]:
        """The contents of memory.json; `categories` as `category_list` makes them."""
        empty = {"inference_peak_bytes": None, "training_peak_bytes": None, "training_over_inference": None}
        return {
            "device": str(self.device),
            "machine": machine.describe(self.device),
            "first_step": self._first_step,
            "start_bytes": self._start,
            "samples": [sample for traversal in self._traversals for sample in traversal],
            "phases": {name: asdict(total) for name, total in self._totals.items() if total.seconds},
            "step_peaks": self._peaks,
            "owners": categories,
            "sampling_share": self.sampling_share,
            "sampled_steps": self._sampled,
            "every_steps": max(1, round(self._steps / max(1, self._sampled))),
            **empty,
            **self.figures(),
            "peak_from": self._source(),
        }

    # ------------------------------------------------------------------------------- inside

    def _is_due(self) -> bool:
        if self._first_step is None:
            self._first_step = self._step
        return self._steps < FIRST_STEPS or self._clock() >= self._due

    def _begin(self) -> None:
        """A new traversal; every second one of the earlier goes if there are too many samples."""
        if sum(map(len, self._traversals)) > self._most_samples:
            del self._traversals[1::2]
            self._stride *= 2
        self._traversals.append([])

    def _sample(self, place: int | str | None) -> None:
        began = self._clock()
        when = {"seconds": round(began - self._began, 6), "step": self._step, "phase": self._phase}
        self._traversals[-1].append({**when, "block": place, **self._read()})
        self._total(self._phase).sampling_seconds += self._clock() - began

    def _lap(self) -> None:
        """The peak since the last lap goes to the phase that is ending."""
        began, total = self._clock(), self._total(self._phase)
        peak = self.meter.lap_bytes() if self._watcher is None else self._watcher.lap_bytes()
        total.peak_bytes = max(total.peak_bytes, peak)
        if self._phase == "train":
            again = bool(self._peaks) and self._peaks[-1][0] == self._step  # after it, before the next phase
            self._peaks.append((self._step, max(peak, self._peaks.pop()[1]) if again else peak))
            self.on_peak(peak, self.meter.host_lap_bytes())
        total.sampling_seconds += self._clock() - began

    def _total(self, phase: str) -> _Total:
        return self._totals.setdefault(phase, _Total())

    def _source(self) -> str:
        if self._watcher is not None:
            return "samples"
        return "allocator" if is_gpu(self.device) else "kernel"
