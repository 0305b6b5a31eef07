"""The same code on CUDA. Run with `pytest -m gpu`; every test here needs a device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hizoo_lite import curvature, estimators
from hizoo_lite.branches import Branches
from hizoo_lite.engine.load import load
from hizoo_lite.engine.traversal import Traversal
from hizoo_lite.noise import normal
from hizoo_lite.optimizers.step_size import FixedRate, Schedule
from hizoo_lite.spaces.lora import LoRA
from hizoo_lite.tensors import TorchArrays
from hizoo_lite.train.step import Stepper
from tests.architectures import TINY_CONFIGS, save_tiny
from tests.batches import tiny_task_batch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
MU = 1e-3


def losses(folder: Path, name: str, bits: str, compute: str, device: str) -> torch.Tensor:
    """Folded losses of a step's three branches, (3, examples) float64."""
    kind = TINY_CONFIGS[name].kind
    model = load(folder, kind=kind, bits=bits, compute_dtype=compute, device=device)
    space = LoRA(rank=4, train_a=True, blocks="all")
    space.attach(model, seed=0)
    for key, value in space.parameters.items():
        value.add_(normal(3, 0, key, value.shape).to(model.device), alpha=0.05)
    directions = {k: normal(5, 0, k, p.shape)[None].to(model.device) for k, p in space.parameters.items()}
    return Traversal(model).losses(tiny_task_batch(kind), Branches.of(), MU, directions).per_example


@pytest.mark.parametrize("bits", ["nf4", "fp4", "int8", "none"])
@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_losses_on_cuda_equal_those_on_cpu(name: str, bits: str, tmp_path: Path) -> None:
    save_tiny(name, tmp_path)
    there = losses(tmp_path, name, bits, "float32", "cuda")
    here = losses(tmp_path, name, bits, "float32", "cpu")
    # float32 sums in another order (no TF32), a few units in the last place of order-10 activations
    torch.testing.assert_close(there, here, rtol=0, atol=1e-4)


@pytest.mark.parametrize("compute", ["bf16", "fp16"])
def test_short_products_on_cuda_keep_the_projected_gradient(compute: str, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)

    def projected_gradient(kind: str) -> float:
        zero, plus, minus = losses(tmp_path, "llama", "nf4", kind, "cuda").mean(1).tolist()
        assert zero > 0
        return (plus - minus) / (2 * MU)

    exact = projected_gradient("float32")
    # bf16 keeps 8 bits of every difference: 5 % after two layers, as on CPU
    assert abs(projected_gradient(compute) - exact) < 0.05 * abs(exact)


def test_the_trunk_of_an_unpadded_batch_never_waits_for_the_device(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    model = load(tmp_path, bits="nf4", compute_dtype="bf16", device="cuda")
    space = LoRA(rank=4, train_a=True, blocks="all")
    space.attach(model, seed=0)
    traversal = Traversal(model)
    batch = tiny_task_batch("causal", rows=1)  # one row has no padding, so no mask is built
    directions = {k: normal(5, 0, k, p.shape)[None].to("cuda") for k, p in space.parameters.items()}
    traversal.losses(batch, Branches.of(), MU, directions)
    with traversal._branches(Branches.of(), MU, directions):
        inputs = traversal._fold(batch, 3)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            hidden = model.module.model(**inputs, use_cache=False)[0]
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert hidden.shape[0] == 3


@pytest.mark.parametrize("bits", ["nf4", "int8"])
def test_steps_on_cuda_follow_those_on_cpu(bits: str, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    batch = tiny_task_batch("causal")

    def trained(device: str) -> dict[str, torch.Tensor]:
        model = load(tmp_path, bits=bits, compute_dtype="float32", device=device)
        space = LoRA(rank=4, train_a=True, blocks="all")
        space.attach(model, seed=0)
        constant = Schedule("constant", 1e-3, 0, 100)
        stepper = Stepper(
            Traversal(model), TorchArrays(model.device), space, estimators.get("hizoo"),
            curvature.get("grouped"), FixedRate(constant), seed=0, mu=MU,
            smoothing=Schedule("constant", 0.01, 0, 100),
        )  # fmt: skip
        for step in range(5):
            assert not stepper.step(step, batch).skipped
        stepper.close()
        return {name: p.cpu() for name, p in space.parameters.items()}

    here, there = trained("cpu"), trained("cuda")
    for name, value in here.items():
        # projected gradients agree to about 1e-3 in float32; five steps of 1e-3 along d of order one
        torch.testing.assert_close(there[name], value, rtol=0, atol=5e-5)


@pytest.mark.parametrize("bits", ["nf4", "fp4", "int8"])
def test_packed_bytes_never_change_on_cuda(bits: str, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    model = load(tmp_path, bits=bits, compute_dtype="bf16", device="cuda")
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    Traversal(model).losses(tiny_task_batch("causal"))
    assert all(torch.equal(before[name], value) for name, value in model.module.state_dict().items())


@pytest.mark.parametrize("bits", ["nf4", "int8"])
@pytest.mark.parametrize("where", ["host", "disk"])
def test_streamed_losses_on_cuda_equal_resident_losses_bitwise(where: str, bits: str, tmp_path: Path) -> None:
    from hizoo_lite.export.quantize import Quantization
    from tests.test_stream import step_losses

    save_tiny("llama", tmp_path / "source", num_hidden_layers=6, vocab_size=2000)
    Quantization(tmp_path / "source", tmp_path / "packed", kind="causal", bits=bits).run()  # type: ignore[arg-type]
    found = []
    for residency in ("resident", where):
        model = load(tmp_path / "packed", device="cuda", compute_dtype="bf16", residency=residency)  # type: ignore[arg-type]
        found += [step_losses(model, "llama"), step_losses(model, "llama")]
    assert all(torch.equal(losses, found[0]) for losses in found)


@pytest.mark.parametrize("where", ["host", "disk"])
def test_changed_blocks_on_cuda_come_back_changed(where: str, tmp_path: Path) -> None:
    from hizoo_lite.engine.block import each_block
    from hizoo_lite.export.quantize import Quantization

    save_tiny("llama", tmp_path / "source", num_hidden_layers=6)
    Quantization(tmp_path / "source", tmp_path / "packed", kind="causal", bits="nf4").run()
    model = load(tmp_path / "packed", device="cuda", residency=where)  # type: ignore[arg-type]
    for block in each_block(model):
        model.linears[f"model.layers.{block}.mlp.up_proj"].weight.get_buffer("absmax").fill_(block)
        model.residency.mark_dirty(block)
    for _ in range(2):
        for block in each_block(model):
            absmax = model.linears[f"model.layers.{block}.mlp.up_proj"].weight.get_buffer("absmax")
            assert bool((absmax == block).all())


def test_a_run_on_cuda_keeps_to_a_budget_and_resumes_bitwise(tmp_path: Path) -> None:
    from dataclasses import replace

    from hizoo_lite.run import fit
    from tests.simulated import figures

    model = str(figures.packed(tmp_path / "nf4"))
    chosen = {"model": model, "device": "cuda", "space": "dense", "device_budget": "4GiB"}
    parts = figures.settings(tmp_path, "parts", **chosen)
    assert fit(parts, callbacks=[figures.StopAfter(2)]).interrupted
    resumed = fit(replace(parts, resume=True))
    fit(figures.settings(tmp_path, "whole", **chosen))
    assert resumed.summary["measured_peak_bytes"] < 4 << 30
    assert figures.losses(tmp_path / "parts") == figures.losses(tmp_path / "whole")
    assert figures.trained(tmp_path / "parts") == figures.trained(tmp_path / "whole")


def test_attention_of_groups_makes_no_matrix_on_cuda() -> None:
    from hizoo_lite.model import attention

    layer = torch.nn.Module()
    layer.num_key_value_groups, layer.is_causal = 4, True  # type: ignore[assignment]
    query = torch.randn(3, 32, 2048, 128, device="cuda")
    key, value = (torch.randn(3, 8, 2048, 128, device="cuda") for _ in range(2))
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    attention.attend(layer, query, key, value, None)
    matrix = 3 * 32 * 2048 * 2048 * 4
    assert torch.cuda.max_memory_allocated() - held < matrix / 2
