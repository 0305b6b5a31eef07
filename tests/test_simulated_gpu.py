"""Whole runs on a GPU that is none (`simulated/gpu.py`): they end as on a CPU, and keep to their budgets."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from hizoo_lite.base import Branches
from hizoo_lite.cli import app
from hizoo_lite.device import CONTEXT_BYTES
from hizoo_lite.errors import BudgetError, StorageError, UserError
from hizoo_lite.memory.budget import Budget, enforced
from hizoo_lite.model.load import load
from hizoo_lite.model.model import Model
from hizoo_lite.quant.quantize import Quantization
from hizoo_lite.stream.block import each_block
from hizoo_lite.stream.choose import Budgets
from hizoo_lite.stream.layout import layouts
from hizoo_lite.stream.residency import Streamed, _settle
from hizoo_lite.stream.traversal import Traversal
from hizoo_lite.train import identity, replay
from hizoo_lite.train.fit import Run, fit
from hizoo_lite.train.step import StepRecord
from tests.architectures import TINY_CONFIGS, save_tiny
from tests.batches import tiny_task_batch
from tests.simulated import figures, shapes
from tests.simulated.figures import StopAfter, losses, settings, trained
from tests.simulated.gpu import SYNCS, Memory, SimulatedGpu, installed
from tests.test_stream import step_losses

MIB = 1 << 20
#: A block of Llama-2-7B, LoRA on q and v, three branches; see `shapes.Counted`.
MOST_LAUNCHES, MOST_BYTES = 170, 6.7e6
DEVICE = torch.device("simgpu", 0)


@pytest.fixture(autouse=True)
def memory() -> Iterator[Memory]:
    with installed() as found:
        gc.collect()
        found.reset()
        yield found


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's model in nf4."""
    return figures.packed(tmp_path_factory.mktemp("packed") / "nf4")


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of eight blocks in nf4."""
    folder = tmp_path_factory.mktemp("deep")
    save_tiny("llama", folder / "source", num_hidden_layers=8)
    Quantization(folder / "source", folder / "nf4", kind="causal", bits="nf4").run()
    return folder / "nf4"


def run(folder: Path, name: str, **changes: Any) -> Run:
    """See `figures.settings`."""
    found = fit(settings(folder, name, **changes))
    found.setup.space.detach()
    return found


def opened(folder: Path, **options: Any) -> tuple[Model, Streamed]:
    """A streamed model in float32, with nothing on the device yet but what stays there whatever happens."""
    model = load(folder, device="simgpu", compute_dtype="float32", **options)
    assert isinstance(model.residency, Streamed)
    _settle(layouts(model), DEVICE)
    gc.collect()
    return model, model.residency


# ------------------------------------------------------------------------------------- as on a CPU


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        *(("llama", "nf4"), ("llama", "int8"), ("llama", "none"), ("gemma2", "nf4"), ("opt", "fp4")),
        *(("gpt2", "int8"), ("bert", "nf4")),
    ],
)
def test_losses_are_those_of_a_cpu(name: str, bits: str, tmp_path: Path) -> None:
    save_tiny(name, tmp_path)
    kind = TINY_CONFIGS[name].kind
    found = []
    for device in ("cpu", "simgpu"):
        model = load(tmp_path, kind=kind, bits=bits, compute_dtype="float32", device=device)  # type: ignore[arg-type]
        found.append(step_losses(model, name))
    assert str(model.device) == "simgpu:0"
    assert torch.equal(*found)


@pytest.mark.parametrize(("space", "residency"), figures.RUNS)
def test_a_run_is_that_of_a_cpu(space: str, residency: str, packed: Path, tmp_path: Path) -> None:
    there = run(tmp_path, "there", model=str(packed), space=space, residency=residency)
    with figures.drawn_alike():
        here = run(tmp_path, "here", model=str(packed), space=space, device="cpu")
    assert there.summary["residency"] == residency
    assert losses(tmp_path / "there") == losses(tmp_path / "here")
    assert there.summary["loss_after"] == here.summary["loss_after"]
    again = replay.replay(tmp_path / "there")
    assert again.differs == []
    assert len(again.same) >= 2


def test_the_host_waits_for_the_device_once_a_step(packed: Path, tmp_path: Path) -> None:
    run(tmp_path, "run", model=str(packed), steps=6, eval_every=0)
    waits = {
        place: count for place, count in SYNCS.items() if "stream/" in place and "residency" not in place
    }
    assert sum(waits.values()) <= 6 + 6  # the losses of steps, and of the batches of both evaluations


# ---------------------------------------------------------------------------------------- interrupted


def test_an_interrupted_run_resumes_bitwise(packed: Path, tmp_path: Path) -> None:
    assert figures.resumes(packed, tmp_path)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


CHILD = """
import json, sys
from tests.simulated.gpu import install
from hizoo_lite.train.config import TrainConfig
from hizoo_lite.train.fit import fit
if __name__ == "__main__":
    install()
    fit(TrainConfig(**json.loads(sys.argv[1])))
"""


def test_a_killed_run_resumes_bitwise(packed: Path, tmp_path: Path) -> None:
    config = settings(tmp_path, "killed", model=str(packed), steps=60, residency="host", save_every=7)
    command = [sys.executable, "-c", CHILD, json.dumps(asdict(config))]
    metrics, until = tmp_path / "killed" / "metrics.jsonl", time.monotonic() + 120
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": os.getcwd()}) as process:
        while process.poll() is None and time.monotonic() < until:
            if metrics.is_file() and metrics.read_text().count('"step"') >= 30:
                break
            time.sleep(0.02)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert 10 <= len(losses(tmp_path / "killed")) < 60
    fit(replace(config, resume=True))
    run(tmp_path, "whole", model=str(packed), steps=60, residency="host", save_every=7)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert trained(tmp_path / "killed") == trained(tmp_path / "whole")


# ------------------------------------------------------------------------------------------- budgets


@pytest.mark.parametrize("desktop", [0, 3 * MIB])
def test_blocks_stay_within_what_the_cap_leaves(desktop: int, deep: Path, memory: Memory) -> None:
    wanted = step_losses(load(deep, device="cpu", compute_dtype="float32"), "llama")
    block = layouts(load(deep, device="cpu"))[0].nbytes
    memory.total_bytes, memory.outside_bytes = 1 << 30, CONTEXT_BYTES + desktop
    for extra, kept in ((2, 0), (3, 1), (5, 3), (8, 8)):
        model, residency = opened(deep, device_budget=1 << 30)
        left = memory.live_bytes + extra * block
        memory.total_bytes = memory.outside_bytes + left  # less than the budget, because of the others
        with enforced(1 << 30, DEVICE):
            assert memory.cap_bytes == left
            residency.prepare()
        assert len(residency.kept_blocks) == kept
        assert memory.refusals == 0
        memory.total_bytes = 1 << 30
        assert torch.equal(step_losses(model, "llama"), wanted)
        residency.close()


def test_a_budget_includes_the_context(deep: Path, memory: Memory) -> None:
    block = layouts(load(deep, device="cpu"))[0].nbytes
    _, residency = opened(deep, device_budget=1 << 30)
    residency.budget_bytes = CONTEXT_BYTES + memory.live_bytes + 4 * block
    with enforced(residency.budget_bytes, DEVICE):
        residency.prepare()
    assert len(residency.kept_blocks) == 2
    with pytest.raises(BudgetError, match=r"are\s+taken by the CUDA context"):
        enforced(CONTEXT_BYTES, DEVICE).__enter__()


def test_passes_keep_to_a_budget_under_which_blocks_travel(deep: Path, memory: Memory) -> None:
    """Every pass is of the size that was planned, so nothing is refused and nothing halved."""
    model, residency = opened(deep, residency="host")
    residency.prepare()
    held = memory.peak_bytes = memory.live_bytes
    batch = tiny_task_batch("causal", rows=8, length=32)
    wanted = Traversal(model).losses(batch, Branches(), 1e-3, {}).per_example
    needed = memory.peak_bytes - held
    block = layouts(load(deep, device="cpu"))[0].nbytes
    residency.close()
    told: list[str] = []
    model, residency = opened(deep, device_budget=1 << 30)
    model.scratch.clear()
    limit = CONTEXT_BYTES + memory.live_bytes + needed + 6 * block
    residency.budget_bytes, residency.reserved_bytes = limit, needed
    with enforced(limit, DEVICE):
        residency.prepare()
        traversal = Traversal(model)
        traversal.guard = Budget(Budgets(limit, None), model, told.append).fitting
        for _ in range(3):
            assert torch.equal(traversal.losses(batch, Branches(), 1e-3, {}).per_example, wanted)
    assert len(residency.kept_blocks) == 4
    assert (told, memory.refusals) == ([], 0)


@pytest.mark.parametrize("residency", ["auto", "disk"])
def test_the_least_budget_is_enough(residency: str, packed: Path, tmp_path: Path, memory: Memory) -> None:
    chosen = {"model": str(packed), "residency": residency, "branch_chunk": "auto"}
    plain = run(tmp_path, "plain", **chosen).summary["loss_after"]
    gc.collect()
    memory.reset()
    least = figures.least_budget(settings(tmp_path, "budgeted", **chosen))
    budgeted = run(tmp_path, "budgeted", **chosen, device_budget=f"{least}MiB")
    assert memory.peak_bytes <= least * MIB - CONTEXT_BYTES
    # chunks are smaller, so that products round otherwise
    assert budgeted.summary["loss_after"] == pytest.approx(plain, abs=1e-5)
    del budgeted
    gc.collect()
    with pytest.raises(BudgetError):
        run(tmp_path, "less", **chosen, device_budget=f"{least - 0.03}MiB")


@pytest.mark.parametrize(("share", "most"), [(0.9, 1), (0.5, 3)])
def test_refused_memory_halves_the_chunks(share: float, most: int, tmp_path: Path, memory: Memory) -> None:
    save_tiny("llama", tmp_path, intermediate_size=1024)
    model = load(tmp_path, bits="nf4", compute_dtype="float32", device="simgpu")
    traversal, batch = Traversal(model), tiny_task_batch("causal", rows=16, length=32)
    gc.collect()
    held = memory.live_bytes
    memory.peak_bytes = held
    wanted = traversal.losses(batch, Branches(), 1e-3, {}).per_example
    needed, told = memory.peak_bytes - held, []
    model.scratch.clear()
    traversal.guard = Budget(Budgets(None, None), model, told.append).fitting
    memory.cap_bytes = memory.live_bytes + int(share * needed)
    got = traversal.losses(batch, Branches(), 1e-3, {}).per_example
    assert 1 <= len(told) == model.halvings <= most
    assert memory.refusals == len(told)
    torch.testing.assert_close(got, wanted, rtol=0, atol=2e-6)  # products with fewer rows round otherwise


def test_where_nothing_fits_a_run_ends_saved_and_goes_on_with_more(
    packed: Path, tmp_path: Path, memory: Memory
) -> None:
    class Shrinks(StopAfter):
        """Somebody else takes the device after two steps."""

        def stepped(self, record: StepRecord) -> None:
            if record.step + 1 == self.steps:
                memory.cap_bytes = memory.live_bytes

    config = settings(tmp_path, "parts", model=str(packed))
    with pytest.raises(BudgetError, match="resume"):
        fit(config, listener=Shrinks(2))
    memory.cap_bytes = None
    fit(replace(config, resume=True))
    run(tmp_path, "whole", model=str(packed))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


# -------------------------------------------------------------------- what a streamed model is used for


@pytest.mark.parametrize("residency", ["host", "disk"])
def test_a_streamed_model_is_evaluated_and_writes(residency: str, packed: Path, tmp_path: Path) -> None:
    run(tmp_path, "run", model=str(packed))
    said = {}
    for device, where in (("cpu", "resident"), ("simgpu", residency)):
        options = ["--device", device, "--residency", where, "--compute-dtype", "float32"]
        evaluated = CliRunner().invoke(app, ["eval", "--adapter", str(tmp_path / "run"), *options, "--json"])
        written = CliRunner().invoke(
            app,
            ["generate", "--model", str(packed), "--prompt", "The day", "--max-new-tokens", "8", *options],
        )
        assert (evaluated.exit_code, written.exit_code) == (0, 0), evaluated.output + written.output
        said[device] = (json.loads(evaluated.stdout), written.stdout)
    assert said["cpu"][0]["scores"] == said["simgpu"][0]["scores"]
    assert said["simgpu"][0]["residency"] == residency
    assert said["cpu"][1] == said["simgpu"][1] != ""


def test_changed_blocks_come_back_changed(deep: Path) -> None:
    model = load(deep, device="simgpu", residency="disk")
    for block in each_block(model):
        model.linears[f"model.layers.{block}.mlp.up_proj"].weight.get_buffer("nested_absmax").fill_(block)
        model.residency.keep(block)
    for _ in range(2):
        for block in each_block(model):
            changed = model.linears[f"model.layers.{block}.mlp.up_proj"].weight.get_buffer("nested_absmax")
            assert bool((changed == block).all())


def test_a_slot_is_marked_as_used_where_its_store_fails(deep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hizoo_lite.stream.source import DiskSource

    model = load(deep, device="simgpu", residency="disk")
    assert isinstance(model.residency, Streamed)
    fetcher: Any = model.residency.prepare()
    recorded: list[int] = []
    for slot, event in enumerate(fetcher._free):
        monkeypatch.setattr(event, "record", lambda stream, slot=slot: recorded.append(slot), raising=False)

    def full(*_: Any) -> None:
        raise StorageError("disk full")

    monkeypatch.setattr(DiskSource, "write", full)

    def change_all() -> None:
        for block in each_block(model):
            model.residency.keep(block)

    with pytest.raises(StorageError, match="disk full"):
        change_all()
    assert recorded == [0]


# ------------------------------------------------------------------------------------ what a run is of


def test_a_runs_device_is_recorded_and_compared(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for space in ("lora", "scales"):
        run(tmp_path, space, model=str(packed), space=space, steps=2)
        made = identity.read(tmp_path / space / "run.json")
        assert (made["gpu"], made["torch"]) == ("a simulated GPU", torch.__version__)
    monkeypatch.setattr(SimulatedGpu, "name", lambda self, device: "another GPU")
    more = {"model": str(packed), "steps": 3, "resume": True}
    told: list[str] = []

    class Hears(StopAfter):
        def message(self, text: str) -> None:
            told.append(text)

    for space in ("lora", "scales"):
        told.clear()
        fit(settings(tmp_path, space, space=space, **more), listener=Hears(10**9))
        words = "the GPU: the run was begun with a simulated GPU, this is another GPU"
        assert any(words in text for text in told)


@pytest.mark.parametrize("written", [{"noise": "torch-cuda"}, {"noise_gpu": "a simulated GPU"}])
def test_noise_of_another_generator_is_not_gone_on_with(
    written: dict[str, str], packed: Path, tmp_path: Path
) -> None:
    chosen = {"model": str(packed), "space": "scales"}
    assert run(tmp_path, "run", steps=2, **chosen).summary["noise"] == "philox-4x32-10"
    path = tmp_path / "run" / "run.json"
    made = json.loads(path.read_text())
    assert made.pop("noise") == "philox-4x32-10"
    path.write_text(json.dumps({**made, **written}))
    with pytest.raises(UserError, match="--device: the generator that draws the noise of the weights"):
        run(tmp_path, "run", steps=3, resume=True, **chosen)
    with pytest.raises(UserError, match="--device: the generator that draws the noise of the weights"):
        replay.replay(tmp_path / "run")


def test_an_environment_that_rounds_is_refused_before_anything_is_read(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    with pytest.raises(UserError, match="NVIDIA_TF32_OVERRIDE"):
        run(tmp_path, "run", model=str(packed))
    assert not (tmp_path / "run").exists()


def test_every_kernel_is_launched_before_the_weights_are_there(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.simulated.gpu import LAUNCHES

    seen: list[set[str]] = []
    from hizoo_lite.model.fill import Filler

    real = Filler.fill

    def fill(self: Filler) -> Any:
        seen.append(set(LAUNCHES))
        return real(self)

    monkeypatch.setattr(Filler, "fill", fill)
    load(packed, device="simgpu")
    names = {name for name in seen[0] if name.startswith("bitsandbytes")}
    assert {name.removeprefix("bitsandbytes.").split(".")[0] for name in names} == {
        *("dequantize_4bit", "quantize_4bit", "quantize_blockwise", "dequantize_blockwise"),
        "int8_vectorwise_quant",
    }
    assert "aten.mm.default" in seen[0]


def test_quantizers_run_on_the_stream_they_launch_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from contextlib import contextmanager

    from tests.simulated import gpu

    on_default = [False]
    names = ("quantize_4bit", "quantize_blockwise", "int8_vectorwise_quant")
    seen: dict[str, set[bool]] = {name: set() for name in names}
    real = gpu._run

    @contextmanager
    def on_default_stream(self: SimulatedGpu, device: torch.device) -> Iterator[None]:
        on_default[0] = True
        yield
        on_default[0] = False

    def watched(func: Any, args: Any, kwargs: Any) -> Any:
        name = str(func).removeprefix("bitsandbytes.").split(".")[0]
        if name in seen:
            seen[name].add(on_default[0])
        return real(func, args, kwargs)

    monkeypatch.setattr(SimulatedGpu, "on_default_stream", on_default_stream)
    monkeypatch.setattr(gpu, "_run", watched)
    save_tiny("llama", tmp_path)
    for bits in ("nf4", "int8"):
        load(tmp_path, bits=bits, device="simgpu")  # type: ignore[arg-type]
    assert set(map(frozenset, seen.values())) == {frozenset({True})}


def test_a_block_of_a_real_model_launches_and_moves_no_more_than_it_did() -> None:
    found = shapes.count()
    assert found.launches_per_block <= MOST_LAUNCHES
    assert found.bytes_per_token_block <= MOST_BYTES
    assert found.syncs_per_pass <= 3
