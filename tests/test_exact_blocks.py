"""Exact gradients inside the blocks: those of autograd through PEFT's model, in every way of running them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor
from typer.testing import CliRunner

from hizoo_lite import estimators
from hizoo_lite.branches import EVALUATION, Branches
from hizoo_lite.cli import app
from hizoo_lite.config import TrainConfig
from hizoo_lite.engine.load import load
from hizoo_lite.engine.traversal import Traversal
from hizoo_lite.errors import UserError
from hizoo_lite.model.model import Model
from hizoo_lite.run import fit
from hizoo_lite.spaces import LoRA
from hizoo_lite.spaces.lora import A_BLOCK, TOGETHER, LoRADelta
from tests.architectures import (
    ALIBI_CONFIGS,
    ASKING_CONFIGS,
    MODERNBERT,
    RELATIVE_CONFIGS,
    TINY_CONFIGS,
    save_tiny,
)
from tests.batches import reference_losses, tiny_task_batch
from tests.run_fixtures import short_run
from tests.test_exact_head import TOLERANCE, split
from tests.test_stream import checkpoint

#: Gemma 4 is refused.
MODELS = {
    **TINY_CONFIGS,
    **ALIBI_CONFIGS,
    **RELATIVE_CONFIGS,
    "doge": ASKING_CONFIGS["doge"],
    "modernbert": MODERNBERT,
}
_AUTO = {
    "causal": transformers.AutoModelForCausalLM,
    "masked": transformers.AutoModelForMaskedLM,
    "classifier": transformers.AutoModelForSequenceClassification,
}


def attached(model: Model, **options: Any) -> LoRA:
    """An adapter with a trained B, on all linear layers."""
    space = LoRA(rank=4, **{"targets": "all-linear", "exact_blocks": "all", "head": "none", **options})
    space.attach(model, seed=0)
    draw = torch.Generator().manual_seed(1)
    for value in [*space.parameters.values(), *space.exact.values()]:
        value.add_(0.05 * torch.randn(value.shape, generator=draw))
    return space


def reference(folder: Path, kind: Any, space: LoRA, batch: Any) -> dict[str, Tensor]:
    """Gradients of the losses' sum by autograd through PEFT's model, by our names."""
    space.save(folder / "adapter")
    theirs = peft.PeftModel.from_pretrained(
        _AUTO[kind].from_pretrained(folder, dtype=torch.float32), folder / "adapter", is_trainable=True
    ).eval()
    reference_losses(theirs, batch).sum().backward()
    return {
        name.removeprefix("base_model.model.").replace(".default.", "."): p.grad
        for name, p in theirs.named_parameters()
        if p.grad is not None
    }


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set")
@pytest.mark.parametrize("name", sorted(MODELS))
def test_gradients_are_those_of_autograd(name: str, tmp_path: Path) -> None:
    kind = MODELS[name].kind
    save_tiny(name, tmp_path, kind=kind)
    model = load(tmp_path, kind=kind, bits="none", compute_dtype="float32", device="cpu")
    space, batch = attached(model), tiny_task_batch(kind, rows=4)
    found = Traversal(model).losses(batch, EVALUATION, exact=space.exact)
    wanted = reference(tmp_path, kind, space, batch)
    ours = split(found.exact, space)
    assert len(ours) == 2 * len(space.target_names)
    for layer, (gradient, reach) in ours.items():
        torch.testing.assert_close(gradient.float(), wanted[layer], rtol=1e-3, atol=TOLERANCE)
        assert reach > 0 or layer.endswith(".lora_A.weight")  # which moves as B
    assert max(gradient.abs().max() for gradient, _ in ours.values()) > 1e-3


@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.parametrize("branches", [Branches.of(True, 0, 2), Branches.of(False, 1)], ids=["base", "pair"])
def test_some_blocks_are_exact_above_others_that_are_estimated(
    name: str, branches: Branches, tmp_path: Path
) -> None:
    """The lower adapters have directions, here of length zero; a classifier's graph is of all branches."""
    kind: Any = "classifier" if name == "bert" else "causal"
    save_tiny(name, tmp_path, kind=kind)
    model = load(tmp_path, kind=kind, bits="none", compute_dtype="float32", device="cpu")
    space = attached(model, blocks=2, exact_blocks=1, head="exact", train_a=True)
    batch = tiny_task_batch(kind, rows=4)
    assert {model.block_of(name) for name in space.parameters} == {0}
    directions = {n: torch.zeros(branches.directions, *p.shape) for n, p in space.parameters.items()}
    found = Traversal(model).losses(batch, branches, 1e-3, directions, space.exact)
    wanted = reference(tmp_path, kind, space, batch)
    compared = [layer for layer in split(found.exact, space) if "lora" in layer]
    assert {model.block_of(layer) for layer in compared} == {1}
    for layer in compared:
        gradient = split(found.exact, space)[layer][0]
        torch.testing.assert_close(gradient.float(), wanted[layer], rtol=1e-3, atol=TOLERANCE)


def quantized(folder: Path, bits: Any, **options: Any) -> Model:
    """A Llama of three blocks, float32 products."""
    if not (folder / "config.json").exists():
        save_tiny("llama", folder, num_hidden_layers=3)
    return load(folder, bits=bits, compute_dtype="float32", device="cpu", **options)


@pytest.mark.parametrize("bits", ["nf4", "int8"])
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_packed_weights_have_the_gradient_of_what_they_are_unpacked_to(bits: Any, tmp_path: Path) -> None:
    model = quantized(tmp_path / "model", bits)
    space, batch = attached(model), tiny_task_batch("causal", rows=4)
    found = Traversal(model).losses(batch, EVALUATION, exact=space.exact)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    for name, linear in model.linears.items():
        if model.block_of(name) is not None:
            weight = plain.get_submodule(name).weight
            linear.weight.values(weight.data)
    plain.save_pretrained(tmp_path / "unpacked")
    wanted = reference(tmp_path / "unpacked", "causal", space, batch)
    for layer, (gradient, _) in split(found.exact, space).items():
        torch.testing.assert_close(gradient.float(), wanted[layer], rtol=1e-3, atol=TOLERANCE)


def test_streamed_blocks_have_the_same_gradients_bitwise(tmp_path: Path) -> None:
    """They come back from the last one down; a second pass begins where the first one ended."""
    batch, found = tiny_task_batch("causal", rows=4), {}
    packed = checkpoint("llama", "nf4", tmp_path, num_hidden_layers=6)
    for residency in ("resident", "host", "disk"):
        model = load(packed, compute_dtype="float32", device="cpu", residency=residency)
        space = attached(model)
        traversal = Traversal(model)
        found[residency] = [traversal.losses(batch, EVALUATION, exact=space.exact).exact for _ in range(2)]
        model.residency.close()
    for one in found["resident"]:
        assert torch.equal(one, found["resident"][0])
    assert all(torch.equal(one, found["resident"][0]) for place in found.values() for one in place)


def test_what_is_asked_for_next_is_fetched_in_both_directions(tmp_path: Path) -> None:
    """Every block comes once on the way up and once on the way down, but the last one, which is there."""
    packed = checkpoint("llama", "nf4", tmp_path, num_hidden_layers=6)
    model = load(packed, compute_dtype="float32", device="cpu", residency="disk")
    space, batch = attached(model, exact_blocks=4, blocks=4), tiny_task_batch("causal", rows=4)
    traversal, fetched = Traversal(model), []
    traversal.losses(batch, EVALUATION, exact=space.exact)
    residency: Any = model.residency
    fetcher = residency.prepare()
    fetch = fetcher.fetch
    fetcher.fetch = lambda block, slot: (fetched.append(block), fetch(block, slot))
    traversal.losses(batch, EVALUATION, exact=space.exact)
    assert fetched == [1, 2, 3, 4, 5, 3, 2, 0]  # 0 was there, and 5 and 4 are when the pass comes back
    model.residency.close()


def test_chunks_change_rounding_alone(tmp_path: Path) -> None:
    found = []
    for chunk in ("auto", 1):
        model = quantized(tmp_path, "nf4")
        space = attached(model)
        model.branch_chunk = chunk
        batch = tiny_task_batch("causal", rows=4)
        found.append(Traversal(model).losses(batch, EVALUATION, exact=space.exact).exact)
    assert not torch.equal(*found)
    torch.testing.assert_close(*found, rtol=1e-4, atol=TOLERANCE)


def test_padding_changes_nothing(tmp_path: Path) -> None:
    """A row's gradient is that of the row alone, without the padding that a longer one gives it."""
    model = quantized(tmp_path, "nf4")
    space = attached(model)
    batch = tiny_task_batch("causal", rows=2, ends=[5, 12])
    ids = batch.input_ids
    whole = split(Traversal(model).losses(batch, EVALUATION, exact=space.exact).exact, space)
    alone = []
    for row, end in ((0, 5), (1, 12)):
        at = batch.token_slot == row
        sites = torch.arange(int(at.sum()))
        one = batch._replace(
            input_ids=ids[row : row + 1, :end], attention_mask=batch.attention_mask[row : row + 1, :end],
            site_row=sites * 0, site_position=batch.site_position[at], token_site=sites,
            token_id=batch.token_id[at], token_slot=sites * 0, slot_example=torch.zeros(1, dtype=torch.int64),
            gold=torch.zeros(1, dtype=torch.int64),
        )  # fmt: skip
        alone.append(split(Traversal(model).losses(one, EVALUATION, exact=space.exact).exact, space))
    for layer, (gradient, _) in whole.items():
        sums = sum(one[layer][0] for one in alone)
        torch.testing.assert_close(gradient, sums, rtol=1e-4, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["gemma4"])
def test_a_model_whose_blocks_share_more_is_refused(name: str, tmp_path: Path) -> None:
    save_tiny(name, tmp_path)
    model = load(tmp_path, bits="none", compute_dtype="float32", device="cpu")
    space, batch = attached(model), tiny_task_batch("causal", rows=4)
    with pytest.raises(UserError, match=r"--exact-blocks: gemma4_text .*; allowed for this model: 0"):
        Traversal(model).losses(batch, EVALUATION, exact=space.exact)
    assert model.boundaries is None
    assert Traversal(model).losses(batch).per_example.isfinite().all()


@pytest.mark.parametrize(
    ("exact_blocks", "blocks", "estimates"),
    [
        *((0, "auto", True), (0, "all", True), ("all", "auto", False), ("all", 2, False)),
        *((2, "auto", False), (2, 2, False), (2, 3, True), (2, "all", True)),
    ],
)
def test_an_estimator_is_asked_for_only_where_something_is_estimated(
    exact_blocks: Any, blocks: Any, estimates: bool
) -> None:
    settings = {"model": "embedded", "task": "embedded", "exact_blocks": exact_blocks, "blocks": blocks}
    config = TrainConfig(**settings)
    assert config.estimates is estimates
    assert estimators.configured(config).name == ("hizoo" if estimates else "exact")
    if estimates:
        with pytest.raises(UserError, match="lr: got 'auto', but mezo measures no curvature"):
            TrainConfig(**settings, estimator="mezo")
    else:
        assert estimators.configured(TrainConfig(**settings, estimator="mezo")).name == "exact"


def test_a_learning_rate_is_refused_where_gradients_are_exact() -> None:
    with pytest.raises(UserError, match=r"lr: got 0\.1, but exact_blocks has its own; allowed: auto"):
        TrainConfig(model="embedded", task="embedded", exact_blocks=2, lr=0.1)


@pytest.mark.parametrize("space", ["dense", "scales"])
def test_spaces_without_adapters_have_no_exact_blocks(space: str) -> None:
    with pytest.raises(UserError, match=f"exact_blocks: got 1, allowed with space {space}: 0"):
        TrainConfig(model="embedded", task="embedded", space=space, exact_blocks=1)


def test_more_exact_blocks_than_the_model_has_are_refused(tmp_path: Path) -> None:
    model = quantized(tmp_path, "nf4")
    with pytest.raises(UserError, match="--exact-blocks: got 4, allowed: all, 0 to 3, those of the model"):
        attached(model, exact_blocks=4)


def test_a_run_of_more_exact_blocks_than_a_dry_run_has_is_planned(tmp_path: Path) -> None:
    run = fit(TrainConfig(**short_run(tmp_path, exact_blocks=3, steps=1)))  # of four
    assert run.setup.plan is not None
    assert len({run.setup.model.block_of(name) for name in run.setup.space.exact}) == 3


@pytest.mark.parametrize("together", [TOGETHER, A_BLOCK])
def test_exact_blocks_share_what_the_model_may_move(
    together: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hizoo_lite.spaces.lora.TOGETHER", together)
    for exact in (1, 3):
        model = quantized(tmp_path, "nf4")
        attached(model, exact_blocks=exact)
        deltas = [linear.delta for linear in model.linears.values()]
        moved = {delta.step for delta in deltas if isinstance(delta, LoRADelta) and delta.exact[1]}
        assert moved == {min(3 * A_BLOCK, together) / exact}


@pytest.mark.parametrize("estimator", ["hizoo", "mezo"])
def test_a_learning_rate_is_that_of_the_estimated_blocks(estimator: str, tmp_path: Path) -> None:
    settings = {"exact_blocks": 1, "blocks": 3, "estimator": estimator, "lr": 1e-3, "directions": "auto"}
    run = fit(TrainConfig(**short_run(tmp_path, **settings)))
    assert run.summary["estimator"] == estimator
    assert run.setup.space.exact.keys().isdisjoint(run.setup.space.parameters)
    assert all(value.abs().max() > 0 for value in run.setup.space.parameters.values())


def test_a_plan_says_what_exact_gradients_take_where_a_model_can_have_them(tmp_path: Path) -> None:
    for name, is_there in (("llama", True), ("gemma4", False)):
        save_tiny(name, tmp_path / name)
        call = ["plan", "--model", str(tmp_path / name), "--batch-size", "2", "--max-length", "16", "--json"]
        done = CliRunner().invoke(app, [*call, "--device", "cpu"])
        assert done.exit_code == 0, done.stderr
        assert ("exact" in json.loads(done.stdout)) is is_there


def test_settings_that_nothing_is_estimated_with_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"exact_blocks": "all", "weight_decay": 0.1, "estimator": "mezo", "directions": "auto"}
    fit(TrainConfig(**short_run(tmp_path, **settings)))
    assert "so these are not used: --estimator, --weight-decay" in caplog.text
