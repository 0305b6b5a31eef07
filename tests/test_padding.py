"""Padding costs little: products take tokens that exist, evaluations and steps examples of like length."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hizoo_lite.base import ModelKind
from hizoo_lite.batch import Batch, Example, Losses
from hizoo_lite.branches import EVALUATION, Branches
from hizoo_lite.config import TrainConfig
from hizoo_lite.engine.load import load
from hizoo_lite.engine.traversal import Traversal
from hizoo_lite.model.linear import BranchLinear
from hizoo_lite.model.model import Model
from hizoo_lite.noise import drawn_along
from hizoo_lite.run import fit
from hizoo_lite.spaces import LoRA
from hizoo_lite.tasks import Encoder, batching
from hizoo_lite.tasks import get as get_task
from hizoo_lite.train.evaluate import evaluate
from hizoo_lite.train.step import Stepper, StepRecord
from tests.architectures import TINY_CONFIGS, save_tiny
from tests.batches import tiny_task_batch
from tests.run_fixtures import short_run
from tests.tasks_fixtures import word_piece

MU = 1e-3
#: Losses near 5 from sums of float32 products with other numbers of rows.
ROUNDING = 2e-5


def half_empty(kind: ModelKind) -> Batch:
    """A batch whose rows but the first end early."""
    return tiny_task_batch(kind, rows=4, length=24, ends=(24, 9, 5, 3))


def losses(model: Model, batch: Batch, branches: Branches, leave_out: bool) -> Losses:
    """Of a pass, with or without what is at padding."""
    space = LoRA(rank=4, targets="all-linear", blocks="all")
    space.attach(model, seed=0)
    shapes = {name: value.shape for name, value in space.parameters.items()}
    for name, shape in shapes.items():
        space.parameters[name].add_(torch.from_numpy(drawn_along(1, 0, name, shape, 1)[0]), alpha=0.05)
    directions = {
        name: torch.from_numpy(drawn_along(2, 0, name, shape, max(1, branches.directions)))
        for name, shape in shapes.items()
    }
    model.__dict__["leaves_out_padding"] = leave_out
    return Traversal(model).losses(batch, branches, MU, directions if branches.directions else {})


@pytest.mark.parametrize(
    ("name", "chunk"),
    [
        pytest.param(
            name,
            chunk,
            marks=[] if chunk == "auto" or name in ("llama", "gpt2", "bert") else [pytest.mark.grid],
        )
        for name in TINY_CONFIGS
        for chunk in ("auto", 1)
    ],
)
def test_losses_are_those_of_the_padded_batch(name: str, chunk: str | int, tmp_path: Path) -> None:
    save_tiny(name, tmp_path)
    kind = TINY_CONFIGS[name].kind
    model = load(tmp_path, kind=kind, bits="nf4", compute_dtype="float32", device="cpu")
    model.branch_chunk = chunk
    if not model.leaves_out_padding:
        pytest.skip("its padding reaches its tokens, or may")
    batch = half_empty(kind)
    assert batch.attention_mask.float().mean() < 7 / 8
    for branches in (EVALUATION, Branches.of(base=False), Branches.of(pairs=0, one_sided=2)):
        whole, found = (losses(model, batch, branches, leave_out) for leave_out in (False, True))
        torch.testing.assert_close(found.per_example, whole.per_example, rtol=0, atol=ROUNDING)
        torch.testing.assert_close(found.scores, whole.scores, rtol=0, atol=ROUNDING)


def test_a_chunk_of_rows_without_a_token_goes_through_as_it_is(tmp_path: Path) -> None:
    save_tiny("gpt2", tmp_path, kind="classifier")
    model = load(tmp_path, kind="classifier", bits="nf4", compute_dtype="float32", device="cpu")
    batch = tiny_task_batch("classifier", rows=4, length=24, ends=(24, 9, 0, 5))
    model.branch_chunk = 1
    branches = Branches.of(pairs=0, one_sided=2)
    whole, found = (losses(model, batch, branches, leave_out) for leave_out in (False, True))
    existing = [0, 1, 3]
    torch.testing.assert_close(
        found.per_example[:, existing], whole.per_example[:, existing], rtol=0, atol=ROUNDING
    )
    assert bool(found.per_example.isfinite().all())


def test_products_take_the_tokens_that_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny("llama", tmp_path)
    model = load(tmp_path, bits="nf4", compute_dtype="float32", device="cpu")
    tokens: dict[str, int] = {}
    through = BranchLinear.shared_product

    def counted(layer: BranchLinear, x: Tensor, branches: Branches, *sources: Tensor | None) -> Tensor:
        tokens[layer.name] = tokens.get(layer.name, 0) + x.shape[1]
        return through(layer, x, branches, *sources)

    monkeypatch.setattr(BranchLinear, "shared_product", counted)
    batch = half_empty("causal")
    Traversal(model).losses(batch)
    existing = int(batch.attention_mask.sum())
    inside = {count for name, count in tokens.items() if model.block_of(name) is not None}
    assert inside == {existing}
    assert existing < batch.attention_mask.numel() / 2


def test_only_models_that_do_not_look_at_padding_leave_it_out(tmp_path: Path) -> None:
    for name in ("llama", "bert"):
        save_tiny(name, tmp_path / name)
    bert, convolving = (load(tmp_path / "bert", kind="masked", device="cpu") for _ in range(2))
    assert load(tmp_path / "llama", device="cpu").leaves_out_padding
    assert bert.leaves_out_padding
    convolving.blocks[0].add_module("mix", torch.nn.Conv1d(8, 8, 3))
    assert not convolving.leaves_out_padding


class Lengths:
    """A model that notes the rows it is given and whose answer is the parity of their tokens."""

    write = None

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def losses(self, batch: Batch) -> Losses:
        lengths = batch.attention_mask.sum(1)
        self.seen.append(lengths.tolist())
        scores = [[1.0 - length % 2, length % 2] for length in lengths.tolist()]
        return Losses(torch.ones(1, len(lengths)), torch.tensor([scores]), torch.zeros(0, len(lengths)))


def test_an_evaluation_takes_like_lengths_together_and_keeps_the_order_of_predictions() -> None:
    texts = ["a", "a boy a man a boy", "a boy", "a man a boy a", "a man a", "a boy a man"]
    examples = [Example({"text": text}, ("terrible", "great"), 0) for text in texts]
    encoder = Encoder(word_piece(), "classifier", get_task("sst2"), 64)
    lengths = [len(encoder.encode(example, training=False).rows[0]) for example in examples]
    model = Lengths()
    found = evaluate(model, encoder, examples, 2)
    assert [n for part in model.seen for n in part] == sorted(lengths, reverse=True)
    assert found.predictions == [length % 2 for length in lengths]


def test_steps_take_like_lengths_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = short_run(tmp_path, batch_size=2, steps=5, train_examples=40, dev_examples=0, test_examples=2)
    rows = [{"text": "good " * (1 + k % 20), "label": ("good", "bad")[k // 20]} for k in range(40)]
    (tmp_path / "data/train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    seen: list[tuple[int, int]] = []
    whole = Stepper.step

    def noted(stepper: Stepper, step: int, *batches: Batch) -> StepRecord:
        seen.extend((int(b.attention_mask.sum()), b.attention_mask.size) for b in batches)
        return whole(stepper, step, *batches)

    monkeypatch.setattr(Stepper, "step", noted)
    monkeypatch.setattr(batching, "LEAST_PADDING", 0.0)
    found = {}
    for by_length in ("auto", "off"):
        fit(TrainConfig(**{**settings, "by_length": by_length, "out": str(tmp_path / by_length)}))
        found[by_length] = [sum(column) for column in zip(*seen, strict=True)]
        seen.clear()
    assert found["auto"][0] == found["off"][0]  # the same examples
    assert found["auto"][1] < found["off"][1]
