"""One folded traversal gives what separate forwards give, on every architecture; nothing is changed by it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
import transformers
from torch import Tensor

import hizoo_lite.model.linear as linear
import hizoo_lite.spaces.lora as lora
from hizoo_lite.branches import EVALUATION, THETA, Branches, BranchState, Point
from hizoo_lite.engine.load import load
from hizoo_lite.engine.residency import Resident
from hizoo_lite.engine.traversal import Traversal
from hizoo_lite.errors import UserError
from hizoo_lite.model.linear import BranchLinear
from hizoo_lite.model.model import Model
from hizoo_lite.model.scratch import Scratch, _Made
from hizoo_lite.noise import drawn_along, normal
from hizoo_lite.spaces.lora import LoRA
from tests.architectures import ASKING_CONFIGS, RELATIVE_CONFIGS, TINY_CONFIGS, save_tiny
from tests.batches import reference_losses, tiny_task_batch

MU = 1e-3
#: float32 products of folded and separate batches are summed in other orders: a few units in the last
#: place (6e-8) of activations of order 10, over two layers, in a loss of order 5.
FLOAT32_ROUNDING = 2e-5
#: Pairs, one-sided points and both; and with offsets of their own.
#: Of the forms beside nf4, which every architecture has.
FAST = {("llama", "none"), ("gpt2", "int8"), ("bert", "none"), ("bert", "int8")}
LAYOUTS = [
    *(Branches.of(True, 1), Branches.of(False, 1), Branches.of(True, 0, 2), Branches.of(True, 1, 1)),
    Branches((Point(0, 0.5), Point(0, -0.5), Point(1, -2.0), Point(1, 2.0))),
    Branches((THETA, Point(0, 0.5), Point(0, -1.5), Point(1, 2.0))),
]


def tuned(
    model: Model, rank: int = 4, targets: str | Sequence[str] = "attention"
) -> tuple[LoRA, dict[str, Tensor]]:
    """An attached adapter in mid-training (B not zero) and two directions."""
    space = LoRA(rank=rank, targets=targets, train_a=True, blocks="all")
    space.attach(model, seed=0)
    for name, value in space.parameters.items():
        if "lora_B" in name:
            value.copy_(0.05 * normal(0, 0, "B " + name, value.shape))
    shapes = {name: p.shape for name, p in space.parameters.items()}
    return space, {n: torch.from_numpy(drawn_along(5, 0, n, shape, 2)) for n, shape in shapes.items()}


def separate_losses(
    traversal: Traversal, space: LoRA, batch, directions: dict[str, Tensor], branches: Branches
) -> Tensor:
    """Every branch evaluated on its own, with the parameters really moved."""
    clean = {name: p.clone() for name, p in space.parameters.items()}
    rows = []
    for direction, offset in branches.points:
        for name, p in space.parameters.items():
            p.copy_(clean[name] + offset * MU * directions[name][direction])
        rows.append(traversal.losses(batch).per_example[0])
    for name, p in space.parameters.items():
        p.copy_(clean[name])
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        pytest.param(name, bits, marks=[] if bits == "nf4" or (name, bits) in FAST else [pytest.mark.grid])
        for name in TINY_CONFIGS
        for bits in ("none", "nf4", "int8")
    ],
)
def test_folded_losses_equal_separate_losses(name: str, bits: str, tmp_path: Path) -> None:
    save_tiny(name, tmp_path)
    kind = TINY_CONFIGS[name].kind
    model = load(tmp_path, kind=kind, bits=bits, compute_dtype="float32", device="cpu")
    space, directions = tuned(model)
    traversal, batch = Traversal(model), tiny_task_batch(kind)
    for branches in LAYOUTS:
        folded = traversal.losses(batch, branches, MU, directions).per_example
        separate = separate_losses(traversal, space, batch, directions, branches)
        torch.testing.assert_close(folded, separate, rtol=0, atol=FLOAT32_ROUNDING)
        # the branches really differ, and by more than the rounding
        assert (folded[-1] - folded[-2]).abs().max() > 5 * FLOAT32_ROUNDING


@pytest.mark.parametrize("chunk", [1, "auto"])
@pytest.mark.parametrize("name", RELATIVE_CONFIGS)
def test_layers_that_codes_of_relative_positions_share_differ_between_branches(
    name: str, chunk: int | Literal["auto"], tmp_path: Path
) -> None:
    save_tiny(name, tmp_path)
    model = load(tmp_path, kind="masked", bits="none", compute_dtype="float32", device="cpu")
    model.branch_chunk = chunk
    attention = [n for n in model.linears if n.rpartition(".")[2].endswith(("proj", "in_proj"))]
    space, directions = tuned(model, targets=attention)
    traversal, batch = Traversal(model), tiny_task_batch("masked")
    for branches in (Branches.of(True, 1), Branches.of(False, 1)):
        folded = traversal.losses(batch, branches, MU, directions).per_example
        separate = separate_losses(traversal, space, batch, directions, branches)
        torch.testing.assert_close(folded, separate, rtol=0, atol=FLOAT32_ROUNDING)


def test_a_layer_of_relative_positions_alone_makes_what_follows_differ(tmp_path: Path) -> None:
    """Its input, which has no rows, is where the branches part."""
    save_tiny("deberta_v2_own_codes", tmp_path)
    model = load(tmp_path, kind="masked", bits="none", compute_dtype="float32", device="cpu")
    space, directions = tuned(model, targets=["pos_key_proj"])
    traversal, batch = Traversal(model), tiny_task_batch("masked")
    folded = traversal.losses(batch, Branches.of(), MU, directions).per_example
    separate = separate_losses(traversal, space, batch, directions, Branches.of())
    torch.testing.assert_close(folded, separate, rtol=0, atol=FLOAT32_ROUNDING)
    assert (folded[-1] - folded[-2]).abs().max() > 0


def test_a_layer_whose_rows_are_not_first_is_refused(tmp_path: Path) -> None:
    """Longformer's attention has its tokens first."""
    config = transformers.LongformerConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        attention_window=4, max_position_embeddings=66, pad_token_id=1,
    )  # fmt: skip
    transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    model = load(tmp_path, kind="classifier", bits="none", compute_dtype="float32", device="cpu")
    batch = tiny_task_batch("classifier")
    Traversal(model).losses(batch)
    _, directions = tuned(model)
    with pytest.raises(UserError, match=r"query is given \(12, 9, 32\), whose first axis is not that of"):
        Traversal(model).losses(batch, Branches.of(), MU, directions)


@pytest.mark.parametrize("name", ASKING_CONFIGS)
def test_heads_that_ask_for_more_than_hidden_states_are_answered(name: str, tmp_path: Path) -> None:
    """In chunks of one row, unless keys and values of all rows go from block to block (Gemma 4)."""
    plain = save_tiny(name, tmp_path)
    model = load(tmp_path, kind="causal", bits="none", compute_dtype="float32", device="cpu")
    model.branch_chunk = 1
    traversal, batch = Traversal(model), tiny_task_batch("causal")
    with torch.no_grad():
        expected = reference_losses(plain, batch)
    got = traversal.losses(batch).per_example[0]
    torch.testing.assert_close(got, expected, rtol=0, atol=FLOAT32_ROUNDING)
    space, directions = tuned(model)
    folded = traversal.losses(batch, Branches.of(), MU, directions).per_example
    separate = separate_losses(traversal, space, batch, directions, Branches.of())
    torch.testing.assert_close(folded, separate, rtol=0, atol=FLOAT32_ROUNDING)


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_losses_equal_those_of_the_plain_transformers_model(name: str, tmp_path: Path) -> None:
    plain = save_tiny(name, tmp_path)
    kind = TINY_CONFIGS[name].kind
    model = load(tmp_path, kind=kind, bits="none", compute_dtype="float32", device="cpu")
    batch = tiny_task_batch(kind)
    with torch.no_grad():
        expected = reference_losses(plain, batch)
    got = Traversal(model).losses(batch).per_example[0]
    torch.testing.assert_close(got, expected, rtol=0, atol=FLOAT32_ROUNDING)


@pytest.mark.parametrize("name", ["bert", "roberta", "llama", "gpt2"])
def test_classifier_losses_equal_plain_ones_and_its_head_is_trained(name: str, tmp_path: Path) -> None:
    plain = save_tiny(name, tmp_path, kind="classifier")
    model = load(tmp_path, kind="classifier", bits="none", compute_dtype="float32", device="cpu")
    batch, traversal = tiny_task_batch("classifier"), Traversal(model)
    with torch.no_grad():
        expected = reference_losses(plain, batch)
    torch.testing.assert_close(
        traversal.losses(batch).per_example[0], expected, rtol=0, atol=FLOAT32_ROUNDING
    )
    space, directions = tuned(model)
    assert space.head_names
    assert any(name in key for name in space.head_names for key in space.parameters)
    folded = traversal.losses(batch, Branches.of(), MU, directions).per_example
    separate = separate_losses(traversal, space, batch, directions, Branches.of())
    torch.testing.assert_close(folded, separate, rtol=0, atol=FLOAT32_ROUNDING)


def test_a_layer_with_weights_of_each_branch_is_bit_equal_to_separate_forwards(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path, kind="classifier")
    model = load(tmp_path, kind="classifier", bits="nf4", compute_dtype="float32", device="cpu")
    space, directions = tuned(model)
    layer, state = model.linears["score"], model.state
    x = normal(1, 1, "x", (3 * 7, layer.in_features))
    state.set(Branches.of(), MU, directions)
    folded = layer(x).view(3, 7, -1)
    state.set(EVALUATION, 0.0, {})
    clean = {name: p.clone() for name, p in space.parameters.items()}
    for branch, sign in enumerate((0, 1, -1)):
        for name, p in space.parameters.items():
            p.copy_(clean[name]).add_(directions[name][0], alpha=sign * MU)
        assert torch.equal(layer(x.view(3, 7, -1)[branch]), folded[branch])


@pytest.mark.parametrize("bits", ["nf4", "fp4", "int8", "none"])
def test_packed_bytes_never_change(bits: str, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    model = load(tmp_path, bits=bits, compute_dtype="bf16", device="cpu")
    _, directions = tuned(model)
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    traversal, batch = Traversal(model), tiny_task_batch("causal")
    traversal.losses(batch, Branches.of(), MU, directions)
    traversal.losses(batch)
    model.module.generate(batch.input_ids[:1], max_new_tokens=3, do_sample=False)
    after = model.module.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("name", ["gemma2", "bert", "opt"])
def test_logits_in_chunks_equal_logits_at_once(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(name, tmp_path)
    kind = TINY_CONFIGS[name].kind
    model = load(tmp_path, kind=kind, bits="none", compute_dtype="float32", device="cpu")
    batch, traversal = tiny_task_batch(kind), Traversal(model)
    at_once = traversal.losses(batch).per_example
    monkeypatch.setattr("hizoo_lite.engine.traversal.LOGITS_BYTES", 4 * 97 * 4)  # four positions a chunk
    torch.testing.assert_close(traversal.losses(batch).per_example, at_once, rtol=0, atol=FLOAT32_ROUNDING)


def test_layers_before_the_first_trainable_one_are_computed_for_one_branch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny("llama", tmp_path)
    model = load(tmp_path, bits="nf4", compute_dtype="float32", device="cpu")
    space = LoRA(rank=4, targets="model.layers.1.self_attn.v_proj", train_a=True)
    space.attach(model, seed=0)
    for name, value in space.parameters.items():
        value.add_(normal(3, 0, name, value.shape), alpha=0.05)
    directions = {name: normal(5, 0, name, p.shape)[None] for name, p in space.parameters.items()}
    traversal, batch = Traversal(model), tiny_task_batch("causal")
    separate = separate_losses(traversal, space, batch, directions, Branches.of())
    rows: dict[str, int] = {}
    plain = BranchLinear.shared_product

    def counted(layer: BranchLinear, x: Tensor, branches: Branches, *sources: Tensor | None) -> Tensor:
        rows[layer.name] = x.shape[0]
        return plain(layer, x, branches, *sources)

    monkeypatch.setattr(BranchLinear, "shared_product", counted)
    folded = traversal.losses(batch, Branches.of(), MU, directions).per_example
    torch.testing.assert_close(folded, separate, rtol=0, atol=FLOAT32_ROUNDING)
    before = [
        name for name in rows if ".layers.0." in name or ".1.self_attn.v" in name or ".1.self_attn.q" in name
    ]
    assert {rows[name] for name in before} == {1}
    after = ["model.layers.1.self_attn.o_proj", "model.layers.1.mlp.gate_proj", "lm_head"]
    assert {rows[name] for name in after} == {3}


@pytest.mark.parametrize("padded", [False, True])
def test_layers_with_the_same_input_split_it_once(
    padded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny("llama", tmp_path)
    model = load(tmp_path, bits="nf4", compute_dtype="float32", device="cpu")
    model.branch_chunk = 2
    _, directions = tuned(model)
    directions = {name: along[:1] for name, along in directions.items()}
    ends = (6, 5, 5, 3) if padded else (16, 16, 16, 16)
    batch = tiny_task_batch("causal", rows=4, length=16, ends=ends)
    split, calls = linear.split, [0]

    def counted(*given: Any) -> None:
        calls[0] += 1
        split(*given)

    monkeypatch.setattr(linear, "split", counted)
    shared = Traversal(model).losses(batch, Branches.of(), MU, directions)
    blocks, chunks = len(model.blocks), 2
    # q, k and v; o; gate and up; down. The first of all has an input that is the same in all branches
    assert calls[0] <= chunks * (4 * blocks + 1) + 1
    monkeypatch.setattr(_Made, "is_of", lambda *_: False)
    calls[0] = 0
    each = Traversal(model).losses(batch, Branches.of(), MU, directions)
    assert calls[0] >= chunks * 7 * blocks
    assert all(torch.equal(one, other) for one, other in zip(shared[:3], each[:3], strict=True))


def test_adapters_are_made_once_for_all_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny("llama", tmp_path)
    model = load(tmp_path, bits="nf4", compute_dtype="float32", device="cpu")
    _, directions = tuned(model)
    model.branch_chunk = 1
    made: list[str] = []
    plain = lora.branch_values

    def counted(value: Tensor, name: str, state: BranchState) -> Tensor:
        made.append(name)
        return plain(value, name, state)

    monkeypatch.setattr(lora, "branch_values", counted)
    traversal, batch = Traversal(model), tiny_task_batch("causal", rows=4)
    once = traversal.losses(batch, Branches.of(True, 2), MU, directions)
    assert sorted(made) == sorted(directions)
    monkeypatch.setattr(BranchState, "once", lambda self, name, make: make())
    often = traversal.losses(batch, Branches.of(True, 2), MU, directions)
    assert len(made) == 5 * len(directions)
    assert all(torch.equal(one, other) for one, other in zip(once[:3], often[:3], strict=True))


def test_operands_are_made_again_where_their_input_has_changed() -> None:
    scratch, x, seen = Scratch(), torch.ones(3), []

    def taken(source: Tensor, how: str = "a") -> Tensor:
        def fill(out: Tensor) -> None:
            seen.append(how)
            out.copy_(source)

        return scratch.made("operands", (3,), torch.float32, x.device, fill, how, source, None)

    assert taken(x).data_ptr() == taken(x).data_ptr()
    assert seen == ["a"]
    taken(x, "b")
    x[1:] += 1  # through a view
    assert taken(x, "b").tolist() == [1, 2, 2]
    assert taken(x.clone(), "b").tolist() == taken(x, "b").tolist()
    assert len(seen) == 5
    scratch.take("operands", (1,), torch.float32, x.device).fill_(9)
    assert taken(x, "b").tolist() == [1, 2, 2]
    scratch.clear()
    assert taken(x, "b").tolist() == [1, 2, 2]
    with torch.inference_mode():
        unversioned = torch.ones(3)
        for value in (1, 2):
            assert taken(unversioned.fill_(value)).tolist() == [value] * 3


def test_int8_branches_cannot_influence_each_other(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    model = load(tmp_path, bits="int8", compute_dtype="float32", device="cpu")
    layer = model.linears["model.layers.0.self_attn.q_proj"]
    x = normal(1, 1, "x", (3, 5, layer.in_features))
    model.state.set(Branches.of(), MU, {})
    alone = layer.shared_product(x, Branches.of())
    outlier = x.clone()
    outlier[1:] = 1000 * normal(1, 2, "outlier", x[1:].shape)  # LLM.int8 would pick other columns for x0
    assert torch.equal(layer.shared_product(outlier, Branches.of())[0], alone[0])


@pytest.mark.parametrize("bits", ["int8", "nf4"])
def test_fp16_products_survive_large_activations(bits: str, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    model = load(tmp_path, bits=bits, compute_dtype="fp16", device="cpu")
    layer = model.linears["model.layers.0.mlp.down_proj"]
    x = normal(1, 1, "x", (3, 5, layer.in_features))
    x[:, :, 0] = torch.tensor([1500.0, 1512.0, 1495.0])[:, None]  # an outlier channel, even part 7
    model.state.set(Branches.of(), MU, {})
    y = layer.shared_product(x, Branches.of())
    weight = layer.weight.unpack(torch.empty(layer.weight.shape))
    weight = weight if layer.weight.row_scale is None else weight * layer.weight.row_scale[:, None]
    # fp16 keeps 11 bits of operands and result; the result is of order 300
    torch.testing.assert_close(y, x @ weight.t(), rtol=5e-3, atol=0.5)


def test_the_residency_is_told_around_every_block(tmp_path: Path) -> None:
    class Recorder(Resident):
        calls: ClassVar[list[tuple[str, int]]] = []

        def acquire(self, block: int) -> None:
            self.calls.append(("acquire", block))

        def release(self, block: int) -> None:
            self.calls.append(("release", block))

    save_tiny("llama", tmp_path)
    model = load(tmp_path, bits="nf4", device="cpu")
    model.residency = Recorder()
    for _ in range(2):
        Traversal(model).losses(tiny_task_batch("causal"))
    once = [("acquire", 0), ("release", 0), ("acquire", 1), ("release", 1)]
    assert Recorder.calls == 2 * once


def test_choice_loss_is_cross_entropy_over_mean_scores(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    model = load(tmp_path, bits="none", compute_dtype="float32", device="cpu")
    batch = tiny_task_batch("causal", rows=4)
    slots = torch.arange(4)
    choice = batch._replace(slot_example=slots // 2, gold=torch.tensor([1, 2]), loss="choice")
    losses = Traversal(model).losses(choice)
    scores = losses.scores[0].view(2, 2)
    expected = torch.nn.functional.cross_entropy(scores, torch.tensor([1, 0]), reduction="none")
    torch.testing.assert_close(losses.per_example[0], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("offset", [0.0, math.nan, math.inf])
def test_behind_the_base_there_are_finite_offsets_alone(offset: float) -> None:
    with pytest.raises(ValueError, match="offsets must be finite and not 0"):
        Branches((THETA, Point(0, 1.0), Point(0, offset)))
