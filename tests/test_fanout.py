"""Below the first trained block one branch is computed for all; losses are those of all branches there."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig

from hizoo_lite.base import ModelKind
from hizoo_lite.branches import Branches
from hizoo_lite.checkpoints.checkpoint import Checkpoint
from hizoo_lite.engine import fanout
from hizoo_lite.engine.chunks import Chunks
from hizoo_lite.engine.load import load
from hizoo_lite.engine.overwritten import FoldFirst, OneBranch
from hizoo_lite.engine.traversal import Traversal
from hizoo_lite.errors import StorageError
from hizoo_lite.model.build import build
from hizoo_lite.model.model import Model
from hizoo_lite.noise import normal
from hizoo_lite.plan import dry_run
from hizoo_lite.plan.inventory import Inventory
from hizoo_lite.registry import CURVATURES
from hizoo_lite.spaces.dense import Dense
from hizoo_lite.spaces.lora import LoRA
from hizoo_lite.tensors import TorchArrays
from tests.architectures import ALIBI_CONFIGS, ASKING_CONFIGS, RELATIVE_CONFIGS, TINY_CONFIGS, save_tiny
from tests.batches import tiny_task_batch

EVERY = {**TINY_CONFIGS, **ALIBI_CONFIGS, **RELATIVE_CONFIGS, **ASKING_CONFIGS}
MU = 1e-3
#: float32 products with a third of the rows are summed in other orders: as in test_branches.py.
FLOAT32_ROUNDING = 2e-5


def opened(name: str, folder: Path, kind: ModelKind | None = None, **changes: Any) -> Model:
    save_tiny(name, folder, kind=kind, **changes)
    kind = kind or EVERY[name].kind
    return load(folder, kind=kind, bits="none", compute_dtype="float32", device="cpu")


def trained_on_top(model: Model) -> dict[str, Tensor]:
    """Hang an adapter that is not zero on the last block; a direction of it."""
    space = LoRA(rank=4, train_a=True, blocks=1)
    space.attach(model, seed=0)
    for key, value in space.parameters.items():
        value.add_(normal(3, 0, key, value.shape), alpha=0.05)
    return {key: normal(5, 0, key, value.shape)[None] for key, value in space.parameters.items()}


def losses(model: Model, directions: dict[str, Tensor], rows: int = 3, **batch: Any) -> Tensor:
    made = tiny_task_batch(model.kind, rows, **batch)
    return Traversal(model).losses(made, Branches.of(), MU, directions).per_example


def folded_losses(model: Model, directions: dict[str, Tensor], rows: int = 3, **batch: Any) -> Tensor:
    """With all branches in every block."""
    before, model.folds_first = model.folds_first, True
    try:
        return losses(model, directions, rows, **batch)
    finally:
        model.folds_first = before


def rows_seen(model: Model) -> list[int]:
    """Is filled with the rows that blocks are given, a call after the other."""
    seen: list[int] = []

    def see(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"]).shape[0])

    for present in model.blocks:
        present.block[0].register_forward_pre_hook(see, with_kwargs=True)  # type: ignore[index, union-attr]
    return seen


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", EVERY)
def test_losses_are_those_of_all_branches_in_every_block(name: str, rows: int, tmp_path: Path) -> None:
    model = opened(name, tmp_path)
    directions = trained_on_top(model)
    for chunk in ("auto", 1):
        model.branch_chunk = chunk  # type: ignore[assignment]
        wanted = folded_losses(model, directions, rows)
        found = losses(model, directions, rows)
        torch.testing.assert_close(found, wanted, rtol=0, atol=FLOAT32_ROUNDING)
        # the branches differ by more; the last block of the tiny Gemma 4 hardly matters
        assert name == "gemma4" or (found[1] - found[2]).abs().max() > 5 * FLOAT32_ROUNDING


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_so_are_a_classifiers(name: str, tmp_path: Path) -> None:
    model = opened(name, tmp_path, "classifier")
    directions = trained_on_top(model)
    wanted = folded_losses(model, directions)
    torch.testing.assert_close(losses(model, directions), wanted, rtol=0, atol=FLOAT32_ROUNDING)


@pytest.mark.parametrize("name", EVERY)
def test_blocks_below_the_first_trained_one_are_given_one_branch(name: str, tmp_path: Path) -> None:
    model = opened(name, tmp_path, num_hidden_layers=4)
    directions, seen = trained_on_top(model), rows_seen(model)
    losses(model, directions)
    assert not model.folds_first
    shares = name == "gemma4"  # keys and values of all rows go from block to block
    assert seen == ([9, 9, 9, 9] if shares else [3, 3, 3, 9])


def test_what_is_behind_the_blocks_gets_all_branches_where_no_block_is_trained(tmp_path: Path) -> None:
    model = opened("bert", tmp_path, "classifier")
    directions = trained_on_top(model)
    for name, linear in model.linears.items():
        if model.block_of(name) is not None:
            linear.delta = None
    wanted, seen = folded_losses(model, directions), rows_seen(model)
    torch.testing.assert_close(losses(model, directions), wanted, rtol=0, atol=FLOAT32_ROUNDING)
    assert seen == [3, 3]


def test_a_pass_whose_points_all_differ_in_the_first_block_is_as_ever(tmp_path: Path) -> None:
    model = opened("llama", tmp_path)
    space = LoRA(blocks="all")
    space.attach(model, seed=0)
    seen = rows_seen(model)
    losses(model, {key: normal(5, 0, key, value.shape)[None] for key, value in space.parameters.items()})
    assert seen == [9, 9]


def test_padding_is_left_out_of_one_branch_too(tmp_path: Path) -> None:
    model = opened("llama", tmp_path)
    directions, padded = trained_on_top(model), {"rows": 4, "length": 16, "ends": (6, 5, 5, 3)}
    wanted = folded_losses(model, directions, **padded)
    tokens: list[int] = []
    mlp: Any = model.blocks[0].get_submodule("mlp.up_proj")
    mlp.register_forward_hook(lambda module, args, out: tokens.append(args[0].shape[:-1].numel()))
    torch.testing.assert_close(losses(model, directions, **padded), wanted, rtol=0, atol=FLOAT32_ROUNDING)
    assert sum(tokens) < 4 * 16


def test_weights_that_are_trained_in_the_top_block_leave_the_others_alike(tmp_path: Path) -> None:
    found = []
    for folds_first in (True, False):
        model = opened("llama", tmp_path)
        space = Dense(blocks=1)
        space.attach(model, seed=0)
        assert space.weights is not None
        space.weights.begin(0, 0, no_curvature(space), measured=False)
        model.folds_first, seen = folds_first, rows_seen(model)
        found.append(losses(model, {}))
        assert seen == [9 if folds_first else 3, 9]
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=FLOAT32_ROUNDING)
    assert (found[1][1] - found[1][2]).abs().max() > 5 * FLOAT32_ROUNDING


def no_curvature(space: Dense) -> Any:
    made = CURVATURES.make("none")
    assert space.weights is not None
    made.start(space.weights.shapes, TorchArrays())
    return made


@pytest.mark.parametrize("chunk", [1, "auto"])
def test_all_branches_lie_where_the_embeddings_were(chunk: int | Literal["auto"], tmp_path: Path) -> None:
    """So that there is one tensor of that size in a pass, as where all blocks have all branches."""
    model = opened("llama", tmp_path, num_hidden_layers=4)
    model.branch_chunk = chunk
    directions, places = trained_on_top(model), []
    embedding: Any = model.module.get_input_embeddings()  # type: ignore[operator]
    embedding.register_forward_hook(lambda module, args, out: places.append(out.data_ptr()))
    model.blocks[3].register_forward_pre_hook(lambda module, args: places.append(args[0].data_ptr()))
    losses(model, directions, rows=5)
    embedded, top = places
    assert embedded == top
    assert not model.reads_again


def test_a_model_that_reads_between_its_blocks_has_all_branches_from_the_first(tmp_path: Path) -> None:
    """The convolution of DeBERTa-v2-xlarge is given the embeddings and what the first block gives."""
    model = opened("deberta_v2", tmp_path, num_hidden_layers=3, conv_kernel_size=3, conv_act="gelu")
    directions = trained_on_top(model)
    model.folds_first = model.reads_again = True
    wanted = losses(model, directions)
    model.folds_first = model.reads_again = False
    for _ in range(2):
        found = losses(model, directions)
        torch.testing.assert_close(found, wanted, rtol=0, atol=FLOAT32_ROUNDING)
        assert model.folds_first


def test_hidden_states_that_change_between_blocks_are_never_those_of_one_branch(tmp_path: Path) -> None:
    """A model that adds something of all rows, which would broadcast with the one row of one branch."""
    model = opened("llama", tmp_path, num_hidden_layers=3)
    directions = trained_on_top(model)

    def add(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0] + torch.ones(args[0].shape[0], 1, 1), *args[1:])

    model.blocks[1].register_forward_pre_hook(add)
    wanted = folded_losses(model, directions, rows=1)
    assert torch.equal(losses(model, directions, rows=1), wanted)
    assert model.folds_first


def test_what_has_another_axis_in_front_is_not_taken_for_rows() -> None:
    """With one row every axis of three looks like that of the branches."""
    hidden, codes = torch.zeros(3, 4, 8), torch.arange(12.0).view(3, 4)
    state = {"branches": 3, "hidden": hidden}
    assert fanout._one_branch(torch.ones(3, 4), "mask", rows=1, **state).shape == (1, 4)
    assert fanout._one_branch(torch.ones(6, 4), "mask", rows=2, **state).shape == (2, 4)
    assert fanout._one_branch(codes, "codes", rows=2, **state) is codes
    with pytest.raises(FoldFirst, match="codes has another axis of 3"):
        fanout._one_branch(codes, "codes", rows=1, **state)


@pytest.mark.parametrize("error", [RuntimeError("sizes do not match"), IndexError("out of range")])
def test_a_block_in_which_shapes_do_not_go_together_is_given_all_branches(
    error: Exception, tmp_path: Path
) -> None:
    model = opened("llama", tmp_path)
    directions = trained_on_top(model)
    wanted = folded_losses(model, directions)

    def refuse(module: Any, args: tuple[Any, ...]) -> None:
        if args[0].shape[0] != 9:
            raise error

    model.blocks[0].block[0].register_forward_pre_hook(refuse)  # type: ignore[index, union-attr]
    assert torch.equal(losses(model, directions), wanted)
    assert model.folds_first


@pytest.mark.parametrize("error", [StorageError("a file"), RuntimeError("out of memory")])
def test_what_else_goes_wrong_in_a_block_is_no_matter_of_shapes(error: Exception, tmp_path: Path) -> None:
    model = opened("llama", tmp_path)
    directions = trained_on_top(model)

    def fail(*_: Any) -> None:
        raise error

    model.blocks[0].block[0].register_forward_pre_hook(fail)  # type: ignore[index, union-attr]
    with pytest.raises(type(error), match=str(error)):
        losses(model, directions)
    assert not model.folds_first


def test_a_block_that_gives_other_rows_is_given_all_branches(tmp_path: Path) -> None:
    model = opened("llama", tmp_path)
    directions = trained_on_top(model)
    wanted = folded_losses(model, directions)
    block = model.blocks[0].block[0]  # type: ignore[index, union-attr]
    block.register_forward_hook(lambda module, args, out: out.repeat(9 // out.shape[0], 1, 1))
    torch.testing.assert_close(losses(model, directions), wanted, rtol=0, atol=FLOAT32_ROUNDING)
    assert model.folds_first


def test_what_a_block_gives_beside_hidden_states_is_of_one_branch_too(tmp_path: Path) -> None:
    model = opened("llama", tmp_path)
    trained_on_top(model)
    model.state.set(Branches.of(), MU, {})
    model.blocks_alike = 2
    beside = torch.ones(2, 5)

    def run(args: Any, kwargs: Any) -> Any:
        return args[0] + 1, beside, None

    with model.state.laid_out(6, 4):
        out = fanout.run_for_one(model, run, (torch.zeros(6, 4, 8),), {}, is_last=False)
        assert [type(value) for value in out] == [OneBranch, OneBranch, type(None)]
        with pytest.raises(FoldFirst):
            out[1] + 1
        hidden, codes, _ = fanout.run_for_one(model, run, out[:2], {}, is_last=True)
    assert hidden.shape == (6, 4, 8)
    assert torch.equal(hidden, torch.full((6, 4, 8), 2.0))
    assert codes.shape == (6, 5)


def test_one_branch_goes_through_in_chunks_of_as_many_tokens() -> None:
    assert Chunks(2, 1).of_one_branch(16, 3) == Chunks(6, 1)
    assert Chunks(6, 1).of_one_branch(16, 3) == Chunks(16, 1)
    assert Chunks(1, 3).of_one_branch(1, 3) == Chunks(1, 1)
    assert Chunks(1, 12).of_one_branch(1, 3) == Chunks(1, 4)
    assert Chunks(1, 12).of_one_branch(2, 3) == Chunks(2, 8)


def test_a_pass_holds_no_more_than_with_all_branches_in_every_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which the planner counts on: it runs the first blocks as if all of them were trained."""
    monkeypatch.setattr(dry_run, "_BLOCKS", 4)
    save_tiny("llama", tmp_path, max_position_embeddings=1024, num_hidden_layers=4)
    inventory, config = Inventory.of(Checkpoint.open(tmp_path)), AutoConfig.from_pretrained(tmp_path)
    source = dry_run.Source(inventory, config, "causal", "nf4", False, torch.float32, "cpu")
    spaces = (LoRA(targets="q_proj,v_proj", blocks=blocks) for blocks in (1, "all"))  # type: ignore[arg-type]
    top, every = (dry_run.DryRun(source, "resident", build(config, "causal"), space) for space in spaces)
    for rows, length in ((8, 256), (2, 64), (1, 512), (3, 400)):
        wanted = dry_run.Pass(rows, length, Branches.of(), rows)
        indices_bytes = 8 * rows * length  # which tokens exist, once more, of the chunks of one branch
        assert top.run(wanted).peak_bytes <= every.run(wanted).peak_bytes + indices_bytes
    assert not top.model.folds_first
