"""Heads with exact gradients: the same as autograd's through the whole model, resumed, saved and merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

import hizoo_lite as hz
from hizoo_lite.branches import Branches
from hizoo_lite.config import TrainConfig
from hizoo_lite.engine import traversal
from hizoo_lite.engine.load import load
from hizoo_lite.engine.traversal import Traversal
from hizoo_lite.export.merged import prepare
from hizoo_lite.model.model import Model
from hizoo_lite.optimizers.exact import REACH, ExactAdam
from hizoo_lite.run import fit
from hizoo_lite.spaces import LoRA
from hizoo_lite.tasks import Encoder
from hizoo_lite.tensors import TorchArrays
from hizoo_lite.train import journal
from hizoo_lite.train.replay import replay
from tests.architectures import save_tiny
from tests.batches import tiny_task_batch
from tests.run_fixtures import short_run, stories

LABELS = [7, 11, 30]
#: A merged model's weights are not quantized again, and its products are in float32, as the run's.
AS_IT_IS = {"bits": "none", "compute_dtype": "float32", "device": "cpu", "test_examples": 6}
#: float32 products and sums in another order, of gradients of size 1e-2 to 1.
TOLERANCE = 1e-5


def labelled(kind: str, rows: int = 4) -> Any:
    """A batch whose loss is a choice among three tokens at one place, for causal and masked models."""
    batch = tiny_task_batch(kind, rows=rows)
    if kind == "classifier":
        return batch
    examples, count = rows, len(LABELS)
    each = torch.arange(examples).repeat_interleave(count)
    return batch._replace(
        site_row=torch.arange(examples),
        site_position=batch.attention_mask.sum(1) - 1,
        token_site=each,
        token_id=torch.tensor(LABELS).repeat(examples),
        token_slot=torch.arange(examples * count),
        slot_example=each,
        gold=torch.arange(examples) * count + torch.arange(examples) % count,
        loss="choice",
    )


def attached(model: Model) -> LoRA:
    """An adapter with a trained B and with rows for labels that are not at zero."""
    space = LoRA(rank=4, head="exact")
    space.attach(model, seed=0, labels=LABELS)
    draw = torch.Generator().manual_seed(1)
    for value in [*space.parameters.values(), *space.exact.values()]:
        value.add_(0.05 * torch.randn(value.shape, generator=draw))
    return space


def split(flat: Tensor, space: LoRA) -> dict[str, tuple[Tensor, float]]:
    """`Losses.exact` as gradients and reaches by name."""
    found, begin = {}, 0
    for name in sorted(space.exact):
        shape = space.exact[name].shape
        end = begin + shape.numel()
        found[name] = (flat[begin:end].view(shape), float(flat[end] / flat[end + 1]))
        begin = end + 2
    assert begin == len(flat)
    return found


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set")
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "bert"])
@pytest.mark.parametrize("branches", [Branches.of(True, 0, 2), Branches.of(False, 1)], ids=["base", "pair"])
def test_rows_for_labels_have_the_gradient_of_autograd(name: str, branches: Branches, tmp_path: Path) -> None:
    """gemma2 caps its logits after the head; BERT has layers between its trunk and the matrix."""
    kind = "masked" if name == "bert" else "causal"
    save_tiny(name, tmp_path, kind=kind)
    model = load(tmp_path, kind=kind, bits="none", compute_dtype="float32", device="cpu")
    space, batch = attached(model), labelled(kind)
    directions = {n: torch.zeros(branches.directions, *p.shape) for n, p in space.parameters.items()}
    found = Traversal(model).losses(batch, branches, 1e-3, directions, space.exact)
    space.save(tmp_path / "adapter")
    auto = transformers.AutoModelForMaskedLM if kind == "masked" else transformers.AutoModelForCausalLM
    theirs = peft.PeftModel.from_pretrained(
        auto.from_pretrained(tmp_path, dtype=torch.float32), tmp_path / "adapter", is_trainable=True
    ).eval()
    logits = theirs(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    at = logits[batch.site_row, batch.site_position].double().log_softmax(-1)[:, LABELS]
    loss = F.cross_entropy(at, torch.arange(batch.examples) % len(LABELS), reduction="sum")
    loss.backward()
    (name_, (ours, reach)) = next(iter(split(found.exact, space).items()))
    wanted = dict(theirs.named_parameters())[
        f"base_model.model.{name_.removesuffix('.weight')}.default.weight"
    ]
    assert wanted.grad is not None
    torch.testing.assert_close(ours.float(), wanted.grad[: len(LABELS)], rtol=1e-4, atol=TOLERANCE)
    assert ours.abs().max() > 1e-3
    assert torch.equal(wanted.grad[len(LABELS) :], torch.zeros_like(wanted.grad[len(LABELS) :]))
    assert reach > 0
    torch.testing.assert_close(found.per_example[0].sum(), loss.detach(), rtol=1e-5, atol=TOLERANCE)


def test_a_classifiers_head_has_the_gradient_of_autograd(tmp_path: Path) -> None:
    save_tiny("bert", tmp_path, kind="classifier")
    model = load(tmp_path, kind="classifier", bits="none", compute_dtype="float32", device="cpu")
    space, batch = attached(model), labelled("classifier")
    assert not any("lora" not in name for name in space.parameters)
    directions = {n: torch.zeros(2, *p.shape) for n, p in space.parameters.items()}
    found = Traversal(model).losses(batch, Branches.of(True, 0, 2), 1e-3, directions, space.exact)
    space.save(tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(
        transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float32),
        tmp_path / "adapter",
        is_trainable=True,
    ).eval()
    logits = theirs(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    F.cross_entropy(logits.double(), batch.gold, reduction="sum").backward()
    parameters = dict(theirs.named_parameters())
    for name, (ours, reach) in split(found.exact, space).items():
        layer, _, leaf = name.rpartition(".")
        (wanted,) = (
            p.grad for n, p in parameters.items() if n.endswith(f"{layer}.modules_to_save.default.{leaf}")
        )
        assert wanted is not None
        torch.testing.assert_close(ours.float(), wanted, rtol=1e-4, atol=TOLERANCE)
        assert reach > 0


def test_nothing_else_changes_where_a_head_is_exact(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    model = load(tmp_path, bits="nf4", compute_dtype="float32", device="cpu")
    space, batch = attached(model), labelled("causal")
    directions = {n: torch.randn(2, *p.shape) for n, p in space.parameters.items()}
    branches = Branches.of(True, 0, 2)
    with_it = Traversal(model).losses(batch, branches, 1e-3, directions, space.exact)
    without = Traversal(model).losses(batch, branches, 1e-3, directions)
    assert without.exact is None
    assert all(torch.equal(one, other) for one, other in zip(with_it[:3], without[:3], strict=True))
    assert not any(value.requires_grad for value in space.exact.values())


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_reach_is_that_of_the_batch_whatever_the_chunks(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = "masked" if name == "bert" else "causal"
    save_tiny(name, tmp_path, kind=kind)
    model = load(tmp_path, kind=kind, bits="none", compute_dtype="float32", device="cpu")
    space, batch = attached(model), labelled(kind, rows=6)
    directions = {n: torch.zeros(1, *p.shape) for n, p in space.parameters.items()}
    found = []
    for limit in (traversal.LOGITS_BYTES, 1):  # in one chunk, and site by site
        monkeypatch.setattr(traversal, "LOGITS_BYTES", limit)
        losses = Traversal(model).losses(batch, Branches.of(False, 1), 1e-3, directions, space.exact)
        found.append(losses.exact)
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=TOLERANCE)
    assert found[0][-1] == 2 * 6  # both points of a pair, at every site


def test_a_reach_is_of_the_places_that_a_classifier_reads(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path, kind="classifier")
    model = load(tmp_path, kind="classifier", bits="none", compute_dtype="float32", device="cpu")
    space, batch = attached(model), labelled("classifier")
    pads = torch.zeros(batch.examples, 5, dtype=torch.int64)
    more = {n: torch.cat([getattr(batch, n), pads], 1) for n in ("input_ids", "attention_mask")}
    directions = {n: torch.zeros(2, *p.shape) for n, p in space.parameters.items()}
    short, long = (
        Traversal(model).losses(one, Branches.of(True, 0, 2), 1e-3, directions, space.exact).exact
        for one in (batch, batch._replace(**more))
    )
    torch.testing.assert_close(short, long, rtol=1e-5, atol=TOLERANCE)
    assert short[-1] == batch.examples


def test_a_step_moves_an_output_by_no_more_than_its_reach() -> None:
    draw = torch.Generator().manual_seed(0)
    x, weight = torch.randn(64, 32, generator=draw), torch.zeros(3, 32)
    head = ExactAdam({"w": weight}, TorchArrays())
    gradient = torch.randn(3, 32, generator=draw)
    flat = torch.cat([gradient.flatten(), x.abs().sum(1).mean().view(1), torch.ones(1)])
    head.update(flat.numpy().astype("<f4").tobytes(), 0.5)
    moved = (x @ weight.t()).abs()
    largest = 0.5 * REACH * x.abs().sum(1).max() / x.abs().sum(1).mean()
    assert 0.05 < moved.max() <= largest * (1 + 1e-5)
    assert torch.equal(weight.sign(), -gradient.sign())


def test_both_halves_of_all_adapters_move_at_the_rate_of_the_first_step() -> None:
    """Adam's first steps are of the size of its rate, whatever the gradients are."""
    names = [f"{layer}.lora_{half}.weight" for layer in ("low", "top") for half in "AB"]
    values = {name: torch.zeros(2, 3) for name in [*names, "head.weight"]}
    adam = ExactAdam(values, TorchArrays())

    def step(reaches: dict[str, float], optimizer: ExactAdam) -> dict[str, float]:
        before = {name: value.clone() for name, value in values.items()}
        found = [[1.0] * 6 + [reaches.get(name, 0.0), float(name in reaches)] for name in sorted(values)]
        optimizer.update(np.array(found, "<f4").tobytes(), 1.0)
        return {name: float((before[name] - value).max()) for name, value in values.items()}

    first = {"low.lora_B.weight": 10.0, "top.lora_B.weight": 30.0, "head.weight": 50.0}
    moved = step(first, adam)
    assert all(moved[name] == pytest.approx(1 / 20, rel=1e-5) for name in names)
    assert moved["head.weight"] == pytest.approx(1 / 50, rel=1e-5)
    resumed = ExactAdam(values, TorchArrays())
    resumed.load_state_dict(adam.state_dict())
    for optimizer in (adam, resumed):
        moved = step({name: 4 * reach for name, reach in first.items()}, optimizer)
        assert all(moved[name] == pytest.approx(1 / 20, rel=1e-5) for name in names)
        assert moved["head.weight"] == pytest.approx(1 / 200, rel=1e-5)


def test_a_gradient_of_adapters_that_is_much_longer_than_usual_is_shortened() -> None:
    """One among others of length 1: it moves them as one of length 2 does, and the steps behind it go on."""
    draw = np.random.default_rng(0)
    usual = [direction / np.linalg.norm(direction) for direction in draw.normal(size=(12, 12))]
    names = ["low.lora_A.weight", "low.lora_B.weight", "score.weight"]

    def moved(lengths: list[float], resume_at: int = -1) -> dict[str, torch.Tensor]:
        values = {name: torch.zeros(2, 3) for name in names}
        adam = ExactAdam(values, TorchArrays())
        for number, (direction, length) in enumerate(zip(usual, lengths, strict=False)):
            if number == resume_at:
                state, adam = adam.state_dict(), ExactAdam(values, TorchArrays())
                adam.load_state_dict(state)
            a, b = np.split(direction * length, 2)
            parts = [[*a, 0, 0], [*b, 4.0, 1.0], [*(a / length), 4.0, 1.0]]
            adam.update(np.array(parts, "<f4").tobytes(), 1.0)
        return values

    plain = [1.0] * 5
    for length, same_as in ((1.9, 1.9), (50.0, 2.0), (1e6, 2.0)):
        found, wanted = moved([*plain, length, 1.0, 1.0]), moved([*plain, same_as, 1.0, 1.0])
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-8)  # float32 sums of a few steps
    assert not torch.allclose(moved([*plain, 1.9])[names[0]], moved([*plain, 1.0])[names[0]])
    resumed, whole = (moved([*plain, 50.0, 3.0, 1.0], at) for at in (6, -1))
    assert all(torch.equal(resumed[name], whole[name]) for name in names)
    none = moved([1e-30, 1.0])  # squares that vanish are no length
    assert all(value.isfinite().all() for value in none.values())


def test_a_run_with_rows_for_labels_is_resumed_and_replayed_bitwise(tmp_path: Path) -> None:
    settings = short_run(tmp_path, lr="auto", curvature="grouped", save_every=2)
    whole = fit(TrainConfig(**{**settings, "out": str(tmp_path / "whole")}))
    fit(TrainConfig(**{**settings, "steps": 3}))
    resumed = fit(TrainConfig(**{**settings, "resume": True}))
    files = [(r.folder / "adapter/adapter_model.safetensors").read_bytes() for r in (whole, resumed)]
    assert files[0] == files[1]
    assert any("lora_A" in name and value.abs().max() > 0 for name, value in whole.setup.space.exact.items())
    found = replay(resumed.folder, 5)
    assert found.differs == []
    records = journal.read(whole.folder / "journal.bin")
    assert {len(record.exact) for record in records} == {4 * whole.setup.stepper.head.count}


def test_a_run_that_was_begun_without_rows_goes_on_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = short_run(tmp_path, lr=0.01, save_every=2)
    with monkeypatch.context() as patch:  # as where answers have more tokens than an adapter had rows for
        patch.setattr(Encoder, "label_tokens", lambda *given: None)
        whole = fit(TrainConfig(**{**settings, "out": str(tmp_path / "whole")}))
        fit(TrainConfig(**{**settings, "steps": 3}))
    resumed = fit(TrainConfig(**{**settings, "resume": True}))
    files = [(r.folder / "adapter/adapter_model.safetensors").read_bytes() for r in (whole, resumed)]
    assert files[0] == files[1]


def test_a_head_that_is_estimated_has_no_rows_and_is_as_before(tmp_path: Path) -> None:
    run = fit(TrainConfig(**short_run(tmp_path, head="estimated")))
    assert run.setup.space.exact == {}
    assert not any("head" in name for name in run.setup.space.target_names)
    run = fit(TrainConfig(**short_run(tmp_path / "b", model=stories(), kind="classifier", head="estimated")))
    assert any("lora" not in name for name in run.setup.space.parameters)


def test_saved_rows_are_put_back(tmp_path: Path) -> None:
    run = fit(TrainConfig(**short_run(tmp_path, lr="auto")))
    again = hz.evaluate(run.folder)
    assert again.loss == pytest.approx(run.summary["loss_after"], abs=1e-6)


def test_more_labels_than_a_rank_has_rows_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = fit(TrainConfig(**short_run(tmp_path, rank=1, steps=1)))
    assert run.setup.space.exact == {}
    assert caplog.text.count("answers begin with 2 tokens, an adapter of --rank 1") == 1  # a plan is silent


def test_a_tied_masked_model_is_merged_with_its_bias(tmp_path: Path) -> None:
    """What is tied beside the head's matrix is written too: nothing is tied any more."""
    base = save_tiny("bert", tmp_path / "base", kind="masked", tie_word_embeddings=True)
    bias = base.cls.predictions.bias
    model = load(tmp_path / "base", kind="masked", bits="none", compute_dtype="float32", device="cpu")
    space, batch = attached(model), labelled("masked")
    space.save(tmp_path / "adapter")
    prepare(
        tmp_path / "adapter", tmp_path / "merged", model=tmp_path / "base", base_bits="none", dtype="float32"
    ).run()
    module = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "merged")
    assert bias.abs().sum() > 0
    torch.testing.assert_close(module.cls.predictions.decoder.bias.data, bias.data, rtol=0, atol=0)
    again = load(tmp_path / "merged", kind="masked", bits="none", compute_dtype="float32", device="cpu")
    ours, theirs = (Traversal(m).losses(batch).per_example for m in (model, again))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)


def test_the_card_says_how_to_merge_rows_of_a_tied_head(tmp_path: Path) -> None:
    run = fit(TrainConfig(**short_run(tmp_path, lr="auto")))
    card = (run.export_peft(tmp_path / "peft") / "README.md").read_text()
    assert "`merge_and_unload` would change both" in card
    without = fit(TrainConfig(**short_run(tmp_path / "b", head="estimated")))
    assert "merge_and_unload" not in (without.export_peft(tmp_path / "other") / "README.md").read_text()
    merged = run.export_merged(tmp_path / "merged", dtype="float32")
    assert hz.evaluate(run.folder).loss == pytest.approx(
        hz.evaluate(merged, task=run.setup.config.task, data=run.setup.config.data, **AS_IT_IS).loss, abs=1e-5
    )
    module = transformers.AutoModelForCausalLM.from_pretrained(merged)
    assert module.lm_head.weight is not module.model.embed_tokens.weight
