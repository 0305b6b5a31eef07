"""Streaming: a block may be anywhere while it does not run, and no loss depends on where."""

from __future__ import annotations

import itertools
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BitsAndBytesConfig
from typer.testing import CliRunner

from hizoo_lite.branches import Branches
from hizoo_lite.cli import app
from hizoo_lite.config import TrainConfig
from hizoo_lite.engine import chunks
from hizoo_lite.engine.block import each_block
from hizoo_lite.engine.chunks import LEAST_SLICE, plan_chunks
from hizoo_lite.engine.layout import layouts
from hizoo_lite.engine.load import load
from hizoo_lite.engine.overwritten import Overwritten
from hizoo_lite.engine.residency import Streamed, spread
from hizoo_lite.engine.traversal import Traversal
from hizoo_lite.errors import BudgetError, StorageError, UserError
from hizoo_lite.export.quantize import Quantization
from hizoo_lite.model.kinds import model_path
from hizoo_lite.model.model import Model
from hizoo_lite.model.offloaded import OffloadedWeight
from hizoo_lite.noise import normal
from hizoo_lite.run import fit
from hizoo_lite.spaces.dense import Dense
from hizoo_lite.spaces.lora import LoRA
from hizoo_lite.train.progress import Progress
from hizoo_lite.train.saved import attach_adapter
from hizoo_lite.train.step import StepRecord
from tests.architectures import ALIBI_CONFIGS, RELATIVE_CONFIGS, TINY_CONFIGS, save_tiny
from tests.batches import reference_losses, tiny_task_batch
from tests.run_fixtures import short_run

MU = 1e-3
ALL = sorted(TINY_CONFIGS)
EVERY = {**TINY_CONFIGS, **ALIBI_CONFIGS, **RELATIVE_CONFIGS}
KINDS = {name: tiny.kind for name, tiny in EVERY.items()}
#: Of the forms beside nf4, which every architecture has.
FAST = {("llama", "int8"), ("gpt2", "fp4"), ("gpt2", "int8"), ("bert", "fp4")}


def checkpoint(
    name: str, bits: Any, folder: Path, dtype: torch.dtype = torch.float32, **changes: Any
) -> Path:
    """A block-sharded quantized checkpoint of a tiny random model; in its own dtype for "none"."""
    save_tiny(name, folder / "source", dtype=dtype, **changes)
    if bits == "none":
        return folder / "source"
    Quantization(folder / "source", folder / bits, kind=KINDS[name], bits=bits).run()
    return folder / bits


def open_model(folder: Path, name: str, residency: str, **options: Any) -> Model:
    options = {"compute_dtype": "float32", "device": "cpu", **options}
    return load(folder, kind=KINDS[name], residency=residency, **options)


def step_losses(model: Model, name: str, rows: int = 3, length: int = 12) -> torch.Tensor:
    """Losses of a step's three branches with a LoRA that is not zero, (3, examples) float64."""
    space = LoRA(rank=4, targets="all-linear", train_a=True, blocks="all")
    space.attach(model, seed=0)
    for key, value in space.parameters.items():
        value.add_(normal(3, 0, key, value.shape).to(value.device), alpha=0.05)
    directions = {k: normal(5, 0, k, p.shape)[None].to(p.device) for k, p in space.parameters.items()}
    batch = tiny_task_batch(KINDS[name], rows, length)
    return Traversal(model).losses(batch, Branches.of(), MU, directions).per_example


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        pytest.param(name, bits, marks=[] if bits == "nf4" or (name, bits) in FAST else [pytest.mark.grid])
        for name in ALL
        for bits in ("nf4", "fp4", "int8")
    ],
)
def test_streamed_losses_equal_resident_losses_bitwise(name: str, bits: str, tmp_path: Path) -> None:
    folder = checkpoint(name, bits, tmp_path)
    wanted = step_losses(open_model(folder, name, "resident"), name)
    assert torch.isfinite(wanted).all()
    for where in ("disk", "host"):
        model = open_model(folder, name, where)
        assert isinstance(model.residency, Streamed)
        first, second = step_losses(model, name), step_losses(model, name)
        assert torch.equal(first, wanted), where
        assert torch.equal(second, wanted), where
        model.residency.close()


@pytest.mark.parametrize("where", ["disk", "host"])
def test_16_bit_blocks_stream_too(where: str, tmp_path: Path) -> None:
    folder = checkpoint("llama", "none", tmp_path, torch.bfloat16)
    wanted = step_losses(open_model(folder, "llama", "resident", bits="none"), "llama")
    model = open_model(folder, "llama", where, bits="none")
    assert torch.equal(step_losses(model, "llama"), wanted)


def test_one_block_at_a_time_gives_the_same_losses(tmp_path: Path) -> None:
    folder = deep(tmp_path)
    wanted = step_losses(open_model(folder, "llama", "resident"), "llama")
    model = open_model(folder, "llama", "disk")
    assert isinstance(model.residency, Streamed)
    model.residency.slots = 1
    for _ in range(2):
        assert torch.equal(step_losses(model, "llama"), wanted)
    largest_bytes = max(layout.nbytes for layout in layouts(model))
    assert model.residency.slot_bytes == largest_bytes


def test_any_prequantized_checkpoint_streams_without_shards_by_block(tmp_path: Path) -> None:
    """As transformers saves it: one file, tensors in its own order."""
    reference = save_tiny("llama", tmp_path / "source")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    saved = type(reference).from_pretrained(tmp_path / "source", quantization_config=config, device_map="cpu")
    saved.save_pretrained(tmp_path / "theirs")
    wanted = step_losses(open_model(tmp_path / "theirs", "llama", "resident"), "llama")
    assert torch.equal(step_losses(open_model(tmp_path / "theirs", "llama", "disk"), "llama"), wanted)


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        pytest.param(name, rows, marks=[] if rows == 1 + i % 2 else [pytest.mark.grid])
        for i, name in enumerate((*ALL, *ALIBI_CONFIGS))
        for rows in (1, 2)
    ],
)
def test_losses_depend_on_the_chunking_by_rounding_alone(name: str, rows: int, tmp_path: Path) -> None:
    save_tiny(name, tmp_path)
    found = []
    for chunk in (5, rows):
        model = open_model(tmp_path, name, "resident", bits="nf4")
        model.branch_chunk = chunk
        found.append(step_losses(model, name, rows=5))
    # products with fewer rows may sum in another order: a few units in the last place of float32
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", EVERY)
def test_blocks_in_chunks_write_over_their_input(name: str, tmp_path: Path) -> None:
    save_tiny(name, tmp_path)
    model = open_model(tmp_path, name, "resident", bits="nf4")
    model.branch_chunk, inputs = 1, []
    for block in model.blocks:
        block.register_forward_hook(lambda module, given, out: inputs.append(type(given[0])))
    step_losses(model, name, rows=3)
    assert inputs == [Overwritten] * len(model.blocks)
    assert not model.reads_again


def test_an_input_that_is_read_after_its_block_is_not_overwritten(tmp_path: Path) -> None:
    """The convolution of DeBERTa-v2-xlarge; a pass that is no traversal's never overwrites anything."""
    plain = save_tiny("deberta_v2", tmp_path, conv_kernel_size=3, conv_act="gelu")
    batch = tiny_task_batch("masked", rows=5)
    model = load(tmp_path, kind="masked", bits="none", compute_dtype="float32", device="cpu")
    model.branch_chunk = 1
    with torch.no_grad():
        wanted = reference_losses(plain, batch)
        logits = plain(input_ids=batch.input_ids).logits
        torch.testing.assert_close(model.module(input_ids=batch.input_ids).logits, logits)
    for _ in range(2):
        got = Traversal(model).losses(batch).per_example[0]
        torch.testing.assert_close(got, wanted, rtol=0, atol=2e-5)
        assert model.reads_again


def test_auto_chunks_hold_a_plain_forward_of_the_batch() -> None:
    def plan(rows: int, length: int, branches: int, wanted: Any = "auto") -> tuple[int, int]:
        return plan_chunks(wanted, rows, length, branches, "cpu")

    assert plan(16, 256, 3) == (2, 1)  # all branches of all rows lie between the blocks: less inside of them
    assert plan(16, 256, 1) == (16, 1)
    assert plan(16, 32, 3) == (6, 1)  # 6 * 3 * 32 tokens: smaller chunks only unpack the weights more often
    assert plan(1, 2048, 3) == (1, 3)  # one row cannot be cut, its MLP can
    assert plan(1, 2048, 1) == (1, 1)
    assert plan(2, 2048, 3) == (1, 2)
    assert plan(1, 64, 3) == (1, 1)
    assert plan(16, 256, 3, wanted=4) == (4, 1)
    assert plan(3, 256, 3, wanted=4) == (3, 1)


@pytest.mark.parametrize("name", [*ALL, *ALIBI_CONFIGS])
def test_losses_depend_on_the_slices_of_tokens_by_rounding_alone(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(name, tmp_path)
    wanted = step_losses(open_model(tmp_path, name, "resident", bits="nf4"), name, rows=1)
    monkeypatch.setitem(LEAST_SLICE, "cpu", 1)
    model = open_model(tmp_path, name, "resident", bits="nf4")
    lengths: set[int] = set()
    for linear in model.linears.values():
        if linear.name.endswith(("up_proj", "fc1", "fc2", "h_to_4h", "c_fc", "intermediate.dense")):
            linear.register_forward_hook(lambda m, args, y: lengths.add(args[0].shape[1]))
    torch.testing.assert_close(step_losses(model, name, rows=1), wanted, rtol=0, atol=2e-6)
    assert lengths == {12 if KINDS[name] == "masked" else 4}  # encoders have no MLP of their own


def test_a_chunked_step_holds_less_memory_inside_the_blocks(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    largest = []
    for chunk in (9, 1):
        model = open_model(tmp_path, "llama", "resident", bits="nf4")
        model.branch_chunk = chunk
        sizes: list[int] = []
        block: Any = model.blocks[0]
        block.mlp.act_fn.register_forward_hook(lambda m, a, out, sizes=sizes: sizes.append(out.numel()))
        step_losses(model, "llama", rows=9)
        largest.append(max(sizes))
    assert largest[0] > 3 * largest[1]  # nine rows against one; all but the first end early


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "gemma2", "qwen2"])
def test_generation_streams(name: str, tmp_path: Path) -> None:
    folder = checkpoint(name, "nf4", tmp_path, vocab_size=2000)
    ids = torch.tensor([[5, 6, 7], [9, 8, 7]])
    texts = []
    for where in ("resident", "disk", "host"):
        model = open_model(folder, name, where)
        texts.append(model.module.generate(ids, max_new_tokens=8, do_sample=False))  # type: ignore[operator]
    assert torch.equal(texts[0], texts[1])
    assert torch.equal(texts[0], texts[2])


@pytest.mark.parametrize("where", ["disk", "host"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "opt", "bert"])
def test_embedding_and_head_are_offloaded_too(name: str, where: str, tmp_path: Path) -> None:
    folder = checkpoint(name, "nf4", tmp_path, vocab_size=2000)
    model, resident = open_model(folder, name, where), open_model(folder, name, "resident")
    embedding: Any = model.module.get_input_embeddings()  # type: ignore[operator]
    heads = [linear for linear in model.linears.values() if linear.out_features == 2000]
    assert embedding.weight.is_meta
    assert [type(head.weight) for head in heads] == [OffloadedWeight]
    assert model.nbytes() == resident.nbytes()
    assert torch.equal(step_losses(model, name), step_losses(resident, name))
    assert embedding.weight.is_meta


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_cache_holds_all_rows_so_nothing_is_cut(name: str, tmp_path: Path) -> None:
    """GPT-2's blocks are given the cache by position, others by name."""
    save_tiny(name, tmp_path)
    ids = torch.tensor([[5, 6, 7], [9, 8, 7], [4, 4, 4], [3, 9, 5]])
    model = open_model(tmp_path, name, "resident", bits="nf4")
    wanted = model.module.generate(ids, max_new_tokens=6, do_sample=False)  # type: ignore[operator]
    model.branch_chunk = 2
    assert torch.equal(model.module.generate(ids, max_new_tokens=6, do_sample=False), wanted)  # type: ignore[operator]


def test_a_decoder_classifier_goes_through_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    plain = chunks.in_chunks

    def counted(*args: Any) -> Any:
        calls.append(1)
        return plain(*args)

    save_tiny("llama", tmp_path, kind="classifier")
    model = load(tmp_path, kind="classifier", bits="nf4", device="cpu")
    model.branch_chunk = 1
    model.module.config.pad_token_id = 0  # type: ignore[union-attr]
    monkeypatch.setattr("hizoo_lite.engine.block.in_chunks", counted)
    assert torch.isfinite(Traversal(model).losses(tiny_task_batch("classifier")).per_example).all()
    assert len(calls) == 2


# ------------------------------------------------------------------------------------------ slots


def deep(folder: Path, layers: int = 5) -> Path:
    return checkpoint("llama", "nf4", folder, num_hidden_layers=layers)


def test_each_block_is_fetched_once_a_pass_and_ahead_of_its_turn(tmp_path: Path) -> None:
    model = open_model(deep(tmp_path), "llama", "disk")
    residency = model.residency
    assert isinstance(residency, Streamed)
    fetched: list[int] = []
    fetcher = residency.prepare()
    begin = fetcher.fetch
    fetcher.fetch = lambda block, slot: (fetched.append(block), begin(block, slot))[1]  # type: ignore[method-assign]
    seen = []
    for block in each_block(model):
        seen.append((block, fetched[-1]))
    assert seen == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 0)]  # while 4 runs, the next pass's first is fetched
    for _ in each_block(model):
        pass
    assert fetched == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0]


def test_an_absent_block_cannot_be_computed_with(tmp_path: Path) -> None:
    model = open_model(deep(tmp_path), "llama", "disk")
    blocks = each_block(model)
    next(blocks)
    first, second = (model.linears[f"model.layers.{i}.mlp.up_proj"].weight for i in (0, 1))
    first.unpack(torch.empty(first.shape))
    assert all(stored.tensor.is_meta for stored in second.stored())
    blocks.close()
    assert all(stored.tensor.is_meta for stored in first.stored())


@pytest.mark.parametrize("where", ["disk", "host"])
def test_changed_blocks_come_back_changed(where: str, tmp_path: Path) -> None:
    folder = deep(tmp_path)
    before = {path: path.read_bytes() for path in folder.glob("*.safetensors")}
    model = open_model(folder, "llama", where)
    for block in each_block(model):
        if block in (1, 3):
            weight: Any = model.linears[f"model.layers.{block}.mlp.up_proj"].weight
            weight.codes.bitwise_xor_(255)
            weight.absmax.zero_()
            model.residency.mark_dirty(block)
    plain = open_model(folder, "llama", "resident")
    for _ in range(2):
        for block in each_block(model):
            for leaf in ("mlp.up_proj", "self_attn.q_proj"):
                changed: Any = model.linears[f"model.layers.{block}.{leaf}"].weight
                first: Any = plain.linears[f"model.layers.{block}.{leaf}"].weight
                is_changed = leaf == "mlp.up_proj" and block in (1, 3)
                assert torch.equal(changed.codes, first.codes ^ 255 if is_changed else first.codes)
                assert bool((changed.absmax == 0).all()) is is_changed
    model.residency.close()
    assert before == {path: path.read_bytes() for path in folder.glob("*.safetensors")}


def test_blocks_in_any_order_are_right(tmp_path: Path) -> None:
    folder = deep(tmp_path)
    model, plain = open_model(folder, "llama", "disk"), open_model(folder, "llama", "resident")
    for block in (3, 0, 0, 4, 1, 4, 2, 2, 3):
        model.residency.acquire(block)
        streamed: Any = model.linears[f"model.layers.{block}.mlp.up_proj"].weight
        resident: Any = plain.linears[f"model.layers.{block}.mlp.up_proj"].weight
        assert torch.equal(streamed.codes, resident.codes)
        model.residency.release(block)


# ----------------------------------------------------------------------------------------- budgets


@pytest.mark.parametrize(("blocks", "kept"), [(5, 0), (5, 3), (5, 5), (80, 17), (2, 1)])
def test_blocks_that_stay_are_spread_among_the_others(blocks: int, kept: int) -> None:
    chosen = sorted(spread(blocks, kept))
    assert len(chosen) == kept
    assert all(0 <= block < blocks for block in chosen)
    gaps = [b - a for a, b in itertools.pairwise(chosen)]
    assert not gaps or max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize(
    ("kept", "chosen"), [(0, set()), (2, {7, 9}), (4, {6, 7, 8, 9}), (6, {1, 4, 6, 7, 8, 9})]
)
def test_those_that_most_passes_run_stay_before_the_others(kept: int, chosen: set[int]) -> None:
    assert spread(10, kept, first=6) == chosen


def budgeted(folder: Path, extra_bytes: int, monkeypatch: pytest.MonkeyPatch) -> Model:
    """A model whose budget is `extra_bytes` above what is taken."""
    monkeypatch.setattr("hizoo_lite.device.Cpu.taken_bytes", lambda self, device: 10**9)
    return open_model(folder, "llama", "auto", device_budget=10**9 + extra_bytes)


def test_auto_keeps_as_many_blocks_as_the_budget_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = deep(tmp_path)
    wanted = step_losses(open_model(folder, "llama", "resident"), "llama")
    block_bytes = layouts(open_model(folder, "llama", "resident"))[0].nbytes
    for extra, kept in ((2, 0), (3, 1), (4, 2), (5, 5), (9, 5)):
        model = budgeted(folder, extra * block_bytes, monkeypatch)
        assert torch.equal(step_losses(model, "llama"), wanted)
        assert isinstance(model.residency, Streamed)
        assert len(model.residency.kept_blocks) == kept
        assert model.residency.slot_bytes == (0 if kept == 5 else 2 * block_bytes)
    model = budgeted(folder, 2 * block_bytes - 1, monkeypatch)
    with pytest.raises(BudgetError, match=r"--device-budget: got .* is needed"):
        step_losses(model, "llama")


def test_auto_without_a_budget_is_resident(tmp_path: Path) -> None:
    assert open_model(deep(tmp_path), "llama", "auto").residency.name == "resident"


def test_a_budget_too_small_for_weights_that_are_quantized_on_loading_says_what_to_do(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    with pytest.raises(BudgetError, match=r"hizoo-lite quantize --model .* --bits nf4"):
        open_model(tmp_path, "llama", "auto", device_budget=10_000)
    assert open_model(tmp_path, "llama", "auto", device_budget="1GiB").residency.name == "resident"


def test_a_run_over_its_budget_ends_before_anything_is_written(tmp_path: Path) -> None:
    settings = short_run(tmp_path, device_budget="1MiB", residency="auto", bits="nf4")
    folder = tmp_path / "quantized"
    Quantization(model_path("embedded"), folder, kind="causal", bits="nf4").run()
    with pytest.raises(BudgetError, match=r"--device-budget: got 1\.00 MiB, "):
        fit(TrainConfig(**{**settings, "model": str(folder)}))
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------ runs


class StopAfter(Progress):
    """Sends the process what Ctrl-C sends, after some steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def stepped(self, record: StepRecord) -> None:
        if record.step + 1 == self.steps:
            signal.raise_signal(signal.SIGINT)


def test_a_streamed_run_is_the_resident_run_bitwise(tmp_path: Path) -> None:
    folder = tmp_path / "quantized"
    Quantization(model_path("embedded"), folder, kind="causal", bits="nf4").run()
    adapters = []
    for where in ("resident", "disk", "host"):
        out = tmp_path / where
        settings = short_run(tmp_path, model=str(folder), out=str(out), residency=where)
        run = fit(TrainConfig(**settings))
        assert run.summary["residency"] == where
        assert ("moved_bytes" in run.summary) == (where != "resident")
        adapters.append((out / "adapter" / "adapter_model.safetensors").read_bytes())
    assert adapters[0] == adapters[1] == adapters[2]


SPACES = {
    "requantize": {"space": "dense", "dense_update": "requantize", "lr": 1e-5},
    "residual": {"space": "dense", "lr": 1e-5},
    "scales": {"space": "scales", "lr": 1e-5},
    "factored": {"space": "dense", "curvature": "factored", "targets": "attention"},
}


@pytest.mark.parametrize(
    ("space", "bits"),
    [
        *(("requantize", "nf4"), ("factored", "int8")),
        pytest.param("residual", "int8", marks=pytest.mark.grid),
        pytest.param("scales", "nf4", marks=pytest.mark.grid),
        pytest.param("requantize", "int8", marks=pytest.mark.grid),
        pytest.param("residual", "nf4", marks=pytest.mark.grid),
        pytest.param("scales", "int8", marks=pytest.mark.grid),
        pytest.param("factored", "nf4", marks=pytest.mark.grid),
    ],
)
def test_a_streamed_run_in_the_weights_is_the_resident_run_bitwise(
    space: str, bits: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "quantized"
    Quantization(model_path("embedded"), folder, kind="causal", bits=bits, double_quant=False).run()
    before = [path.read_bytes() for path in sorted(folder.iterdir())]
    results = []
    for where in ("resident", "disk", "host"):
        settings = short_run(tmp_path, model=str(folder), out=str(tmp_path / where), residency=where, steps=3)
        run = fit(TrainConfig(**settings, **SPACES[space]))
        files = sorted(run.folder.glob("adapter/*.safetensors"))
        assert len(files) == 4  # one a block
        losses = (run.summary["loss_before"], run.summary["loss_after"])
        results.append(([file.read_bytes() for file in files], losses))
    assert results[0] == results[1] == results[2]
    assert results[0][1][0] != results[0][1][1]
    assert before == [path.read_bytes() for path in sorted(folder.iterdir())]


@pytest.mark.parametrize("space", ["requantize", "residual", pytest.param("scales", marks=pytest.mark.grid)])
def test_a_streamed_run_in_the_weights_resumes_bitwise_and_is_evaluated_as_it_ended(
    space: str, tmp_path: Path
) -> None:
    folder = tmp_path / "quantized"
    Quantization(model_path("embedded"), folder, kind="causal", bits="nf4", double_quant=False).run()
    settings = {**short_run(tmp_path, model=str(folder), residency="disk"), **SPACES[space]}
    whole = fit(TrainConfig(**{**settings, "out": str(tmp_path / "whole"), "steps": 4}))
    part = fit(TrainConfig(**{**settings, "steps": 4, "save_every": 2}), callbacks=[StopAfter(2)])
    assert part.interrupted
    resumed = fit(TrainConfig(**{**settings, "steps": 4, "resume": True}))
    for one, other in zip(
        sorted(whole.folder.glob("adapter/*.safetensors")),
        sorted(resumed.folder.glob("adapter/*.safetensors")),
        strict=True,
    ):
        assert one.read_bytes() == other.read_bytes()
    shown = CliRunner().invoke(app, ["eval", "--adapter", str(whole.folder), "--json", "--quiet"])
    assert shown.exit_code == 0, shown.stderr
    assert json.loads(shown.stdout)["scores"]["loss"] == whole.summary["loss_after"]
    assert json.loads(shown.stdout)["residency"] == "disk"


def test_scales_in_8_bits_that_are_offloaded_cannot_be_trained(tmp_path: Path) -> None:
    folder = tmp_path / "quantized"
    Quantization(model_path("embedded"), folder, kind="causal", bits="nf4").run()
    settings = short_run(tmp_path, model=str(folder), residency="disk", space="scales")
    with pytest.raises(UserError, match="--no-double-quant"):
        fit(TrainConfig(**settings))
    residual = {**settings, "space": "dense", "steps": 1, "lr": 1e-5}
    assert fit(TrainConfig(**residual)).summary["steps"] == 1  # codes and scales stay as they are


def test_a_read_error_in_the_middle_of_a_run_leaves_it_saved_and_resumable(tmp_path: Path) -> None:
    folder = tmp_path / "quantized"
    Quantization(model_path("embedded"), folder, kind="causal", bits="nf4").run()
    settings = short_run(tmp_path, model=str(folder), residency="disk", steps=6, hidden_states="off")

    class Cutter(Progress):
        """Truncates a shard after the third step."""

        def stepped(self, record: StepRecord) -> None:
            if record.step == 2:
                shard = folder / "block-00001.safetensors"
                shard.write_bytes(shard.read_bytes()[:100])

    whole = (folder / "block-00001.safetensors").read_bytes()
    with pytest.raises(
        StorageError, match=r"block-00001\.safetensors: .*truncated; .*step-00000. is the last good"
    ):
        fit(TrainConfig(**settings), callbacks=[Cutter()])
    steps_done = json.loads((tmp_path / "run" / "summary.json").read_text())["steps"]
    assert 3 <= steps_done < 6
    with pytest.raises(UserError, match=r"block-00001\.safetensors"):
        fit(TrainConfig(**{**settings, "resume": True}))
    (folder / "block-00001.safetensors").write_bytes(whole)
    resumed = fit(TrainConfig(**{**settings, "resume": True}))
    undisturbed = fit(TrainConfig(**{**settings, "out": str(tmp_path / "other")}))
    files = [run.folder / "adapter" / "adapter_model.safetensors" for run in (resumed, undisturbed)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_changed_block_that_could_not_be_written_is_not_read_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_model(deep(tmp_path), "llama", "disk")

    def full(*args: object) -> int:
        raise OSError(28, "No space left on device")

    blocks = each_block(model)
    next(blocks)
    monkeypatch.setattr("os.pwrite", full)
    model.residency.mark_dirty(0)
    with pytest.raises(StorageError, match=r"a changed block cannot be written: .*No space left"):
        next(blocks)
    monkeypatch.undo()
    for block in (2, 3):  # take both slots
        model.residency.acquire(block)
        model.residency.release(block)
    with pytest.raises(StorageError, match="block 0 was changed and could not be written"):
        model.residency.acquire(0)


def test_a_full_disk_ends_a_run_in_the_weights_with_its_last_checkpoint_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "quantized"
    Quantization(model_path("embedded"), folder, kind="causal", bits="nf4", double_quant=False).run()
    settings = {
        **short_run(tmp_path, model=str(folder), residency="disk", save_every=2),
        **SPACES["residual"],
    }
    plain = os.pwrite

    class WeightLoader(Progress):
        def stepped(self, record: StepRecord) -> None:
            if record.step == 3:
                monkeypatch.setattr("os.pwrite", full)

    def full(*args: object) -> int:
        raise OSError(28, "No space left on device")

    with pytest.raises(StorageError, match=r"step-00000[24] is the last good state"):
        fit(TrainConfig(**settings), callbacks=[WeightLoader()])
    monkeypatch.setattr("os.pwrite", plain)
    resumed = fit(TrainConfig(**{**settings, "resume": True}))
    whole = fit(TrainConfig(**{**settings, "out": str(tmp_path / "whole")}))
    for one, other in zip(
        sorted(whole.folder.glob("adapter/*")), sorted(resumed.folder.glob("adapter/*")), strict=True
    ):
        assert one.read_bytes() == other.read_bytes()


def test_blocks_that_have_been_streamed_get_no_other_buffers(tmp_path: Path) -> None:
    model = open_model(deep(tmp_path), "llama", "disk")
    step_losses(model, "llama")
    with pytest.raises(UserError, match="streamed already; load it anew"):
        Dense().attach(model, seed=0)


@pytest.mark.parametrize("saved_by", ["resident", "disk"])
def test_a_residual_is_put_on_a_model_that_lives_elsewhere(saved_by: str, tmp_path: Path) -> None:
    folder = tmp_path / "quantized"
    Quantization(model_path("embedded"), folder, kind="causal", bits="nf4").run()  # scales in 8 bits
    settings = short_run(tmp_path, model=str(folder), residency=saved_by, steps=2)
    run = fit(TrainConfig(**settings, **SPACES["residual"]))
    for where in ("resident", "disk", "host"):
        model = load(folder, device="cpu", residency=where)  # type: ignore[arg-type]
        attach_adapter(model, run.folder)
        losses = Traversal(model).losses(tiny_task_batch("causal")).per_example
        run.setup.traversal.guard = lambda work: work()
        assert torch.equal(losses, run.setup.traversal.losses(tiny_task_batch("causal")).per_example)


# ------------------------------------------------------------------------------------------ faults


def test_a_flipped_bit_is_found_before_the_model_is_used(tmp_path: Path) -> None:
    folder = deep(tmp_path)
    shard = folder / "block-00002.safetensors"
    content = bytearray(shard.read_bytes())
    content[-100] ^= 4
    shard.write_bytes(content)
    for where in ("resident", "host", "disk"):
        with pytest.raises(UserError, match=r"block-00002\.safetensors.*sha256"):
            open_model(folder, "llama", where)


def test_an_unquantized_checkpoint_does_not_stream_from_disk_as_4_bit(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    with pytest.raises(UserError, match=r"--residency: got disk, .* hizoo-lite quantize"):
        open_model(tmp_path, "llama", "disk", bits="nf4")
    model = open_model(tmp_path, "llama", "host", bits="nf4")
    wanted = step_losses(open_model(tmp_path, "llama", "resident", bits="nf4"), "llama")
    assert torch.equal(step_losses(model, "llama"), wanted)


def test_transposed_16_bit_layers_do_not_stream_from_disk(tmp_path: Path) -> None:
    folder = checkpoint("gpt2", "none", tmp_path)
    with pytest.raises(UserError, match="--residency: got disk"):
        open_model(folder, "gpt2", "disk", bits="none")


def test_an_unknown_residency_is_refused(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    with pytest.raises(UserError, match="residency: got 'moon', allowed are auto, resident, host, disk"):
        open_model(tmp_path, "llama", "moon")
