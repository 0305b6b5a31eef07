"""A step does what its formula says, to the parameters and to nothing else."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from hizoo_lite import curvature, estimators
from hizoo_lite.engine.load import load
from hizoo_lite.engine.traversal import Losses, Traversal
from hizoo_lite.noise import StepNoise, drawn_along, normal
from hizoo_lite.optimizers.step_size import FixedRate, Schedule
from hizoo_lite.spaces.lora import LoRA
from hizoo_lite.tensors import TorchArrays
from hizoo_lite.train.step import Stepper
from tests.architectures import save_tiny
from tests.batches import tiny_task_batch

LR, MU = 1e-3, 1e-3


def make_stepper(
    folder: Path,
    kind: str = "causal",
    estimator: str = "hizoo",
    source: str = "predictions",
    directions: int = 1,
    **options: float,
) -> Stepper:
    """A stepper on a tiny NF4 Llama with a fixed rate, both sides of its adapters trained."""
    save_tiny("llama", folder, kind=kind)
    model = load(folder, kind=kind, bits="nf4", compute_dtype="float32", device="cpu")
    space = LoRA(rank=4, train_a=True, blocks="all")
    space.attach(model, seed=0)
    for name, value in space.parameters.items():
        value.add_(normal(3, 0, name, value.shape), alpha=0.05)
    made = {"curvature_from": source, "directions": directions} if estimator == "hizoo" else {}
    return Stepper(
        Traversal(model),
        TorchArrays(model.device),
        space,
        estimators.get(estimator, **made),
        curvature.get("grouped" if estimator == "hizoo" else "none"),
        FixedRate(Schedule("constant", LR, 0, 100)),
        seed=7,
        mu=MU,
        smoothing=Schedule("constant", 0.01, 0, 100),
        **options,
    )


@pytest.mark.parametrize(
    ("estimator", "source", "forwards"),
    [("hizoo", "predictions", 2), ("hizoo", "losses", 3), ("mezo", "losses", 2)],
)
def test_the_update_is_the_projected_gradient_along_z(
    estimator: str, source: str, forwards: int, tmp_path: Path
) -> None:
    stepper = make_stepper(tmp_path, estimator=estimator, source=source)
    before = {name: p.clone() for name, p in stepper.space.parameters.items()}
    record = stepper.step(0, tiny_task_batch("causal"))
    assert record.forwards == forwards == len(record.losses)
    *_, plus, minus = record.losses
    assert record.projected_grad == pytest.approx((plus - minus) / (2 * MU), rel=1e-12)
    for name, value in stepper.space.parameters.items():
        z = normal(7, 0, name, value.shape)  # Sigma is the identity in the first step
        expected = before[name].add(z, alpha=-LR * record.projected_grad)
        assert torch.equal(value, expected)
    stepper.close()


def test_several_directions_move_along_each_of_them(tmp_path: Path) -> None:
    stepper = make_stepper(tmp_path, directions=3)
    before = {name: p.clone() for name, p in stepper.space.parameters.items()}
    record = stepper.step(0, tiny_task_batch("causal"))
    assert record.forwards == 4
    base, *others = record.losses
    assert record.coefficients == pytest.approx([(loss - base) / MU for loss in others], rel=1e-12)
    assert record.curvatures is not None
    assert min(record.curvatures) > 0
    assert record.metrics()["projected_grads"] == record.coefficients
    for name, value in stepper.space.parameters.items():
        expected = before[name]
        for z, slope in zip(drawn_along(7, 0, name, value.shape, 3), record.coefficients, strict=True):
            expected = expected.add(torch.from_numpy(z), alpha=-LR * slope)
        assert torch.equal(value, expected)
    stepper.close()


def test_scalars_equal_autograd_on_a_language_model(tmp_path: Path) -> None:
    import peft
    import transformers

    stepper = make_stepper(tmp_path / "model", source="losses")
    stepper.space.save(tmp_path / "adapter")
    model, batch = stepper.traversal.model, tiny_task_batch("causal")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager")
    for name, layer in model.linears.items():
        unpacked = layer.weight.unpack(torch.empty(layer.weight.shape))
        plain.get_submodule(name).weight.data.copy_(unpacked)
    tuned = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter", is_trainable=True).eval().double()
    named = {
        name.removeprefix("base_model.model.").replace(".default", ""): p
        for name, p in tuned.named_parameters()
        if p.requires_grad
    }
    logits = tuned(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.log_softmax(-1)
    picked = logits[batch.site_row, batch.site_position, batch.token_id]
    per_row = torch.zeros(batch.examples, dtype=torch.float64).index_add(0, batch.token_slot, picked)
    loss = -(per_row / torch.bincount(batch.token_slot)).mean()
    values = list(named.values())
    z = [normal(7, 0, name, p.shape).double() for name, p in named.items()]
    gradient = torch.autograd.grad(loss, values, create_graph=True)
    slope = sum((g * d).sum() for g, d in zip(gradient, z, strict=True))
    hessian_z = torch.autograd.grad(slope, values)
    bend = sum((h * d).sum() for h, d in zip(hessian_z, z, strict=True))
    record = stepper.step(0, batch)
    stepper.close()
    # transformers' norms round to float32 even in the float64 twin; mu^2 terms are of order 1e-4
    assert record.projected_grad == pytest.approx(slope.item(), rel=1e-3)
    assert record.curvature is not None
    assert record.curvature == pytest.approx(bend.item(), rel=3e-2)


def test_a_step_with_a_loss_that_is_not_finite_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stepper = make_stepper(tmp_path)
    before = {name: p.clone() for name, p in stepper.space.parameters.items()}
    state = {name: t.clone() for name, t in stepper.curvature.state_dict().items()}
    bad = Losses(torch.tensor([[math.nan], [1.0]], dtype=torch.float64), torch.zeros(2, 1), torch.ones(1, 1))
    monkeypatch.setattr(stepper.traversal, "losses", lambda *_: bad)
    record = stepper.step(0, tiny_task_batch("causal"))
    stepper.close()
    assert record.skipped
    assert record.lr == 0.0
    assert all(torch.equal(before[name], p) for name, p in stepper.space.parameters.items())
    assert all(torch.equal(state[name], t) for name, t in stepper.curvature.state_dict().items())


def test_weight_decay_skips_biases_and_norms(tmp_path: Path) -> None:
    save_tiny("bert", tmp_path / "bert", kind="classifier")
    batch = tiny_task_batch("classifier")
    moved = {}
    for decay in (0.0, 0.5):
        model = load(tmp_path / "bert", kind="classifier", bits="nf4", compute_dtype="float32", device="cpu")
        space = LoRA(rank=4)
        space.attach(model, seed=0)
        stepper = Stepper(
            Traversal(model), TorchArrays(model.device), space, estimators.get("mezo"), curvature.get("none"),
            FixedRate(Schedule("constant", LR, 0, 100)), seed=7, mu=MU,
            smoothing=Schedule("constant", 0.01, 0, 100), weight_decay=decay,
        )  # fmt: skip
        start = {name: p.clone() for name, p in space.parameters.items()}
        stepper.step(0, batch)
        stepper.close()
        moved[decay] = (start, {name: p.clone() for name, p in space.parameters.items()})
    start, plain = moved[0.0]
    _, decayed = moved[0.5]
    for name in plain:
        expected = plain[name] if name.endswith("bias") else plain[name] - LR * 0.5 * start[name]
        # the same two float32 operations in another order
        torch.testing.assert_close(decayed[name], expected, rtol=1e-6, atol=1e-7)
    assert any(name.endswith("bias") for name in plain)


def test_noise_is_a_pure_function_of_seed_step_and_name() -> None:
    shapes = {"a": torch.Size([3, 5]), "b": torch.Size([7])}
    noise = StepNoise(11, shapes, TorchArrays())
    drawn = [noise(step) for step in (0, 1, 5, 1)]  # ahead, out of order, and again
    noise.close()
    for step, z in zip((0, 1, 5, 1), drawn, strict=True):
        assert all(torch.equal(z[name][0], normal(11, step, name, shape)) for name, shape in shapes.items())
    assert not torch.equal(drawn[0]["a"], drawn[1]["a"])
    several = StepNoise(11, shapes, TorchArrays(), directions=2)
    [(first, second), again] = several(3)["a"], several(3)["a"]
    several.close()
    assert torch.equal(first, normal(11, 3, "a", [3, 5]))  # as where there is one
    assert not torch.equal(first, second)
    assert torch.equal(second, again[1])
    assert not torch.equal(normal(11, 0, "a", [7]), normal(11, 0, "b", [7]))
    assert not torch.equal(normal(11, 0, "a", [7]), normal(12, 0, "a", [7]))


def test_noise_is_standard_normal() -> None:
    z = normal(0, 0, "many", (1000, 1000)).double()
    # a million draws: four standard errors of mean, variance and fourth moment
    assert abs(z.mean().item()) < 4e-3
    assert abs(z.var().item() - 1) < 4 * math.sqrt(2e-6)
    assert abs((z**4).mean().item() - 3) < 4 * math.sqrt(96e-6)
