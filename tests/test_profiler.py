"""Memory sampled while a run goes on: bounded in cost and size, whole traversals, peaks that miss nothing."""

from __future__ import annotations

import json
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from hizoo_lite import process
from hizoo_lite.config import TrainConfig
from hizoo_lite.engine.hidden import first_trained
from hizoo_lite.memory import profiler as profiler_module
from hizoo_lite.memory.peak import PeakMeter
from hizoo_lite.memory.profiler import FIRST_STEPS, RATE, Profiler, Watcher, make_reader
from hizoo_lite.plan.ledger import category_list
from hizoo_lite.run import Run, fit
from tests.run_fixtures import short_run

CPU = torch.device("cpu")
BLOCKS = 8
#: The kernel counts pages in batches for each core: a reading is off by up to a few MB.
SLACK_BYTES = 8_000_000


class Clock:
    """Time that passes only when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def work(self, seconds: float) -> None:
        self.now += seconds


class FixedMeter(PeakMeter):
    """A peak that is always the same; a reading of it takes `seconds`."""

    def __init__(self, clock: Clock, seconds: float) -> None:
        super().__init__()
        self.clock, self.seconds = clock, seconds

    def lap_bytes(self) -> int:
        self.clock.work(self.seconds)
        return 1000


def made(clock: Clock, sample_seconds: float, most_samples: int = 3000) -> Profiler:
    def read() -> dict[str, int]:
        clock.work(sample_seconds)
        return {"anon_bytes": 700, "file_bytes": 300}

    meter = FixedMeter(clock, sample_seconds)
    return Profiler(CPU, meter, read=read, clock=clock, most_samples=most_samples)


def take(profiler: Profiler, clock: Clock, steps: int, seconds: float, first: int = 0) -> None:
    for step in range(first, first + steps):
        with profiler.phase("train", step):
            for block in range(BLOCKS):
                profiler.reached(block)
            profiler.reached("head")
            clock.work(seconds)


def test_there_are_so_many_samples_a_second() -> None:
    clock = Clock()
    profiler = made(clock, 2e-6)
    take(profiler, clock, 3000, 0.01)
    record = profiler.record([])
    assert len(record["samples"]) == pytest.approx(RATE * clock.now, rel=0.1)  # the first steps; whole steps
    assert record["every_steps"] == round(3000 / record["sampled_steps"])
    assert record["sampling_share"] == profiler.sampling_share
    spent = (BLOCKS + 4) * 2e-6 * record["sampled_steps"]  # the reading of the peak takes as long
    assert profiler.sampling_share * record["phases"]["train"]["seconds"] == pytest.approx(spent)


def test_a_step_that_takes_long_is_always_sampled() -> None:
    clock = Clock()
    profiler = made(clock, 0.0)
    take(profiler, clock, 20, 1.0)
    record = profiler.record([])
    assert (record["sampled_steps"], record["every_steps"]) == (20, 1)


def test_the_first_steps_are_sampled_at_every_block() -> None:
    clock = Clock()
    profiler = made(clock, 1e-6)
    take(profiler, clock, FIRST_STEPS, 0.1)
    samples = profiler.record([])["samples"]
    assert len(samples) == FIRST_STEPS * (BLOCKS + 3)
    places = [sample["block"] for sample in samples if sample["step"] == 1]
    assert places == [None, *range(BLOCKS), "head", "update"]
    assert samples[0] == {
        "seconds": samples[0]["seconds"],
        "step": 0,
        "phase": "train",
        "block": None,
        "anon_bytes": 700,
        "file_bytes": 300,
    }


def test_only_the_first_batches_of_an_evaluation_are_sampled() -> None:
    clock = Clock()
    profiler = made(clock, 0.0)
    with profiler.phase("evaluate", 0):
        for _ in range(50):
            for block in range(BLOCKS):
                profiler.reached(block)
    blocks = [s["block"] for s in profiler.record([])["samples"]]
    assert blocks == [None, *range(BLOCKS), *range(BLOCKS), "end"]


def test_samples_are_bounded_and_whole_steps() -> None:
    clock = Clock()
    profiler = made(clock, 0.0, most_samples=400)
    take(profiler, clock, 5000, 0.1)
    samples = profiler.record([])["samples"]
    assert 200 <= len(samples) <= 400 + BLOCKS + 3
    steps = sorted({sample["step"] for sample in samples})
    assert (steps[0], steps[-1] > 4000) == (0, True)
    assert len(samples) == len(steps) * (BLOCKS + 3)
    assert max(after - before for before, after in pairwise(steps)) < 500  # all over the run


def test_every_sampled_step_has_one_peak() -> None:
    clock = Clock()
    profiler = made(clock, 0.0)
    sizes = iter([7, 9, 3, 8, 1])
    profiler.meter.lap_bytes = lambda: next(sizes)  # type: ignore[method-assign]
    take(profiler, clock, 3, 1.0)
    with profiler.phase("save", 2):  # what came between the step and this is the step's
        pass
    record = profiler.record([])
    assert record["step_peaks"] == [(0, 7), (1, 9), (2, 8)]
    assert (record["training_peak_bytes"], record["phases"].get("save")) == (9, None)


def test_a_sample_says_what_proc_status_says() -> None:
    now = process.resident()
    if now.anon_bytes is None or now.file_bytes is None:
        pytest.skip("there is no /proc/self/status here")
    held = make_reader(CPU)()
    assert abs(held["anon_bytes"] - now.anon_bytes) < SLACK_BYTES
    assert abs(held["file_bytes"] - now.file_bytes) < SLACK_BYTES


def test_without_proc_a_sample_is_the_resident_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_STATUS", tmp_path / "missing")
    monkeypatch.setattr(profiler_module, "_STATM", tmp_path / "missing")
    held = make_reader(CPU)()
    assert held.keys() == {"total_bytes"}
    assert held["total_bytes"] > 10_000_000


def test_on_cuda_a_sample_has_the_allocator_too(monkeypatch: pytest.MonkeyPatch) -> None:
    stats = {
        f"{kind}_bytes": {"all": {"current": size}} for kind, size in (("allocated", 5), ("reserved", 9))
    }
    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", lambda device: stats)
    held = make_reader(torch.device("cuda"))()
    assert (held["allocated_bytes"], held["reserved_bytes"]) == (5, 9)
    assert held.keys() > {"allocated_bytes", "reserved_bytes"}
    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", lambda device: {})  # before its first use
    assert make_reader(torch.device("cuda"))()["allocated_bytes"] == 0


def test_laps_end_at_the_next_one_and_stay_in_the_phase() -> None:
    if not process.reset_peak():
        pytest.skip("/proc/self/clear_refs cannot be written here")
    meter = PeakMeter()
    meter.restart()
    block = torch.ones(50_000_000)  # 200 MB, touched
    high = meter.lap_bytes()
    del block
    process.trim()
    meter.lap_bytes()
    assert high - meter.lap_bytes() > 100_000_000
    assert meter.phase_bytes() >= high - SLACK_BYTES


def test_where_the_peak_cannot_be_reset_a_thread_sees_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiler_module, "reset_peak", lambda: False)
    held = {"anon_bytes": 100, "file_bytes": 0}
    profiler = Profiler(CPU, PeakMeter(), read=lambda: dict(held))
    try:
        with profiler.phase("train", 0):
            held["anon_bytes"] = 5000
            deadline = time.monotonic() + 10
            while profiler._watcher._most < 5000 and time.monotonic() < deadline:  # type: ignore[union-attr]
                time.sleep(0.005)
            held["anon_bytes"] = 200
        record = profiler.record([])
    finally:
        profiler.close()
    assert record["peak_from"] == "samples"
    assert record["training_peak_bytes"] == 5000
    assert record["step_peaks"] == [(0, 5000)]


def test_the_watching_thread_ends() -> None:
    watcher = Watcher(lambda: {"anon_bytes": 7}, seconds=0.001)
    assert watcher.lap_bytes() == 7
    watcher.close()
    assert not watcher._thread.is_alive()


def test_training_is_held_against_one_forward_of_the_same_batch() -> None:
    clock = Clock()
    profiler = made(clock, 0.0)
    calls: list[str] = []
    profiler.measure_inference(0, lambda: calls.append("forward"))
    assert calls == ["forward"]
    assert profiler.figures() == {"inference_peak_bytes": 1000}
    take(profiler, clock, 1, 0.01)
    assert profiler.figures()["training_over_inference"] == 1.0


def test_owners_are_predicted_and_measured_side_by_side() -> None:
    predicted, measured = {"weights": 10, "libraries": 20}, {"weights": 11, "slack": 1, "nothing": 0}
    assert category_list(predicted, measured) == [
        {"owner": "weights", "predicted_bytes": 10, "measured_bytes": 11},
        {"owner": "libraries", "predicted_bytes": 20, "measured_bytes": None},
        {"owner": "slack", "predicted_bytes": None, "measured_bytes": 1},
    ]


# ----------------------------------------------------------------------------------- a real run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("profiled")
    return fit(TrainConfig(**short_run(folder, eval_every=4, save_every=4)))


def memory_of(run: Run) -> dict[str, Any]:
    return json.loads((run.folder / "memory.json").read_text())


def test_a_run_writes_its_memory(run: Run) -> None:
    record = memory_of(run)
    assert set(record["phases"]) == {"evaluate", "inference", "train", "save"}
    assert all(phase["peak_bytes"] > 10_000_000 for phase in record["phases"].values())
    documented = str(profiler_module.__doc__)
    assert all(key in documented for key in record)
    assert record["first_step"] == 0
    assert record["device"] == "cpu"
    assert record["machine"]["memory_bytes"] > 0
    last = record["step_peaks"][-1]
    assert last[0] == 5
    count = len(run.setup.model.blocks)
    first = [s["block"] for s in record["samples"] if s["phase"] == "train" and s["step"] == 0]
    assert first == [None, *range(first_trained(run.setup.model), count), "head", "update"]
    inference = [s["block"] for s in record["samples"] if s["phase"] == "inference"]
    assert inference == [None, *range(count), "head", "end"]


def test_the_summary_has_the_peaks_of_memory_json(run: Run) -> None:
    record, summary = memory_of(run), run.summary
    for key in ("inference_peak_bytes", "training_peak_bytes", "training_over_inference"):
        assert summary[key] == record[key]
    ratio = record["training_peak_bytes"] / record["inference_peak_bytes"]
    assert record["training_over_inference"] == ratio
    assert summary["measured_peak_bytes"] >= record["training_peak_bytes"]


def test_the_model_is_not_observed_after_its_run(run: Run) -> None:
    assert run.setup.model.observer is None


def test_the_profiler_changes_no_loss(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Profiler, "measure_inference", lambda *_: None)
    monkeypatch.setattr(Profiler, "reached", lambda *_: None)
    bare = fit(TrainConfig(**short_run(tmp_path, eval_every=4, save_every=4)))
    assert bare.summary["loss_after"] == run.summary["loss_after"]


def test_a_resumed_run_samples_from_where_it_begins(tmp_path: Path) -> None:
    fit(TrainConfig(**short_run(tmp_path, steps=2)))
    resumed = fit(TrainConfig(**short_run(tmp_path, steps=4, resume=True)))
    assert memory_of(resumed)["first_step"] == 2
    assert resumed.summary["training_over_inference"] is not None
