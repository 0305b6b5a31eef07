"""SensZOQ: the product of a few entries, which entries they are, and what a run makes of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.pytorch_utils import Conv1D

from hizoo_lite.base import ModelKind
from hizoo_lite.batch import Batch
from hizoo_lite.branches import EVALUATION, Branches, BranchState
from hizoo_lite.checkpoints.adapter import PEFT_METADATA
from hizoo_lite.config import DEMO, TrainConfig
from hizoo_lite.engine.load import load
from hizoo_lite.engine.traversal import Traversal
from hizoo_lite.errors import UserError
from hizoo_lite.export import merged, peft
from hizoo_lite.export.onnx.export import export_onnx
from hizoo_lite.export.onnx.source import read_source
from hizoo_lite.export.quantize import Quantization
from hizoo_lite.model.model import Model
from hizoo_lite.noise import normal
from hizoo_lite.plan import planner
from hizoo_lite.plan.dry_run import Pass
from hizoo_lite.plan.inventory import Inventory
from hizoo_lite.plan.meter import KernelMemory, MemoryMeter
from hizoo_lite.plan.subject import Option, Subject
from hizoo_lite.plan.workload import ONE_ROW
from hizoo_lite.run import evaluate, fit
from hizoo_lite.spaces import Sparse, sparse
from hizoo_lite.spaces.sparse import FILE, INDEX, VALUES, SparseDelta
from hizoo_lite.train import checkpoint
from hizoo_lite.train.ranks import Ranks
from hizoo_lite.train.saved import attach_adapter
from hizoo_lite.train.setup import calibrate
from tests import family
from tests.architectures import RELATIVE_CONFIGS, TINY_CONFIGS, save_tiny
from tests.batches import reference_losses, tiny_task_batch
from tests.export_fixtures import KINDS
from tests.run_fixtures import nan_head, short_run
from tests.test_export_merged import AUTO, FLOAT32
from tests.test_plan import answer_batch, dry_run
from tests.test_stream import checkpoint as packed
from tests.weights_reference import decoded

#: Sums of a few float32 products.
CLOSE = 1e-6


def opened(folder: Path, bits: Any = "none", kind: ModelKind = "causal", **options: Any) -> Model:
    return load(folder, kind=kind, bits=bits, compute_dtype="float32", device="cpu", **options)


def places(space: Sparse) -> dict[str, torch.Tensor]:
    return {target: space.frozen[target + INDEX].clone() for target in space.target_names}


def chosen(model: Model, batch: Batch, **options: Any) -> dict[str, torch.Tensor]:
    """The places that a new space takes on a model."""
    space = Sparse(head="none", **{"share": 0.01, **options})
    space.attach(model, 0)
    space.calibrate(Traversal(model), batch)
    return places(space)


# ---------------------------------------------------------------------------------------- the product


@pytest.mark.parametrize(("rows", "columns", "count"), [(7, 5, 1), (64, 96, 61), (3, 4, 12), (130, 64, 900)])
@pytest.mark.parametrize("branches", [EVALUATION, Branches.of(True, 2), Branches.of(False, 1)])
def test_products_are_those_of_a_dense_matrix(
    rows: int, columns: int, count: int, branches: Branches, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sparse.PIECE_TOKENS, "cpu", 4)
    assert family.product_difference(rows, columns, count, branches) < CLOSE


def test_a_product_is_the_same_on_every_call_and_for_any_number_of_threads() -> None:
    index = torch.arange(0, 4096 * 512, 97, dtype=torch.int32)
    values = normal(0, 0, "values", torch.Size((len(index),)))
    delta = SparseDelta(values, index, (4096, 512), "layer")
    x, found = normal(0, 0, "x", torch.Size((1, 130, 512))), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(delta.apply(x, torch.zeros(1, 130, 4096), BranchState()))
    torch.set_num_threads(1)
    assert torch.equal(*found)


# ------------------------------------------------------------------------------------------ the places


def unpacked(model: Model, folder: Path, kind: str) -> torch.nn.Module:
    """transformers' model with the values that our packed weights stand for."""
    plain = AUTO[kind].from_pretrained(folder, dtype=torch.float32).eval()
    for name, linear in model.linears.items():
        if model.block_of(name) is not None:
            as_stored(plain, name, plain.get_submodule(name).weight.data).copy_(decoded(linear.weight))
    return plain


def as_stored(module: torch.nn.Module, linear: str, matrix: torch.Tensor) -> torch.Tensor:
    """(out_features, in_features), of what GPT-2 has the other way round."""
    return matrix.t() if isinstance(module.get_submodule(linear), Conv1D) else matrix


def squared_gradients(module: torch.nn.Module, batch: Batch, chunks: list[list[int]]) -> dict[str, Any]:
    """Gradients of the loss of a few rows of a batch, by name, from autograd; a list of each chunk's."""
    found: dict[str, Any] = {}
    for rows in chunks:
        module.zero_grad()
        reference_losses(module, batch)[rows].sum().backward()
        for name, value in module.named_parameters():
            if value.grad is not None:
                layer = name.rpartition(".")[0]
                gradient = as_stored(module, layer, value.grad).double().numpy()
                found.setdefault(name.removesuffix(".weight"), []).append(gradient)
    return found


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        *(("llama", bits) for bits in ("none", "nf4", "fp4", "int8")),
        *(("gpt2", "none"), ("bert", "nf4"), ("deberta_v2", "none")),
    ],
)
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_places_are_those_of_the_largest_squared_gradients_of_autograd(
    name: str, bits: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Summed over rows; or over pairs of rows, whose gradients are summed before. One row is short."""
    kind = {**TINY_CONFIGS, **RELATIVE_CONFIGS}[name].kind
    save_tiny(name, tmp_path, kind=kind)
    model, batch = opened(tmp_path, bits, kind), tiny_task_batch(kind, rows=4, ends=[12, 5, 12, 9])
    plain = unpacked(model, tmp_path, kind)
    for together, chunks in ((1, [[0], [1], [2], [3]]), (2, [[0, 1], [2, 3]])):
        monkeypatch.setattr(sparse, "CHUNK_TOKENS", together * 12)
        gradients = squared_gradients(plain, batch, chunks)
        found = chosen(model, batch, share=0.02)
        assert len(found) > 3
        for target, index in found.items():
            scores, wanted = family.sensitive(gradients[target], len(index))
            least = scores[wanted].min()
            assert index.diff().min() > 0
            assert scores[index].min() > least * (1 - 1e-3)  # float32 decides between those that are as large
            assert len(set(index.tolist()) & set(wanted.tolist())) >= 0.98 * len(index)


def test_places_of_plain_weights_are_exactly_those_of_autograd(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    model, batch = opened(tmp_path), tiny_task_batch("causal", rows=4)
    gradients = squared_gradients(unpacked(model, tmp_path, "causal"), batch, [[0, 1, 2, 3]])
    for target, index in chosen(model, batch).items():
        assert index.tolist() == sorted(family.sensitive(gradients[target], len(index))[1].tolist())


@pytest.mark.parametrize("bits", ["none", "nf4", "int8"])
def test_places_by_magnitude_are_those_of_the_largest_weights(bits: Any, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    model = opened(tmp_path, bits)
    for target, index in chosen(model, tiny_task_batch("causal"), by="magnitude").items():
        sizes = decoded(model.linears[target].weight).abs().flatten()
        assert len(index) == round(0.01 * len(sizes))
        assert index.diff().min() > 0
        assert sizes[index].min() >= sizes.topk(len(index)).values.min()


@pytest.mark.parametrize("by", ["gradients", "magnitude"])
def test_streamed_blocks_have_the_same_places_whatever_the_chunks_of_a_budget(
    by: Any, tmp_path: Path
) -> None:
    source, batch = packed("llama", "nf4", tmp_path, num_hidden_layers=4), tiny_task_batch("causal", rows=5)
    found = []
    for residency, chunk, halvings in (("resident", "auto", 0), ("host", 2, 1), ("disk", "auto", 3)):
        model = opened(source, "nf4", residency=residency)
        model.branch_chunk, model.chunk_halvings = chunk, halvings
        found.append(chosen(model, batch, by=by))
        assert (model.branch_chunk, model.chunk_halvings) == (chunk, halvings)
        if residency != "resident":
            model.residency.close()
    for other in found[1:]:
        assert all(torch.equal(index, other[target]) for target, index in found[0].items())


@pytest.mark.parametrize("failing", [1, 9, 14])
def test_a_pass_that_is_repeated_finds_the_same_places(
    failing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory is refused at the first layer of the upper block, and at two of the lower one."""
    save_tiny("llama", tmp_path)
    model, batch = opened(tmp_path), tiny_task_batch("causal", rows=4)
    monkeypatch.setattr(sparse, "CHUNK_TOKENS", 12)
    wanted, squares, calls = chosen(model, batch), sparse._squares, []

    def refused(*given: Any) -> None:
        calls.append(0)
        if len(calls) == failing:
            raise RuntimeError("out of memory")
        squares(*given)

    def guard(work: Callable[[], Any]) -> Any:
        try:
            return work()
        except RuntimeError:
            return work()

    monkeypatch.setattr(sparse, "_squares", refused)
    space, traversal = Sparse(share=0.01, head="none"), Traversal(model)
    space.attach(model, 0)
    traversal.guard = guard  # type: ignore[assignment]
    space.calibrate(traversal, batch)
    assert len(calls) == failing + 14
    assert all(torch.equal(index, wanted[target]) for target, index in places(space).items())
    assert all(isinstance(model.linears[target].delta, SparseDelta) for target in space.target_names)


def test_a_model_that_has_no_reverse_pass_is_told_of_magnitudes(tmp_path: Path) -> None:
    save_tiny("gemma4", tmp_path)
    model, batch = opened(tmp_path), tiny_task_batch("causal")
    with pytest.raises(UserError, match=r"--sparse-by: got 'gradients', but gemma4_text .*: magnitude$"):
        chosen(model, batch)
    assert all(len(index) for index in chosen(model, batch, by="magnitude").values())


def test_gradients_that_are_not_finite_choose_nothing(tmp_path: Path) -> None:
    settings = short_run(tmp_path, model=str(nan_head(tmp_path)), space="sparse")
    with pytest.raises(UserError, match=r"--sparse-by: .* are not finite numbers; allowed: magnitude"):
        fit(TrainConfig(**settings))
    assert not (tmp_path / "run" / "journal.bin").exists()


# ----------------------------------------------------------------------------------------------- runs


def test_a_run_learns_with_a_hundredth_of_the_weights_and_leaves_the_others(tmp_path: Path) -> None:
    settings = short_run(tmp_path, space="sparse", sparse_share=0.01, head="none", steps=2)
    run = fit(TrainConfig(**settings))
    space = run.setup.space
    assert isinstance(space, Sparse)
    for target in space.target_names:
        size = run.setup.model.linears[target].weight.shape
        assert len(space.parameters[target + VALUES]) == round(0.01 * size[0] * size[1])
        assert space.parameters[target + VALUES].abs().min() > 0
    first = load_file(checkpoint.path_of(run.folder / "checkpoints", 0) / "adapter" / FILE)
    for name, value in places(space).items():
        assert torch.equal(first[name + INDEX], value)
        assert not first[name + VALUES].any()


def test_a_run_without_checkpoints_begins_with_the_same_places(tmp_path: Path) -> None:
    """Its journal is taken from the start; a run that has one looks at no examples."""
    config = TrainConfig(**short_run(tmp_path, space="sparse", head="none", steps=3))
    run = fit(config)
    other = tmp_path / "other"
    shutil.copytree(run.folder, other)
    shutil.rmtree(other / "checkpoints")
    shutil.rmtree(other / "adapter")
    fit(replace(config, out=str(other), resume=True))
    assert _same(other, run.folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sparse, "calibrate", _never)
        fit(replace(config, out=str(other), resume=True, steps=4))
        assert run.after is not None
        assert evaluate(run.folder).loss == run.after.loss


def _never(*given: Any) -> None:
    raise AssertionError("a saved space has its places")


def _same(ours: Path, theirs: Path) -> bool:
    one, other = (load_file(folder / "adapter" / FILE) for folder in (ours, theirs))
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def test_a_classifiers_run_has_its_head_in_the_same_file(tmp_path: Path) -> None:
    save_tiny("bert", tmp_path, kind="classifier")
    model, batch = opened(tmp_path, kind="classifier"), tiny_task_batch("classifier")
    for head in ("exact", "estimated"):
        space = Sparse(head=head)  # type: ignore[arg-type]
        space.attach(model, 0)
        space.calibrate(Traversal(model), batch)
        for value in [*space.parameters.values(), *space.exact.values()]:
            value.add_(0.1)
        losses = Traversal(model).losses(batch).per_example
        space.save(tmp_path / head)
        space.detach()
        assert not torch.equal(Traversal(model).losses(batch).per_example, losses)
        attach_adapter(model, tmp_path / head)
        assert torch.equal(Traversal(model).losses(batch).per_example, losses)


@pytest.mark.grid  # tests/test_family_spaces.py has a smaller one
def test_a_streamed_run_is_the_resident_run_bitwise(tmp_path: Path) -> None:
    folder, found = tmp_path / "nf4", []
    Quantization(DEMO, folder, kind="causal", bits="nf4").run()
    for where in ("resident", "disk", "host"):
        changes = {"model": str(folder), "residency": where, "space": "sparse", "steps": 2}
        run = fit(TrainConfig(**short_run(tmp_path, out=str(tmp_path / where), **changes)))
        losses = (run.summary["loss_before"], run.summary["loss_after"])
        found.append(((run.folder / "adapter" / FILE).read_bytes(), losses))
    assert found[0] == found[1] == found[2]


def test_every_rank_has_the_places_of_the_main_one(tmp_path: Path) -> None:
    run = fit(TrainConfig(**short_run(tmp_path, space="sparse", head="none", steps=1)))
    setup, wanted = run.setup, places(run.setup.space)  # type: ignore[arg-type]
    theirs = iter([index.double().numpy() + 1 for index in wanted.values()])

    class Second(Ranks):
        rank, count = 1, 2

        def sum(self, values: Any) -> Any:
            return values + next(theirs)

    setup.stepper.ranks = Second()
    calibrate(setup)
    for target, index in places(setup.space).items():  # type: ignore[arg-type]
        assert torch.equal(index, wanted[target] + 1)


@pytest.mark.parametrize("share", [pytest.param(0.001, marks=pytest.mark.grid), 0.1])
def test_a_dry_run_makes_the_tensors_of_a_real_step_and_of_what_comes_before(
    share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention that is only counted gives values that are not there."""
    monkeypatch.setattr(torch.Tensor, "isfinite", lambda value: torch.ones_like(value, dtype=torch.bool))
    save_tiny("llama", tmp_path, dtype=torch.bfloat16)
    model, rows, length = load(tmp_path, bits="nf4", device="cpu", compute_dtype="bf16"), 16, 48
    space, branches, traversal = Sparse(share=share), Branches.of(True, 0, 2), Traversal(model)
    space.attach(model, 0)
    directions = {key: torch.zeros(2, *value.shape) for key, value in space.parameters.items()}
    batch = answer_batch(model.config.vocab_size, rows=rows, length=length)
    batch.attention_mask[-1, -1] = 0
    dry = dry_run(tmp_path, Sparse(share=share))
    for work, made in (
        (lambda: traversal.losses(batch, branches, 1e-3, directions), dry.run),
        (lambda: space.calibrate(traversal, batch), dry.calibrate),
    ):
        work()  # scratch is there from now on
        with MemoryMeter() as meter, KernelMemory():
            work()
        found = made(Pass(rows, length, branches, rows))
        assert sum(found.worst.values()) == pytest.approx(meter.peak_bytes, rel=0.03)


def test_a_plan_counts_the_pass_before_the_first_step(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path, num_hidden_layers=6)
    found = {}
    for by in ("gradients", "magnitude"):
        settings = {"space": "sparse", "sparse_by": by, "batch_size": 48, "max_length": 48}
        config = TrainConfig(model=str(tmp_path), task="sst2", device="cpu", **settings)
        model = opened(tmp_path)
        subject = Subject(config, Inventory.of(model.checkpoint), "causal", ONE_ROW, None, 0)
        [found[by]] = subject.calibration(Option("resident", 16, 48))
    waiting = 4 * 16 * 48 * 64  # of a block; a dry run has two of the six
    assert found["gradients"].worst["boundaries"] == 4 * waiting
    assert found["gradients"].peak_bytes > 6 * waiting
    assert "boundaries" not in found["magnitude"].worst
    lines = [planner.plan_run(replace(config, sparse_by=by), model.checkpoint, "causal") for by in found]
    assert lines[0].peak_bytes > lines[1].peak_bytes
    lora = TrainConfig(model=str(tmp_path), task="sst2", device="cpu")
    other = Subject(lora, Inventory.of(model.checkpoint), "causal", ONE_ROW, None, 0)
    assert other.calibration(Option("resident", 4, 16)) == []


# ------------------------------------------------------------------------------------ files and exports


def tuned(folder: Path, name: str, bits: Any, **changes: Any) -> tuple[Model, Path]:
    """A tiny model with entries that matter to the logits, and what is saved of them."""
    kind: Any = KINDS[name]
    save_tiny(name, folder / "source", kind=kind, **changes)
    source = folder / "source"
    if bits != "none":
        Quantization(str(source), folder / "model", kind=kind, bits=bits).run()
        source = folder / "model"
    model = opened(source, bits, kind)
    space = Sparse(share=0.02)
    space.attach(model, 0)
    space.calibrate(Traversal(model), tiny_task_batch(kind))
    for key, value in space.parameters.items():
        value.add_(normal(3, 0, key, value.shape), alpha=0.3)
    space.save(folder / "tuned")
    return model, folder / "tuned"


@pytest.mark.parametrize(
    ("name", "bits"),
    [("llama", "nf4"), ("llama", "fp4"), ("bert", "int8"), ("gpt2", "none"), ("gpt2", "nf4")],
)
def test_a_merged_folder_computes_what_the_run_does(name: str, bits: Any, tmp_path: Path) -> None:
    model, run = tuned(tmp_path, name, bits)
    kind: Any = KINDS[name]
    batch = tiny_task_batch(kind)
    merged.prepare(run, tmp_path / "merged", dtype="float32", base_bits=bits).run()
    ours = Traversal(model).losses(batch).per_example
    plain = transformers.AutoConfig.from_pretrained(tmp_path / "merged")
    assert plain.to_dict()["hizoo_lite"]["merged"] == "sparse"
    theirs = reference_losses(AUTO[kind].from_pretrained(tmp_path / "merged").eval(), batch)
    torch.testing.assert_close(ours[0], theirs.detach(), **FLOAT32)


@pytest.mark.grid
def test_an_onnx_graph_has_the_merged_weights_or_none(tmp_path: Path) -> None:
    _, run = tuned(tmp_path, "llama", "nf4", num_hidden_layers=1)
    with pytest.raises(UserError, match=r"what --space sparse trains lies beside .*; allowed: --merge"):
        export_onnx(run, tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()
    assert read_source(run).double_quant  # the base is as it was in the run
    record = export_onnx(run, tmp_path / "onnx", merge=True, dtype="float32").record
    assert record["tuned"]["space"] == "sparse"
    assert record["form"] == "merged"


def test_peft_has_no_form_for_it(tmp_path: Path) -> None:
    _, run = tuned(tmp_path, "llama", "none")
    with pytest.raises(UserError, match="PEFT has no form for them; allowed: merged"):
        peft.export(run, tmp_path / "peft")


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model, run = tuned(tmp_path, "llama", "none")
    record, good = json.loads((run / "hizoo_space.json").read_text()), load_file(run / FILE)
    name = f"{record['targets'][0]}{INDEX}"
    values, size = f"{record['targets'][0]}{VALUES}", 64 * 64
    for change, message in (
        ({name: good[name].flip(0)}, "allowed are places that rise"),
        ({name: torch.cat([good[name][:-1], torch.tensor([size], dtype=torch.int32)])}, "places beyond"),
        ({name: good[name] - good[name][-1] - 1}, "places beyond"),
        ({name: good[name].long()}, "is torch.int64, the model wants torch.int32"),
        ({name: good[name][:-1]}, "has shape"),
        ({values: good[values].double()}, "is torch.float64, the model wants torch.float32"),
        ({"other": good[name].clone()}, "does not fit this model and space"),
    ):
        save_file({**good, **change}, run / FILE, PEFT_METADATA)
        before = {key: value.clone() for key, value in places_of(model).items()}
        with pytest.raises(UserError, match=message):
            attach_adapter(model, run).load(run)
        assert before.keys() == places_of(model).keys()
    for change, message in (
        ({name: good[name].flip(0)}, "allowed are places that rise"),
        ({values: good[values][:-1]}, r"has shape \(81,\), there are 82 places"),
    ):
        save_file({**good, **change}, run / FILE, PEFT_METADATA)
        with pytest.raises(UserError, match=message):
            merged.prepare(run, tmp_path / "out", base_bits="none").run()
        shutil.rmtree(tmp_path / "out")
    save_file({key: good[key] for key in good if key != name}, run / FILE, PEFT_METADATA)
    with pytest.raises(UserError, match=rf"hizoo_space.json and sparse.safetensors differ about '{name}'"):
        merged.prepare(run, tmp_path / "out", base_bits="none")
    save_file(good, run / FILE, PEFT_METADATA)
    space = Sparse(share=0.5)
    space.attach(model, 0)
    with pytest.raises(UserError, match=r"hizoo_space.json: share: it has 0.02, this run 0.5"):
        space.load(run)


def places_of(model: Model) -> dict[str, torch.Tensor]:
    """Of the deltas that hang on a model."""
    deltas = {name: linear.delta for name, linear in model.linears.items()}
    return {name: delta.index for name, delta in deltas.items() if isinstance(delta, SparseDelta)}


def test_other_settings_are_refused() -> None:
    given = {"model": "m", "task": "sst2", "space": "sparse"}
    for changes, message in (
        ({"exact_blocks": 1}, "exact_blocks: got 1, allowed with space sparse: 0"),
        ({"sparse_share": 0.0}, "sparse_share: got 0.0, allowed: a number above 0 and up to 1"),
        ({"sparse_share": 1.5}, "sparse_share: got 1.5, allowed: a number above 0 and up to 1"),
        ({"sparse_by": "rank"}, "sparse_by: got 'rank', allowed: gradients, magnitude"),
    ):
        with pytest.raises(UserError, match=message):
            TrainConfig(**{**given, **changes})
    with pytest.raises(UserError, match="--sparse-share: got 2, allowed"):
        Sparse(share=2)
    with pytest.raises(UserError, match="--sparse-by: got 'size', allowed: gradients, magnitude"):
        Sparse(by="size")  # type: ignore[arg-type]


def test_places_of_a_huge_matrix_are_wide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny("llama", tmp_path)
    model, batch = opened(tmp_path), tiny_task_batch("causal")
    narrow = chosen(model, batch)
    losses = Traversal(model).losses(batch).per_example
    monkeypatch.setattr(sparse, "_NARROW", 100)
    wide = chosen(model, batch)
    assert {index.dtype for index in wide.values()} == {torch.int64}
    assert all(torch.equal(index.long(), wide[target]) for target, index in narrow.items())
    assert torch.equal(Traversal(model).losses(batch).per_example, losses)


def test_places_by_gradients_are_not_for_private_examples(tmp_path: Path) -> None:
    settings = {"space": "sparse", "estimator": "dp", "lr": 1e-3, "head": "none", "steps": 1}
    with pytest.raises(UserError, match=r"gradients of the examples.*estimator dp: --sparse-by magnitude"):
        fit(TrainConfig(**short_run(tmp_path / "gradients", **settings)))
    run = fit(TrainConfig(**short_run(tmp_path / "magnitude", **settings, sparse_by="magnitude")))
    assert run.summary["steps"] == 1
