"""Training in the weights on CUDA. Run with `pytest -m gpu`; every test here needs a device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hizoo_lite.base import trainable
from hizoo_lite.branches import Branches
from hizoo_lite.curvature import Factored, Grouped, NoCurvature
from hizoo_lite.engine.load import load
from hizoo_lite.engine.traversal import Traversal
from hizoo_lite.noise import GENERATORS, tile_normal
from hizoo_lite.philox import PhiloxUniform, fill_normal
from hizoo_lite.quant import FourBitWeight, ResidualWeight, pack
from hizoo_lite.tensors import TorchArrays
from tests.architectures import save_tiny
from tests.batches import tiny_task_batch
from tests.test_dense import KINDS, MU, make_stepper
from tests.weights_reference import same, state

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]


def attached(folder: Path, kind: str, compute: str = "float32"):
    make, bits = KINDS[kind]
    model = load(folder, bits=bits, compute_dtype=compute, device="cuda", double_quant=False)
    space = make()
    space.attach(model, seed=0)
    return model, space


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("curvature", [Grouped, lambda: Grouped("row"), Factored])
def test_steps_on_cuda_are_finite_and_deterministic(kind: str, curvature, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    results = []
    for _ in range(2):
        model, space = attached(tmp_path, kind)
        before = state(model)
        stepper = make_stepper(model, space, curvature())
        records = [stepper.step(step, tiny_task_batch("causal")) for step in range(8)]
        stepper.close()
        assert not any(record.skipped for record in records)
        assert not same(before, state(model))
        results.append((records, {name: tensor.cpu() for name, tensor in state(model).items()}))
    assert results[0][0] == results[1][0]
    assert same(results[0][1], results[1][1])


@pytest.mark.parametrize("kind", ["dense nf4", "residual int8", "scales nf4", "scales int8"])
@pytest.mark.parametrize("compute", ["bf16", "fp16"])
def test_short_products_on_cuda_keep_the_projected_gradient(kind: str, compute: str, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    found = {}
    for dtype in ("float32", compute):
        model, space = attached(tmp_path, kind, dtype)
        curvature = NoCurvature()
        curvature.start(trainable(space), TorchArrays())
        assert space.weights is not None
        grads = []
        for step in range(7):
            space.weights.begin(0, step, curvature, measured=False)
            _, plus, minus = Traversal(model).losses(tiny_task_batch("causal"), Branches.of(), MU).mean()
            grads.append((plus - minus) / (2 * MU))
        found[dtype] = torch.stack(grads)
    errors = (found[compute] / found["float32"] - 1).abs()
    assert errors.median() < 0.05


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8", "none", "residual"])
def test_rounding_on_cuda_has_no_bias_and_keeps_decoded_values(kind: str) -> None:
    weight = pack(
        (torch.randn(24, 80) * 0.02).cuda().bfloat16(),
        "nf4" if kind == "residual" else kind,
        double_quant=False,
    )
    if kind == "residual":
        weight = ResidualWeight(weight)
    assert kind != "nf4" or isinstance(weight, FourBitWeight)
    kept = [(s.tensor, s.tensor.clone()) for s in weight.stored()]
    rounding = PhiloxUniform(0)
    before = weight.values(torch.empty(weight.shape, device="cuda"))
    weight.store(before.clone(), 0, rounding)
    assert all(torch.equal(tensor, was) for tensor, was in kept)
    target = before + 0.004 * torch.randn(weight.shape, device="cuda")
    total, squares = torch.zeros(24, 80, dtype=torch.float64, device="cuda"), 0.0
    for _ in range(1000):
        for tensor, was in kept:
            tensor.copy_(was)
        weight.store(target.clone(), 0, rounding)
        error = (weight.values(torch.empty_like(target)) - target).double()
        total += error
        squares = squares + error.square()
    z = float((total * target.sign()).sum() / squares.sum().sqrt())
    assert abs(z) < 5


def test_tile_noise_on_cuda_is_a_pure_function_of_its_arguments() -> None:
    first = tile_normal(1, 2, "a", 64, torch.empty(64, 128, device="cuda"))
    assert torch.equal(first, tile_normal(1, 2, "a", 64, torch.empty(64, 128, device="cuda")))
    assert not torch.equal(first, tile_normal(1, 2, "a", 128, torch.empty(64, 128, device="cuda")))
    assert GENERATORS["cuda"] == "philox-4x32-10"


def test_cuda_draws_what_a_cpu_would_by_the_same_function() -> None:
    shape = (3 << 10, 1 << 10)  # several slices
    there, here = (fill_normal(torch.empty(shape, device=device), 7).cpu() for device in ("cuda", "cpu"))
    torch.testing.assert_close(there, here, rtol=1e-5, atol=1e-5)  # libraries round logarithms otherwise
    there, here = (
        PhiloxUniform(7).fill(torch.empty(shape, device=device)).cpu() for device in ("cuda", "cpu")
    )
    assert torch.equal(there, here)
