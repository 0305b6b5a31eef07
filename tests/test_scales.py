"""QZO: the scales move, the codes stay."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hizoo_lite.base import trainable
from hizoo_lite.curvature import NoCurvature
from hizoo_lite.errors import UserError
from hizoo_lite.quant import FourBitWeight, Int8Weight
from hizoo_lite.spaces import Scales, get
from hizoo_lite.spaces.scales import LEAST
from hizoo_lite.tensors import TorchArrays
from tests.architectures import save_tiny
from tests.batches import tiny_task_batch
from tests.test_dense import make_stepper
from tests.weights_reference import tiny, whole_z

BITS = ["nf4", "fp4", "int8"]


@pytest.mark.parametrize("bits", BITS)
def test_scales_take_the_step_of_their_formula_and_codes_stay(bits: str, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    model, space = tiny(tmp_path, bits), Scales()
    space.attach(model, seed=0)
    assert space.weights is not None
    buffer = "scb" if bits == "int8" else "absmax"
    weights = {part.name: part.linear.weight for part in space.weights.parts}
    codes = {name: weight.get_buffer("codes").clone() for name, weight in weights.items()}
    scales = {name: weight.get_buffer(buffer).clone() for name, weight in weights.items()}
    stepper = make_stepper(model, space, lr=1e-3, weight_decay=0.1)
    record = stepper.step(0, tiny_task_batch("causal"))
    stepper.close()
    space.weights.flush()
    for part in space.weights.parts:
        z = whole_z(part, 7, 0)
        wanted = (1 - 1e-4) * scales[part.name].double() - 1e-3 * record.projected_grad * z.double()
        got = weights[part.name].get_buffer(buffer)
        torch.testing.assert_close(got.double(), wanted.clamp(min=LEAST), rtol=1e-5, atol=1e-8)
        assert torch.equal(weights[part.name].get_buffer("codes"), codes[part.name])


@pytest.mark.parametrize("bits", BITS)
def test_no_scale_becomes_smaller_than_the_least(bits: str, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    model, space = tiny(tmp_path, bits), Scales()
    space.attach(model, seed=0)
    assert space.weights is not None
    curvature = NoCurvature()
    curvature.start(trainable(space), TorchArrays())
    space.weights.begin(0, 0, curvature, measured=False)
    space.weights.update(100.0, 0.0)
    space.weights.flush()
    for part in space.weights.parts:
        scales = part.linear.weight.stored()[1].tensor
        assert scales.min() == torch.tensor(LEAST)
        assert (scales[whole_z(part, 0, 0) > 0.1] == torch.tensor(LEAST)).all()


def test_there_is_one_scale_a_block_or_row(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    for bits in BITS:
        model, space = tiny(tmp_path, bits), Scales(targets="q_proj")
        space.attach(model, seed=0)
        weight = model.linears[space.target_names[0]].weight
        assert isinstance(weight, FourBitWeight | Int8Weight)
        count = weight.shape[0] if bits == "int8" else weight.shape[0] * weight.shape[1] // 64
        names = [f"{target}.absmax" for target in space.target_names]
        assert trainable(space) == dict.fromkeys(names, torch.Size([count]))


def test_unknown_spaces_and_options_are_refused() -> None:
    with pytest.raises(
        UserError,
        match="--space: unknown name 'full', allowed are dense, lora, lowrank, mazo, scales, small, sparse",
    ):
        get("full")
    with pytest.raises(UserError, match=r"--space scales: .*rank"):
        get("scales", rank=3)
