"""Whole runs on the simulated GPU beside runs on a CPU, as figures."""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from hizoo_lite import noise
from hizoo_lite.config import TrainConfig
from hizoo_lite.device import CONTEXT_BYTES
from hizoo_lite.errors import BudgetError
from hizoo_lite.export.quantize import Quantization
from hizoo_lite.model.kinds import model_path
from hizoo_lite.run import fit
from tests.run_fixtures import short_run
from tests.simulated.gpu import installed
from tests.test_stream import StopAfter as StopAfter

MIB = 1 << 20
#: What is trained and where the blocks are, in runs that are compared with those of a CPU.
RUNS = [
    *(("lora", "resident"), ("lora", "disk"), ("dense", "host"), ("dense", "disk"), ("scales", "host")),
    ("sparse", "host"),
]


def packed(folder: Path) -> Path:
    """The demo's model in nf4, whose weights can be trained."""
    Quantization(model_path("embedded"), folder, kind="causal", bits="nf4", double_quant=False).run()
    return folder


def settings(folder: Path, name: str, **changes: Any) -> TrainConfig:
    """A run of six steps in float32, whose batches go through in the same chunks on every device.

    Of weights only query and value are trained: their noise takes the simulated GPU a while.
    """
    alike = {"out": str(folder / name), "compute_dtype": "float32", "branch_chunk": 4, "targets": "attention"}
    if changes.get("space", "lora") == "lora":
        del alike["targets"]
    return TrainConfig(**{**short_run(folder, **alike), "device": "simgpu", **changes})


def losses(folder: Path) -> list[list[float]]:
    """Those of every branch of every step of a run."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["losses"] for line in lines if line["kind"] == "step"]


def trained(folder: Path) -> dict[str, bytes]:
    """What a run has trained, and its journal."""
    files = [*folder.glob("adapter/*.safetensors"), folder / "journal.bin"]
    return {file.name: file.read_bytes() for file in files if file.is_file()}


@contextmanager
def drawn_alike() -> Iterator[None]:
    """While this is open a CPU draws the noise of weights as a GPU does."""
    real, noise.draws_philox = noise.draws_philox, lambda device: True
    try:
        yield
    finally:
        noise.draws_philox = real


def difference(model: Path, folder: Path, space: str, residency: str) -> float:
    """The largest of a loss of any branch and step, between the simulated GPU and a CPU."""
    with installed(), drawn_alike():
        for name, device, where in (("there", "simgpu", residency), ("here", "cpu", "resident")):
            fit(settings(folder, name, model=str(model), space=space, device=device, residency=where))
    pairs = zip(losses(folder / "there"), losses(folder / "here"), strict=True)
    return max(abs(a - b) for there, here in pairs for a, b in zip(there, here, strict=True))


def resumes(model: Path, folder: Path, space: str = "dense") -> bool:
    """Whether a run that was interrupted and resumed ends in the bytes of one that was not."""
    chosen = {"model": str(model), "space": space, "residency": "host", "steps": 2, "test_examples": 2}
    with installed():
        for name in ("parts", "whole"):
            config = settings(folder, name, **chosen)
            if name == "whole":
                fit(config)
            else:
                assert fit(config, callbacks=[StopAfter(1)]).interrupted
                fit(replace(config, resume=True))
    return trained(folder / "parts") == trained(folder / "whole")


def least_budget(config: TrainConfig) -> float:
    """MiB of the least budget, as the refusal of a smaller one names it; 0 where that was not refused."""
    try:
        fit(replace(config, device_budget=f"{CONTEXT_BYTES + MIB}B"))
    except BudgetError as error:
        return float(re.findall(r"peak +([\d.]+) MiB", str(error))[-1]) + 0.01  # it is rounded
    return 0.0


def keeps_to_cap(model: Path, folder: Path) -> bool:
    """Whether a run ends under the least budget that the planner allows, without more than the cap."""
    with installed() as memory:
        config = settings(folder, "least", model=str(model), branch_chunk="auto")
        least = least_budget(config)
        gc.collect()
        memory.reset()
        if least == 0.0:
            return False
        fit(replace(config, device_budget=f"{least}MiB"))
        return memory.peak_bytes <= least * MIB - CONTEXT_BYTES
