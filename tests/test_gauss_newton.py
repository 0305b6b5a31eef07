"""The measured curvature is d' G d of autograd's exact Gauss-Newton product, on adapters of real models.

The reference is transformers' model with PEFT's adapter in float64; J d comes from two backward passes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import peft
import pytest
import torch
import transformers
from torch import Tensor

from hizoo_lite import curvature, estimators
from hizoo_lite.base import Curvature
from hizoo_lite.batch import Batch
from hizoo_lite.branches import Branches
from hizoo_lite.engine.load import load
from hizoo_lite.engine.traversal import Traversal
from hizoo_lite.optimizers.step_size import AutoRate, FixedRate, Schedule
from hizoo_lite.spaces.lora import LoRA
from hizoo_lite.tensors import TorchArrays
from hizoo_lite.train.step import Stepper
from tests.architectures import save_tiny
from tests.batches import tiny_task_batch

MU = 1e-3
#: Of the mean over DRAWS directions. float32 logits of size 10 are spaced 1e-6; two of them differ by mu * 1.
TOLERANCE = {"float32": 0.02, "bf16": 0.1}
DRAWS = 12

CASES = {
    "llama choice": ("llama", "causal"),
    "llama answer": ("llama", "causal"),
    "gpt2 choice": ("gpt2", "causal"),
    "bert class": ("bert", "classifier"),
}


class Twin(NamedTuple):
    """The same model and adapter by other people's code, float64."""

    module: torch.nn.Module
    parameters: dict[str, Tensor]  # by our names


def make(
    case: str,
    folder: Path,
    *,
    compute: str = "float32",
    sigma: str = "none",
    **more: Any,
) -> Stepper:
    """A step on a tiny model with an adapter at B = 0."""
    name, kind = CASES[case]
    save_tiny(name, folder / "model", kind=kind)
    model = load(folder / "model", kind=kind, bits="none", compute_dtype=compute, device="cpu")
    space = LoRA(rank=4, train_a=True, blocks="all")
    space.attach(model, seed=0)
    made: Curvature = curvature.get(sigma)
    return Stepper(
        Traversal(model),
        TorchArrays(model.device),
        space,
        more.get("estimator", estimators.get("hizoo")),
        made,
        more.get("step_size", FixedRate(Schedule(peak=1e-3))),
        seed=7,
        mu=MU,
        smoothing=Schedule(peak=0.5),
    )


def make_batch(case: str) -> Batch:
    """Three examples with the loss that the case names."""
    kind = CASES[case][1]
    batch = tiny_task_batch(kind)
    if not case.endswith("choice"):
        return batch
    last = batch.attention_mask.sum(1) - 1  # two candidates of one token each, at the end of every row
    rows = torch.arange(len(last))
    return batch._replace(
        site_row=rows,
        site_position=last,
        token_site=rows.repeat_interleave(2),
        token_id=torch.tensor([11, 29]).repeat(len(last)),
        token_slot=torch.arange(2 * len(last)),
        slot_example=rows.repeat_interleave(2),
        gold=2 * rows + torch.tensor([0, 1, 1]),
        loss="choice",
    )


def make_twin(stepper: Stepper, case: str, folder: Path) -> Twin:
    """The adapter as it is now, on transformers' model."""
    stepper.space.save(folder / "adapter")
    kind = CASES[case][1]
    auto = transformers.AutoModelForSequenceClassification if kind == "classifier" else (
        transformers.AutoModelForCausalLM
    )  # fmt: skip
    plain = auto.from_pretrained(folder / "model", attn_implementation="eager")
    module = peft.PeftModel.from_pretrained(plain, folder / "adapter", is_trainable=True).eval().double()
    found = {
        name.removeprefix("base_model.model.").replace(".modules_to_save", "").replace(".default", ""): value
        for name, value in module.named_parameters()
    }
    return Twin(module, {name: found[name] for name in stepper.space.parameters})


def logits_of(twin: Twin, batch: Batch) -> Tensor:
    """What the loss is a softmax of, (distributions, outcomes): at sites, over classes, over candidates."""
    logits = twin.module(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    if batch.loss == "class":
        return logits
    at = logits[batch.site_row, batch.site_position]
    if batch.loss == "answer":
        return at
    scores = at.log_softmax(-1)[batch.token_site, batch.token_id]  # a token a slot, two slots an example
    return scores.view(-1, 2)


def exact(twin: Twin, batch: Batch, directions: dict[str, Tensor]) -> float:
    """d' G d, the mean over the examples and the directions."""
    along = len(next(iter(directions.values())))
    return (
        sum(exact_along(twin, batch, {n: d[k] for n, d in directions.items()}) for k in range(along)) / along
    )


def exact_along(twin: Twin, batch: Batch, directions: dict[str, Tensor]) -> float:
    """d' G d of one direction, the mean over the examples."""
    logits = logits_of(twin, batch)
    values = list(twin.parameters.values())
    weight = torch.zeros_like(logits, requires_grad=True)
    pulled = torch.autograd.grad(logits, values, weight, create_graph=True)
    along = sum(
        (g * directions[name].double()).sum() for name, g in zip(twin.parameters, pulled, strict=True)
    )
    [moved] = torch.autograd.grad(along, weight)
    p = logits.detach().softmax(-1)
    variance = (p * moved**2).sum(-1) - (p * moved).sum(-1) ** 2
    if batch.loss != "answer":
        return float(variance.mean())
    counts = torch.bincount(batch.token_slot)  # a site is a token's, a slot an example's
    sums = torch.zeros(len(counts), dtype=torch.float64).index_add(0, batch.token_slot, variance)
    return float((sums / counts).mean())


def directions_of(stepper: Stepper, step: int) -> dict[str, Tensor]:
    """d = Sigma^(1/2) z of a step."""
    return {name: stepper.curvature.scale(name) * z for name, z in stepper.noise(step).items()}


def measured(stepper: Stepper, batch: Batch, directions: dict[str, Tensor]) -> float:
    """The curvature that a step would take in."""
    branches = Branches(stepper.estimator.points(0))
    found = stepper.traversal.losses(batch, branches, MU, directions)
    means = found.per_example.mean(1).numpy(), found.divergences.mean(1).numpy()
    estimate = stepper.estimator.estimate(0, *means, MU)
    assert estimate.curvature is not None
    return estimate.curvature


@pytest.mark.parametrize(
    ("case", "sigma", "compute", "directions"),
    [
        *((case, "grouped", "float32", 1) for case in CASES),
        *(("llama choice", sigma, "float32", 1) for sigma in ("none", "diagonal", "factored")),
        ("bert class", "none", "bf16", 1),
        ("llama choice", "diagonal", "float32", 3),
        ("llama answer", "none", "bf16", 2),
        *(
            pytest.param(*one, marks=pytest.mark.grid)
            for one in (
                ("llama answer", "none", "bf16", 1),
                *((case, "grouped", "float32", 2) for case in ("llama choice", "llama answer", "bert class")),
                *(("llama choice", sigma, "float32", 3) for sigma in ("none", "factored")),
            )
        ),
    ],
)
def test_measured_curvature_equals_the_gauss_newton_product(
    case: str, sigma: str, compute: str, directions: int, tmp_path: Path
) -> None:
    estimator = estimators.get("hizoo", directions=directions)
    stepper = make(case, tmp_path, compute=compute, sigma=sigma, estimator=estimator)
    batch = make_batch(case)
    for trained in (False, True):  # at B = 0, where A has no effect; and after steps along both
        if trained:
            for step in range(30):
                stepper.step(step, batch)
            moved = [v for n, v in stepper.space.parameters.items() if n.endswith("lora_B.weight")]
            assert all(value.abs().max() > 1e-3 for value in moved)
        twin = make_twin(stepper, case, tmp_path)
        draws = [directions_of(stepper, step) for step in range(100, 100 + DRAWS)]
        ours = np.mean([measured(stepper, batch, d) for d in draws])
        theirs = np.mean([exact(twin, batch, d) for d in draws])
        assert ours == pytest.approx(theirs, rel=TOLERANCE[compute])
    stepper.close()


def test_every_measured_curvature_is_nonnegative_and_right_along_its_own_direction(tmp_path: Path) -> None:
    case = "llama choice"
    stepper, batch = make(case, tmp_path), make_batch(case)
    twin = make_twin(stepper, case, tmp_path)
    for step in range(DRAWS):
        directions = directions_of(stepper, step)
        value = measured(stepper, batch, directions)
        assert value >= 0
        # one direction may be all but flat: relative to the float32 rounding of logits, 1e-6 / mu, squared
        assert value == pytest.approx(exact(twin, batch, directions), rel=0.02, abs=1e-5)
    stepper.close()


def test_a_large_gradient_on_little_curvature_gets_the_rate_of_the_curvature(tmp_path: Path) -> None:
    """Confidently wrong: the gradient is as large as it can be, p (1 - p) is next to nothing.

    The second difference takes the gradient's product term of A and B for curvature: too small a rate.
    """
    case, rates = "llama choice", {}
    for source in ("predictions", "losses"):
        stepper = make(
            case,
            tmp_path / source,
            estimator=estimators.get("hizoo", curvature_from=source),
            step_size=AutoRate(kappa=0.1, descent=None),  # the bound has a test of its own
        )
        twin = make_twin(stepper, case, tmp_path / source)
        batch = make_wrong_batch(twin)
        slopes, curvatures = [], []
        for step in range(DRAWS):
            curvatures.append(exact(twin, batch, directions_of(stepper, step)))
            record = stepper.step(step, batch)
            slopes.append(record.projected_grad)
            with torch.no_grad():  # the point stays: it is the rate that is looked at
                for name, value in stepper.space.parameters.items():
                    value.copy_(twin.parameters[name])
        rates[source] = record.lr
        stepper.close()
    assert np.mean(np.square(slopes)) > 50 * np.mean(curvatures)  # a large gradient, and little curvature
    # the level is the larger of two running means, over draws that scatter as chi^2 does
    assert rates["predictions"] == pytest.approx(0.1 / np.mean(curvatures), rel=0.5)
    assert rates["losses"] < rates["predictions"] / 100


def make_wrong_batch(twin: Twin) -> Batch:
    """One example whose two candidates are the likeliest token and, as the right one, the least likely."""
    batch = make_batch("llama choice")
    ids, mask = batch.input_ids[:1], batch.attention_mask[:1]
    with torch.no_grad():
        logits = twin.module(input_ids=ids, attention_mask=mask).logits[0, batch.site_position[0]]
    zero, both = torch.zeros(1, dtype=torch.int64), torch.arange(2)
    return batch._replace(
        input_ids=ids,
        attention_mask=mask,
        site_row=zero,
        site_position=batch.site_position[:1],
        token_site=zero.repeat(2),
        token_id=torch.stack([logits.argmax(), logits.argmin()]),
        token_slot=both,
        slot_example=zero.repeat(2),
        gold=both[1:],
    )
