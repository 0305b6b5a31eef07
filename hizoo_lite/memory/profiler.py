"""Samples memory while a run goes on, and says at the end where it went: memory.json.

Samples are taken at block boundaries by `Model.observer`, for the first steps and then for every k-th. The
cost of sampling is measured as it is spent, k is chosen from it, and a step is left out where sampling
would take more than `MOST_SHARE` of the time of the steps. Peaks are the kernel's or the allocator's own
high-water marks, so that they miss nothing between two samples; where the kernel does not let them be
reset, a thread looks every ten milliseconds instead.

memory.json has
    device, machine       where the run was
    first_step            the step that this process began with (a resumed run begins anew)
    start_bytes           what was held when the run began: libraries, model, adapters
    samples               [{seconds, step, phase, block, *_bytes}], see `timeline.Sample`
    phases                {evaluate, inference, train, save: {peak_bytes, seconds, sampling_seconds}}
    step_peaks            [[step, peak_bytes]]: of the steps since the entry before
    owners                [{owner, predicted_bytes, measured_bytes}], null where not known
    sampling_share        time spent on sampling / time of the steps; sampled_steps, every_steps (the k)
    inference_peak_bytes  of one evaluation forward of the first training batch
    training_peak_bytes   of the steps; training_over_inference is their ratio
    peak_from             "kernel", "allocator" or "samples"
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal, final

import torch

from hizoo_lite.device import is_gpu
from hizoo_lite.memory import machine
from hizoo_lite.memory.peak import PeakMeter
from hizoo_lite.memory.sampling import Reader, Watcher, make_reader
from hizoo_lite.memory.timeline import MOST_SAMPLES, Peaks, Sample, Timeline
from hizoo_lite.process import reset_peak

Phase = Literal["evaluate", "inference", "train", "save"]
#: Steps and evaluation batches whose blocks are always sampled, as long as that is cheap.
FIRST_STEPS, FIRST_BATCHES = 3, 2
#: Share of the steps' time that k aims at, and the one that is never exceeded after the first step.
AIMED_SHARE, MOST_SHARE = 0.01, 0.02


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
        # is told the peak of steps, and that of the host where it is not the device
        self.on_peak: Callable[[int, int | None], None] = lambda peak_bytes, host_peak_bytes: None
        self._read, self._clock = read or make_reader(device), clock
        self._timeline, self._peaks = Timeline(most_samples), Peaks()
        self._totals: dict[str, _Total] = {}
        self._steps = self._sampled = self._batches = 0
        self._first_step: int | None = None
        self._phase, self._step, self._sampling = "", 0, False
        self._began = clock()
        self._start = self._read()
        resettable = is_gpu(device) or reset_peak()
        self._watcher = None if resettable else Watcher(self._read)

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
            self._timeline.begin()
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
            self._sampling = False

    def reached(self, place: int | str) -> None:
        """Called by the model: a block has run and is still present, or the head has its logits."""
        if self._phase == "evaluate" and place == 0:
            self._batches += 1
            self._sampling = self._batches <= FIRST_BATCHES
            if self._sampling:
                self._timeline.begin()
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
        """End the watching thread, where there is one."""
        if self._watcher is not None:
            self._watcher.close()

    # ------------------------------------------------------------------------------- figures

    @property
    def sampling_share(self) -> float:
        """Of the time of the steps, what was spent on sampling them."""
        train = self._total("train")
        return train.sampling_seconds / train.seconds if train.seconds else 0.0

    @property
    def every_steps(self) -> int:
        """The k: every so many steps one is sampled, from what sampling and steps have cost so far."""
        return max(self._timeline.coarser, math.ceil(self.sampling_cost() / AIMED_SHARE))

    def sampling_cost(self) -> float:
        """Seconds that sampling a step takes, as a share of the seconds of a step; means so far."""
        if not self._sampled:
            return 0.0
        return self.sampling_share * self._steps / self._sampled

    def figures(self) -> dict[str, Any]:
        """The peaks that summary.json has too; empty until they are measured."""
        inference, training = self._total("inference").peak_bytes, self._total("train").peak_bytes
        found: dict[str, Any] = {"inference_peak_bytes": inference, "training_peak_bytes": training}
        if inference and training:
            found["training_over_inference"] = training / inference
        return {name: value for name, value in found.items() if value}

    def record(self, owners: list[dict[str, Any]]) -> dict[str, Any]:
        """The contents of memory.json; `owners` as `owner_list` makes them."""
        empty = {"inference_peak_bytes": None, "training_peak_bytes": None, "training_over_inference": None}
        return {
            "device": str(self.device),
            "machine": machine.describe(self.device),
            "first_step": self._first_step,
            "start_bytes": self._start,
            "samples": [sample.record() for sample in self._timeline.samples()],
            "phases": {name: asdict(total) for name, total in self._totals.items() if total.seconds},
            "step_peaks": self._peaks.entries,
            "owners": owners,
            "sampling_share": self.sampling_share,
            "sampled_steps": self._sampled,
            "every_steps": self.every_steps,
            **empty,
            **self.figures(),
            "peak_from": self._source(),
        }

    # ------------------------------------------------------------------------------- inside

    def _is_due(self) -> bool:
        if self._first_step is None:
            self._first_step = self._step
            return True
        if self.sampling_share + self.sampling_cost() / self._steps > MOST_SHARE:
            return False
        return self._steps < FIRST_STEPS or self._steps % self.every_steps == 0

    def _sample(self, place: int | str | None) -> None:
        began = self._clock()
        held = self._read()
        self._timeline.add(Sample(began - self._began, self._step, self._phase, place, held))
        self._total(self._phase).sampling_seconds += self._clock() - began

    def _lap(self) -> None:
        """The peak since the last lap goes to the phase that is ending."""
        began, total = self._clock(), self._total(self._phase)
        peak = self.meter.lap_bytes() if self._watcher is None else self._watcher.lap_bytes()
        total.peak_bytes = max(total.peak_bytes, peak)
        if self._phase == "train":
            self._peaks.add(self._step, peak)
            self.on_peak(peak, self.meter.host_lap_bytes())
        total.sampling_seconds += self._clock() - began

    def _total(self, phase: str) -> _Total:
        return self._totals.setdefault(phase, _Total())

    def _source(self) -> str:
        if self._watcher is not None:
            return "samples"
        return "allocator" if is_gpu(self.device) else "kernel"
