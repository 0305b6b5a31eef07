"""Whole runs on a GPU that is none (`simulated/gpu.py`): they end as on a CPU, and keep to their budgets."""

from __future__ import annotations

import copy
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from hizoo_lite.base import Curvature
from hizoo_lite.branches import Branches
from hizoo_lite.cli import app
from hizoo_lite.curvature.factored import Factored
from hizoo_lite.curvature.grouped import Grouped
from hizoo_lite.device import CONTEXT_BYTES
from hizoo_lite.engine.block import each_block
from hizoo_lite.engine.budget import Budget, enforced
from hizoo_lite.engine.layout import layouts
from hizoo_lite.engine.load import load
from hizoo_lite.engine.residency import Streamed, _settle
from hizoo_lite.engine.traversal import Traversal
from hizoo_lite.errors import BudgetError, StorageError, UserError
from hizoo_lite.export.quantize import Quantization
from hizoo_lite.memory.limits import Budgets
from hizoo_lite.model.model import Model
from hizoo_lite.noise import drawn, drawn_along
from hizoo_lite.quant import ResidualWeight, native, pack
from hizoo_lite.run import Run, fit
from hizoo_lite.spaces.dense import Dense
from hizoo_lite.tensors import BLOCK, TorchArrays
from hizoo_lite.train import identity, journal, replay
from hizoo_lite.train.step import StepRecord
from tests.architectures import TINY_CONFIGS, save_tiny
from tests.batches import tiny_task_batch
from tests.simulated import costs, figures, shapes
from tests.simulated.figures import StopAfter, losses, settings, trained
from tests.simulated.gpu import LAUNCHES, SYNCS, WATCHERS, DeviceTensor, Memory, SimulatedGpu, installed
from tests.test_stream import step_losses

MIB = 1 << 20
#: A block of Llama-2-7B, LoRA on q and v, three branches; see `shapes.Counted`.
MOST_LAUNCHES, MOST_BYTES = 92, 4.02e6
DEVICE = torch.device("simgpu", 0)
#: Of `figures.RUNS`: adapters on the device, weights from disk.
FAST_RUNS = {("lora", "resident"), ("dense", "disk")}


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


@contextmanager
def brought() -> Iterator[list[torch.Tensor]]:
    """Tensors of the host, of more than one number, that are copied to the device meanwhile."""
    found: list[torch.Tensor] = []

    def watch(op: Any, args: Any, kwargs: Any) -> None:
        given = args[1] if str(op).startswith("aten.copy_") else args[0]
        copies = str(op).startswith(("aten.copy_", "aten._to_copy"))
        if copies and not isinstance(given, DeviceTensor) and given.ndim > 0:
            found.append(given)

    WATCHERS.append(watch)
    try:
        yield found
    finally:
        WATCHERS.remove(watch)


# ------------------------------------------------------------------------------------- as on a CPU


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        *(("llama", "nf4"), ("opt", "fp4"), ("gpt2", "int8"), ("bert", "nf4"), ("llama", "none")),
        *(pytest.param(*one, marks=pytest.mark.grid) for one in (("llama", "int8"), ("gemma2", "nf4"))),
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


@pytest.mark.parametrize(
    ("space", "residency"),
    [pytest.param(*one, marks=[] if one in FAST_RUNS else [pytest.mark.grid]) for one in figures.RUNS],
)
def test_a_run_is_that_of_a_cpu(space: str, residency: str, packed: Path, tmp_path: Path) -> None:
    chosen = {"model": str(packed), "space": space, "steps": 2}
    there = run(tmp_path, "there", residency=residency, **chosen)
    with figures.drawn_alike():
        here = run(tmp_path, "here", device="cpu", **chosen)
    assert there.summary["residency"] == residency
    assert losses(tmp_path / "there") == losses(tmp_path / "here")
    assert there.summary["loss_after"] == here.summary["loss_after"]
    again = replay.replay(tmp_path / "there")
    assert again.differs == []
    assert len(again.same) >= 2


@pytest.mark.parametrize("residency", [pytest.param("resident", marks=pytest.mark.grid), "host"])
def test_exact_gradients_inside_the_blocks_are_those_of_a_cpu(
    residency: str, packed: Path, tmp_path: Path
) -> None:
    """Inputs of blocks wait on the host, and come back in the other order.

    A GPU's tiles of a weight are larger, so that sums over them round otherwise; gradients are of the order
    of 1e-3. Adam divides by their size, and later steps are not compared. Reaches, above 1, count the places
    whose gradient is not zero, which that of a single key's softmax is but for rounding.
    """
    chosen = {"model": str(packed), "exact_blocks": "all", "steps": 2}
    gradients = []
    for name, options in (("there", {"residency": residency}), ("here", {"device": "cpu"})):
        run(tmp_path, name, **options, **chosen)
        gradients.append(np.frombuffer(journal.read(tmp_path / name / "journal.bin")[0].exact, "<f4"))
    assert losses(tmp_path / "there")[0] == losses(tmp_path / "here")[0]
    assert len(gradients[0]) == len(gradients[1])
    of_reaches = np.abs(gradients[1]) > 1
    assert 0 < of_reaches.sum() <= 4 * 2 * 3
    there, here = (np.where(of_reaches, 0.0, one) for one in gradients)
    np.testing.assert_allclose(there, here, rtol=1e-3, atol=1e-7)
    assert replay.replay(tmp_path / "there").differs == []


def test_the_host_waits_for_the_device_once_a_step(packed: Path, tmp_path: Path) -> None:
    run(tmp_path, "run", model=str(packed), steps=6, eval_every=0)
    waits = {
        place: count for place, count in SYNCS.items() if "engine/" in place and "residency" not in place
    }
    assert sum(waits.values()) <= 6 + 6  # the losses of steps, and of the batches of both evaluations


# ---------------------------------------------------------------------------------------- interrupted


@pytest.mark.parametrize("space", ["dense", pytest.param("scales", marks=pytest.mark.grid)])
def test_an_interrupted_run_resumes_bitwise(space: str, packed: Path, tmp_path: Path) -> None:
    assert figures.resumes(packed, tmp_path, space)
    assert any(name.endswith(".safetensors") for name in trained(tmp_path / "whole"))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


CHILD = """
import json, sys
from tests.simulated.gpu import install
from hizoo_lite.config import TrainConfig
from hizoo_lite.run import fit
if __name__ == "__main__":
    install()
    fit(TrainConfig(**json.loads(sys.argv[1])))
"""


@pytest.mark.grid
def test_a_killed_run_resumes_bitwise(packed: Path, tmp_path: Path) -> None:
    config = settings(tmp_path, "killed", model=str(packed), steps=24, residency="host", save_every=3)
    command = [sys.executable, "-c", CHILD, json.dumps(asdict(config))]
    metrics, until = tmp_path / "killed" / "metrics.jsonl", time.monotonic() + 120
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": os.getcwd()}) as process:
        while process.poll() is None and time.monotonic() < until:
            if metrics.is_file() and metrics.read_text().count('"step"') >= 14:
                break
            time.sleep(0.02)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert 4 <= len(losses(tmp_path / "killed")) < 24
    fit(replace(config, resume=True))
    run(tmp_path, "whole", model=str(packed), steps=24, residency="host", save_every=3)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert trained(tmp_path / "killed") == trained(tmp_path / "whole")


# ------------------------------------------------------------------------------------------- budgets


@pytest.mark.parametrize("desktop", [pytest.param(0, marks=pytest.mark.grid), 3 * MIB])
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
    wanted = Traversal(model).losses(batch, Branches.of(), 1e-3, {}).per_example
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
            assert torch.equal(traversal.losses(batch, Branches.of(), 1e-3, {}).per_example, wanted)
    assert len(residency.kept_blocks) == 4
    assert (told, memory.refusals) == ([], 0)


@pytest.mark.parametrize("residency", [pytest.param("auto", marks=pytest.mark.grid), "disk"])
def test_the_least_budget_is_enough(residency: str, packed: Path, tmp_path: Path, memory: Memory) -> None:
    chosen = {"model": str(packed), "residency": residency, "branch_chunk": "auto", "steps": 1}
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


@pytest.mark.parametrize(("share", "most"), [pytest.param(0.9, 1, marks=pytest.mark.grid), (0.5, 3)])
def test_refused_memory_halves_the_chunks(share: float, most: int, tmp_path: Path, memory: Memory) -> None:
    save_tiny("llama", tmp_path, intermediate_size=1024)
    model = load(tmp_path, bits="nf4", compute_dtype="float32", device="simgpu")
    traversal, batch = Traversal(model), tiny_task_batch("causal", rows=16, length=32)
    gc.collect()
    held = memory.live_bytes
    memory.peak_bytes = held
    wanted = traversal.losses(batch, Branches.of(), 1e-3, {}).per_example
    needed, told = memory.peak_bytes - held, []
    model.scratch.clear()
    traversal.guard = Budget(Budgets(None, None), model, told.append).fitting
    memory.cap_bytes = memory.live_bytes + int(share * needed)
    got = traversal.losses(batch, Branches.of(), 1e-3, {}).per_example
    assert 1 <= len(told) == model.chunk_halvings <= most
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

    config = settings(tmp_path, "parts", model=str(packed), steps=4)
    with pytest.raises(BudgetError, match="resume"):
        fit(config, callbacks=[Shrinks(2)])
    memory.cap_bytes = None
    fit(replace(config, resume=True))
    run(tmp_path, "whole", model=str(packed), steps=4)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


@pytest.mark.parametrize(
    ("name", "compute", "groups"),
    [("llama", "bf16", 1), ("gemma2", "float32", 1), ("opt", "bf16", 3), ("bert", "float32", 1)],
)
def test_a_head_that_is_offloaded_comes_once_for_many_chunks_of_sites(
    name: str, compute: str, groups: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit what a resident head gives, over several chunks and tiles of the vocabulary."""
    save_tiny(name, tmp_path)
    row, chunks = 4 * 3 * 97, -(-int(tiny_task_batch(TINY_CONFIGS[name].kind).token_id.shape[0]) // 4)
    together = -(-chunks // groups)
    monkeypatch.setattr("hizoo_lite.engine.traversal.LOGITS_BYTES", 4 * row)
    monkeypatch.setattr("hizoo_lite.engine.traversal.HELD_BYTES", {"cuda": together * 4 * row})
    monkeypatch.setattr("hizoo_lite.model.linear.TILE_BYTES", {"cuda": 1})
    monkeypatch.setattr("hizoo_lite.model.weights.SMALL_ELEMENTS", 2048)
    options: Any = {"kind": TINY_CONFIGS[name].kind, "bits": "nf4", "compute_dtype": compute}
    wanted = step_losses(load(tmp_path, device="simgpu", **options), name)
    model = load(tmp_path, device="simgpu", residency="host", **options)
    head: Any = next(x for x in model.linears.values() if x.out_features == 97)
    matrix = head.weight.read(0, 97)
    with brought() as tensors:
        assert torch.equal(step_losses(model, name), wanted)
    storage = matrix.untyped_storage().data_ptr()
    crossed = [t.nbytes for t in tensors if t.untyped_storage().data_ptr() == storage]
    assert chunks >= 3
    assert sum(crossed) == groups * matrix.nbytes


# -------------------------------------------------------------------- what a streamed model is used for


@pytest.mark.parametrize("residency", ["host", pytest.param("disk", marks=pytest.mark.grid)])
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
        model.residency.mark_dirty(block)
    for _ in range(2):
        for block in each_block(model):
            changed = model.linears[f"model.layers.{block}.mlp.up_proj"].weight.get_buffer("nested_absmax")
            assert bool((changed == block).all())


def test_a_slot_is_marked_as_used_where_its_store_fails(deep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hizoo_lite.engine.storage import DiskSource

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
            model.residency.mark_dirty(block)

    with pytest.raises(StorageError, match="disk full"):
        change_all()
    assert recorded == [0]


# ------------------------------------------------------------------------------------ what a run is of


def test_a_runs_device_is_recorded_and_compared(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for space in ("lora", "scales"):
        run(tmp_path, space, model=str(packed), space=space, steps=1)
        made = identity.read(tmp_path / space / "run.json")
        assert (made["gpu"], made["torch"]) == ("a simulated GPU", torch.__version__)
    monkeypatch.setattr(SimulatedGpu, "name", lambda self, device: "another GPU")
    more = {"model": str(packed), "steps": 2, "resume": True}
    told: list[str] = []

    class Hears(StopAfter):
        def message(self, text: str) -> None:
            told.append(text)

    for space in ("lora", "scales"):
        told.clear()
        fit(settings(tmp_path, space, space=space, **more), callbacks=[Hears(10**9)])
        words = "the GPU: the run was begun with a simulated GPU, this is another GPU"
        assert any(words in text for text in told)


def test_noise_of_another_generator_is_not_gone_on_with(packed: Path, tmp_path: Path) -> None:
    chosen = {"model": str(packed), "space": "scales"}
    assert run(tmp_path, "run", steps=1, **chosen).summary["noise"] == "philox-4x32-10"
    path = tmp_path / "run" / "run.json"
    made = json.loads(path.read_text())
    assert made.pop("noise") == "philox-4x32-10"
    for written in ({"noise": "torch-cuda"}, {"noise_gpu": "a simulated GPU"}):
        path.write_text(json.dumps({**made, **written}))
        with pytest.raises(UserError, match="--device: the generator that draws the noise of the weights"):
            run(tmp_path, "run", steps=2, resume=True, **chosen)
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
    seen: list[set[str]] = []
    from hizoo_lite.model.weights import WeightLoader

    real = WeightLoader.fill

    def fill(self: WeightLoader) -> Any:
        seen.append(set(LAUNCHES))
        return real(self)

    monkeypatch.setattr(WeightLoader, "fill", fill)
    load(packed, device="simgpu")
    names = {name for name in seen[0] if name.startswith("bitsandbytes")}
    assert {name.removeprefix("bitsandbytes.").split(".")[0] for name in names} == {
        *("dequantize_4bit", "quantize_4bit", "quantize_blockwise", "dequantize_blockwise"),
        *("int8_vectorwise_quant", "gemm_4bit"),
    }
    assert "aten.mm.default" in seen[0]


def test_quantizers_run_on_the_stream_they_launch_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
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


@pytest.mark.parametrize("curvature", [Grouped(per="row"), Factored()])
def test_what_a_step_sends_to_the_weights_is_one_copy(curvature: Curvature, deep: Path) -> None:
    """However many weights there are: scales for drawing, and what the curvature needs to see z."""
    model, space = load(deep, device="simgpu"), Dense()
    space.attach(model, seed=0)
    weights: Any = space.weights
    curvature.start(weights.shapes, TorchArrays(DEVICE))
    if isinstance(curvature, Grouped):
        curvature._running = True
    with brought() as tensors:
        weights.begin(0, 0, curvature, measured=True)
        sent = len(tensors)
        weights.see()
    assert (sent, len(tensors)) == (1, 1 if isinstance(curvature, Grouped) else 2)
    SYNCS.clear()
    curvature.observe(1.0, 0.1)
    assert sum(SYNCS.values()) == 1
    assert len(weights.parts) == 56


def test_directions_of_parameters_are_sent_in_one_copy() -> None:
    here, there = TorchArrays(), TorchArrays(DEVICE)
    scales = {"a": torch.rand(5, 1), "b": torch.tensor(0.3), "c": torch.rand(3)}
    for seed in range(2):  # page-locked memory is used again
        z = {name: torch.from_numpy(drawn_along(seed, 0, name, (5, 3), 2)) for name in scales}
        wanted = here.directions(scales.__getitem__, z)
        with brought() as tensors:
            found = there.directions(scales.__getitem__, z)
        assert len(tensors) == 1
        assert all(torch.equal(found[name].cpu(), wanted[name]) for name in z)
    values = {name: torch.ones(5, 3, device=DEVICE) for name in z}
    there.add_all(list(values.values()), [found[name][1] for name in z], -0.1)
    for name, value in values.items():
        assert torch.equal(value.cpu(), torch.ones(5, 3).add_(wanted[name][1], alpha=-0.1))


@pytest.mark.parametrize("shape", [(64, 4096), (2048, 640), (1500, 1031), (1, 1)])
def test_sums_in_float32_blocks_are_those_in_float64_to_what_their_docstring_says(
    shape: tuple[int, int],
) -> None:
    z = torch.from_numpy(drawn(0, 0, "z", shape))
    rows, columns = (torch.rand(n, dtype=torch.float32).add_(0.01).double() for n in shape)
    wanted = TorchArrays().excess(z, rows, columns)
    found = TorchArrays(DEVICE).excess(z.to(DEVICE), rows.to(DEVICE), columns.to(DEVICE))
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == torch.float64
        torch.testing.assert_close(one.cpu(), other, rtol=BLOCK * 2.0**-24, atol=1e-6)


def test_a_residual_is_summed_in_few_launches() -> None:
    base = pack(torch.randn(2048, 1024), "nf4", name="weight")
    here = ResidualWeight(base)
    here.residual.normal_()
    there = copy.deepcopy(here).to(DEVICE)
    wanted = here.unpack(torch.empty(2048, 1024, dtype=torch.bfloat16))
    LAUNCHES.clear()
    assert torch.equal(
        there.unpack(torch.empty(2048, 1024, dtype=torch.bfloat16, device=DEVICE)).cpu(), wanted
    )
    assert sum(n for name, n in LAUNCHES.items() if name.startswith("bitsandbytes.dequantize_4bit")) == 1


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_the_rows_of_an_embedding_that_is_offloaded_are_chosen_on_the_host(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hizoo_lite.model.weights.SMALL_ELEMENTS", 2048)
    save_tiny(name, tmp_path)
    options: Any = {"kind": TINY_CONFIGS[name].kind, "bits": "nf4", "compute_dtype": "float32"}
    wanted = step_losses(load(tmp_path, device="simgpu", **options), name)
    model = load(tmp_path, device="simgpu", residency="host", **options)
    SYNCS.clear()
    assert torch.equal(step_losses(model, name), wanted)
    assert not [place for place in SYNCS if "offloaded" in place]


def test_several_threads_read_a_block(deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces, whatever the bounds of its tensors; a piece that is missing is named once all have ended."""
    monkeypatch.setattr("hizoo_lite.engine.storage.PIECE_BYTES", 1001)
    shutil.copytree(deep, tmp_path / "model")
    wanted = step_losses(load(deep, device="simgpu"), "llama")
    model = load(tmp_path / "model", device="simgpu", residency="disk")
    assert torch.equal(step_losses(model, "llama"), wanted)
    for block in each_block(model):  # from the file of changed blocks too
        model.residency.mark_dirty(block)
    assert torch.equal(step_losses(model, "llama"), wanted)
    model.residency.close()
    model = load(tmp_path / "model", device="simgpu", residency="disk")
    file = next(
        f for f in (tmp_path / "model").glob("*.safetensors") if "layer" in f.name or "block" in f.name
    )
    os.truncate(file, file.stat().st_size - 3000)
    with pytest.raises(StorageError, match=rf"{file.name}: ends at byte \d+, inside of a block"):
        step_losses(model, "llama")


def test_a_thread_that_waits_for_the_device_leaves_the_core_to_others(
    deep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []

    def event(self: SimulatedGpu, sleeps: bool = False) -> Any:
        made.append(
            SimpleNamespace(sleeps=sleeps, record=lambda s: None, synchronize=lambda: threads.append(sleeps))
        )
        return made[-1]

    threads: list[bool] = []
    monkeypatch.setattr(SimulatedGpu, "event", event)
    model = load(deep, device="simgpu", residency="disk")
    for block in each_block(model):
        model.residency.mark_dirty(block)
    model.residency.close()
    assert set(threads) == {True}


@pytest.mark.parametrize("bits", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_few_rows_are_multiplied_with_packed_weights(bits: Any, double_quant: bool) -> None:
    """By one call whose arguments bitsandbytes' own description of the operator takes."""
    weight: Any = pack(torch.randn(96, 128), bits, double_quant=double_quant)
    rows = torch.randn(3, 128)
    wanted = rows @ weight.unpack(torch.empty(96, 128)).t()
    there = copy.deepcopy(weight).to(DEVICE)
    assert weight.product(rows) is None
    torch.testing.assert_close(there.product(rows.to(DEVICE)).cpu(), wanted)
    assert there.product(torch.randn(5, 128, device=DEVICE)) is None  # whose kernels no table is known of
    meta = copy.deepcopy(weight).to("meta")
    nested = (meta.nested_absmax, meta.nested_table, meta.offset) if double_quant else None
    arguments = meta.codes, meta.shape, meta.absmax, bits, meta.blocksize, nested
    made = native.multiply_packed(rows.to("meta", torch.bfloat16), *arguments)
    assert (tuple(made.shape), made.dtype) == ((3, 96), torch.bfloat16)


def test_writing_unpacks_nothing_for_one_token(deep: Path) -> None:
    texts = []
    for device in ("cpu", "simgpu"):
        model = load(deep, device=device, compute_dtype="float32")
        LAUNCHES.clear()
        texts.append(Traversal(model).write([[5, 6, 7], [8, 9]], 0, 4))
        assert "shared_product" not in model.linears["model.layers.0.mlp.up_proj"].__dict__
    assert texts[0] == texts[1]
    # the first pass is of six rows, the others are of two
    assert LAUNCHES["bitsandbytes.gemm_4bit.default"] == 3 * 7 * 8
    assert LAUNCHES["bitsandbytes.dequantize_4bit.out"] == 7 * 8


def test_a_block_of_a_real_model_launches_and_moves_no_more_than_it_did() -> None:
    found = shapes.count()
    assert found.launches_per_block <= MOST_LAUNCHES
    assert found.bytes_per_token_block <= MOST_BYTES
    assert found.syncs_per_pass <= 1


def test_costs_of_a_pass_are_those_of_its_shapes() -> None:
    """Of the products and the weights there are formulas; of a step nothing is less than its limit."""
    hidden, inner, layers, rows, length = 256, 512, 4, 4, 16
    shape = {"hidden_size": hidden, "intermediate_size": inner, "num_attention_heads": 4}
    found = costs.of_pass({**shape, "num_hidden_layers": layers}, rows, length)
    weights, tokens = 4 * hidden**2 + 3 * hidden * inner, 3 * rows * length
    alike = 2 * rows * length * 2 * 3 * hidden**2  # q, k, v of the first block, in one branch for all
    head = 2 * 3 * rows * 32000 * hidden
    assert found.products == 2 * tokens * layers * weights - alike + head
    assert found.unpacking_once == found.packed_bytes + 2 * layers * weights
    assert found.packed_bytes == pytest.approx(
        layers * weights * (0.5 + 1 / 64), rel=0.03
    )  # and their tables
    assert found.head_bytes == 2 * 32000 * hidden
    assert found.unpacking >= 0.9 * found.unpacking_once
    assert 0 < found.least_linear_bytes <= found.linear_bytes
    assert 0 < found.least_other_bytes <= found.other_bytes
    # a block's q and v: x read, the inner product written and read, A and B read, y read and written
    assert found.adapter_bytes > 4 * 2 * layers * tokens * 3 * hidden
