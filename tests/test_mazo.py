"""MaZO: which weights of every row are chosen, of which tasks, and what a run makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hizoo_lite.base import ModelKind
from hizoo_lite.batch import Batch, Example
from hizoo_lite.branches import Branches
from hizoo_lite.checkpoints.adapter import SPACE_FILE
from hizoo_lite.config import DEMO, TrainConfig
from hizoo_lite.engine.load import load
from hizoo_lite.engine.traversal import Traversal
from hizoo_lite.errors import UserError
from hizoo_lite.export.quantize import Quantization
from hizoo_lite.model.model import Model
from hizoo_lite.plan.dry_run import Pass
from hizoo_lite.plan.meter import KernelMemory, MemoryMeter
from hizoo_lite.run import fit
from hizoo_lite.spaces import MaZO, mazo
from hizoo_lite.spaces.sparse import INDEX, VALUES
from hizoo_lite.tasks.mixture import tasks_of_rows
from hizoo_lite.tasks.task import TASK
from hizoo_lite.train.setup import calibrate
from tests import family
from tests.architectures import TINY_CONFIGS, save_tiny
from tests.batches import reference_losses, tiny_task_batch
from tests.run_fixtures import nan_head, short_run, two_tasks
from tests.test_members import same_files
from tests.test_plan import answer_batch, dry_run
from tests.test_sparse import opened, places, unpacked
from tests.test_stream import checkpoint as packed
from tests.weights_reference import decoded


def of_tasks(batch: Batch, *tasks: int) -> Batch:
    """The batch, with the task of each example."""
    return batch._replace(made_of=tuple(Example({TASK: task}, (), 0) for task in tasks))


def chosen(model: Model, batch: Batch, **options: Any) -> dict[str, torch.Tensor]:
    """The places that a new space takes on a model."""
    space = MaZO(head="none", **{"share": 0.05, **options})
    space.attach(model, 0)
    space.calibrate(Traversal(model), batch)
    return places(space)


# ------------------------------------------------------------------------------------------- the places


def given_to(module: torch.nn.Module, batch: Batch, wanted: list[str], rows: list[int]) -> dict[str, Any]:
    """(x, dy) of layers for some rows of a batch, one after the other, from autograd, float64."""
    seen: dict[str, list[Any]] = {name: [] for name in wanted}

    def hook(name: str) -> Any:
        def keep(layer: Any, inputs: Any, out: torch.Tensor) -> None:
            out.retain_grad()
            seen[name].append((inputs[0], out))

        return keep

    hooks = [module.get_submodule(name).register_forward_hook(hook(name)) for name in wanted]
    reference_losses(module, batch)[rows].sum().backward()
    for one in hooks:
        one.remove()
    exists = batch.attention_mask[rows].bool().flatten()
    found = {}
    for name, [(x, out)] in seen.items():
        pair = [value.detach()[rows].flatten(0, 1)[exists].double().numpy() for value in (x, out.grad)]
        found[name] = tuple(pair)
    return found


@pytest.mark.parametrize(
    ("name", "bits"),
    [("llama", "none"), ("llama", "nf4"), ("llama", "int8"), ("bert", "nf4"), ("gpt2", "none")],
)
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_places_are_those_of_the_formulas_by_autograds_gradients(
    name: str, bits: Any, tmp_path: Path
) -> None:
    """Of two tasks that take turns; one row is short."""
    kind: ModelKind = TINY_CONFIGS[name].kind
    save_tiny(name, tmp_path, kind=kind)
    model = opened(tmp_path, bits, kind)
    batch = of_tasks(tiny_task_batch(kind, rows=4, ends=[12, 5, 12, 9]), 0, 1, 1, 0)
    plain, rows = unpacked(model, tmp_path, kind), tasks_of_rows(batch)
    found = chosen(model, batch, greedy=0.5, size=2.0)
    assert len(found) > 3
    of = [[row for row, task in enumerate(rows) if task == each] for each in (0, 1)]
    given = [given_to(plain, batch, list(found), own) for own in of]
    for target, index in found.items():
        weight = decoded(model.linears[target].weight).double().numpy()
        scores = family.mazo_scores([one[target] for one in given], weight, 0.5, 2.0)
        each = max(1, round(0.05 * weight.shape[1]))
        assert len(index) == each * len(weight)
        assert index.diff().min() > 0
        assert np.bincount(index.numpy() // weight.shape[1]).tolist() == [each] * len(weight)
        wanted = family.largest_of_rows(scores, each)
        least = np.sort(scores, 1)[:, -each].repeat(each)  # float32 decides between those that are as large
        assert (scores.ravel()[index.numpy()] > least * (1 - 1e-3)).all()
        assert len(set(index.tolist()) & set(wanted.tolist())) >= 0.98 * len(index)


def test_every_task_counts_the_same_whatever_its_examples_or_its_losses(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    model, batch = opened(tmp_path), tiny_task_batch("causal", rows=4)
    both, exchanged = (chosen(model, of_tasks(batch, *tasks)) for tasks in ((0, 1, 1, 1), (1, 0, 0, 0)))
    assert all(torch.equal(index, exchanged[target]) for target, index in both.items())
    alone = chosen(model, of_tasks(batch, 0, 0, 0, 0))
    assert any(not torch.equal(index, alone[target]) for target, index in both.items())
    unsaid = chosen(model, batch)
    assert all(torch.equal(index, unsaid[target]) for target, index in alone.items())


def test_sizes_alone_are_those_of_the_weights(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    model = opened(tmp_path, "nf4")
    for target, index in chosen(model, tiny_task_batch("causal"), greedy=0.0, size=1e9).items():
        weight = decoded(model.linears[target].weight).abs()
        each = len(index) // len(weight)
        sizes = weight.flatten()[index.long()].view(len(weight), each)
        assert torch.equal(sizes.sort(1).values, weight.topk(each, 1).values.sort(1).values)


def test_rows_know_the_task_of_their_example() -> None:
    """An example may have a row for each of its candidates."""
    for kind in ("causal", "masked", "classifier"):
        batch = tiny_task_batch(kind, rows=3)  # type: ignore[arg-type]
        tasks = [number % 2 for number in range(batch.examples)]
        found = tasks_of_rows(of_tasks(batch, *tasks))
        assert len(found) == len(batch.input_ids)
        if kind == "classifier":
            assert found == tasks
        for site, slot in zip(batch.token_site, batch.token_slot, strict=True):
            assert found[int(batch.site_row[site])] == tasks[int(batch.slot_example[slot])]
        assert tasks_of_rows(batch) == [0] * len(batch.input_ids)


def test_streamed_blocks_have_the_same_places_whatever_the_chunks_of_a_budget(tmp_path: Path) -> None:
    source = packed("llama", "nf4", tmp_path, num_hidden_layers=4)
    batch, found = of_tasks(tiny_task_batch("causal", rows=5), 0, 1, 2, 0, 1), []
    for residency, chunk, halvings in (("resident", "auto", 0), ("host", 2, 1), ("disk", "auto", 3)):
        model = opened(source, "nf4", residency=residency)
        model.branch_chunk, model.chunk_halvings = chunk, halvings
        found.append(chosen(model, batch))
        assert (model.branch_chunk, model.chunk_halvings) == (chunk, halvings)
        if residency != "resident":
            model.residency.close()
    for other in found[1:]:
        assert all(torch.equal(index, other[target]) for target, index in found[0].items())


def test_a_blocks_places_are_chosen_while_its_weights_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny("llama", tmp_path)
    model, blocks, open_ones = opened(tmp_path), [], []
    acquire, release, choose = model.residency.acquire, model.residency.release, mazo.Importance.choose

    def seen(self: mazo.Importance, target: str, rows: Any) -> Any:
        blocks.append((model.block_of(target), list(open_ones)))
        return choose(self, target, rows)

    monkeypatch.setattr(model.residency, "acquire", lambda i: (open_ones.append(i), acquire(i))[1])
    monkeypatch.setattr(model.residency, "release", lambda i: (open_ones.remove(i), release(i))[1])
    monkeypatch.setattr(mazo.Importance, "choose", seen)
    found = chosen(model, tiny_task_batch("causal", rows=3))
    assert len(blocks) == len(found)
    assert all(held == [block] for block, held in blocks)


def test_a_pass_that_is_repeated_finds_the_same_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny("llama", tmp_path)
    model, batch = opened(tmp_path), of_tasks(tiny_task_batch("causal", rows=4), 0, 1, 0, 1)
    wanted, scores, calls = chosen(model, batch), mazo.scores, []

    def refused(*given: Any) -> None:
        calls.append(0)
        if len(calls) == 9:
            raise RuntimeError("out of memory")
        scores(*given)

    def guard(work: Any) -> Any:
        try:
            return work()
        except RuntimeError:
            return work()

    monkeypatch.setattr(mazo, "scores", refused)
    space, traversal = MaZO(share=0.05, head="none"), Traversal(model)
    space.attach(model, 0)
    traversal.guard = guard  # type: ignore[assignment]
    space.calibrate(traversal, batch)
    assert len(calls) == 9 + 14
    assert all(torch.equal(index, wanted[target]) for target, index in places(space).items())


def test_rows_without_a_gradient_have_places_by_size() -> None:
    linear: Any = type("Linear", (), {"weight": family.Stored()})()
    tile = torch.empty(family.ROWS, family.COLUMNS)
    nothing = torch.zeros(5, family.COLUMNS), torch.zeros(5, family.ROWS)
    mazo.scores(linear, [nothing], 1.0, 1.0, tile, 0)
    assert tile.isfinite().all()
    sizes = linear.weight.matrix.abs()
    torch.testing.assert_close(tile, sizes / sizes.sum(1, keepdim=True))


# --------------------------------------------------------------------------------------------- the runs


def test_a_run_looks_at_examples_of_every_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a step has fewer examples than there are tasks."""
    seen: list[list[int]] = []
    begin = MaZO.calibrate

    def looked(self: MaZO, traversal: Any, batch: Batch) -> None:
        seen.append(tasks_of_rows(batch))
        begin(self, traversal, batch)

    monkeypatch.setattr(MaZO, "calibrate", looked)
    settings = {"space": "mazo", "steps": 1, "head": "none", "estimator": "mezo", "lr": 1e-3}
    for size in (1, 6):
        fit(TrainConfig(**two_tasks(tmp_path / str(size), batch_size=size, **settings)))
        assert set(seen.pop()) == {0, 1}


@pytest.mark.grid  # tests/test_family_spaces.py has a smaller one
def test_a_streamed_run_is_the_resident_run_bitwise(tmp_path: Path) -> None:
    folder, found = tmp_path / "nf4", []
    Quantization(DEMO, folder, kind="causal", bits="nf4").run()
    for where in ("resident", "disk", "host"):
        changes = {"model": str(folder), "residency": where, "space": "mazo", "steps": 2}
        found.append(fit(TrainConfig(**two_tasks(tmp_path / where, **changes))))
    for other in found[1:]:
        assert same_files(other.folder / "adapter", found[0].folder / "adapter")
        assert other.summary["loss_after"] == found[0].summary["loss_after"]


def test_only_the_places_of_the_mask_are_trained(tmp_path: Path) -> None:
    run = fit(TrainConfig(**short_run(tmp_path, space="mazo", sparse_share=0.1, head="none", steps=2)))
    space = run.setup.space
    assert isinstance(space, MaZO)
    for target in space.target_names:
        rows, columns = run.setup.model.linears[target].weight.shape
        assert len(space.parameters[target + VALUES]) == rows * max(1, round(0.1 * columns))
        assert space.parameters[target + VALUES].abs().min() > 0
    calibrate(run.setup)
    assert json.loads((run.folder / "adapter" / SPACE_FILE).read_text())["greedy"] == 1.0


@pytest.mark.parametrize("share", [pytest.param(0.001, marks=pytest.mark.grid), 0.1])
def test_a_dry_run_makes_the_tensors_of_what_comes_before_the_first_step(
    share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention that is only counted gives values that are not there."""
    monkeypatch.setattr(torch.Tensor, "isfinite", lambda value: torch.ones_like(value, dtype=torch.bool))
    save_tiny("llama", tmp_path, dtype=torch.bfloat16)
    model, rows, length = load(tmp_path, bits="nf4", device="cpu", compute_dtype="bf16"), 16, 48
    space, traversal = MaZO(share=share), Traversal(model)
    space.attach(model, 0)
    batch = answer_batch(model.config.vocab_size, rows=rows, length=length)
    batch.attention_mask[-1, -1] = 0
    space.calibrate(traversal, batch)  # scratch is there from now on
    with MemoryMeter() as meter, KernelMemory():
        space.calibrate(traversal, batch)
    made = dry_run(tmp_path, MaZO(share=share)).calibrate
    found = made(Pass(rows, length, Branches.of(True, 0, 2), rows))
    assert sum(found.worst.values()) == pytest.approx(meter.peak_bytes, rel=0.03)


# ------------------------------------------------------------------------------------------ refused


def test_where_there_are_no_gradients_it_is_refused(tmp_path: Path) -> None:
    save_tiny("gemma4", tmp_path / "tiny")
    with pytest.raises(UserError, match=r"--space: got 'mazo', which needs gradients, but gemma4_text"):
        chosen(opened(tmp_path / "tiny"), tiny_task_batch("causal"))
    settings = {"space": "mazo", "head": "none", "steps": 1}
    with pytest.raises(UserError, match=r"--space: got 'mazo'.* not finite numbers; allowed: another, or"):
        fit(TrainConfig(**short_run(tmp_path / "nan", model=str(nan_head(tmp_path)), **settings)))
    with pytest.raises(UserError, match=r"gradients of the examples.*with --estimator dp: another --space"):
        fit(TrainConfig(**short_run(tmp_path / "dp", estimator="dp", lr=1e-3, **settings)))


def test_a_layer_whose_gradient_does_not_come_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its block is gone when that is known."""
    save_tiny("llama", tmp_path)
    model, take = opened(tmp_path), mazo.Importance.take
    lost = next(name for name in model.linears if model.block_of(name) == 1)

    def some(self: mazo.Importance, target: str, *given: Any) -> None:
        if target != lost:
            take(self, target, *given)

    monkeypatch.setattr(mazo.Importance, "take", some)
    with pytest.raises(UserError, match=r"--space: got 'mazo'.*llama has layers .* that no loss depends on"):
        chosen(model, tiny_task_batch("causal"))


def test_other_settings_are_refused(tmp_path: Path) -> None:
    given = {"model": "m", "task": "sst2", "space": "mazo"}
    with pytest.raises(UserError, match=r"mazo_greedy: got -1.0, allowed: a number of 0.0 or more"):
        TrainConfig(**given, mazo_greedy=-1.0)
    for changes, flag in (({"greedy": -1.0}, "greedy"), ({"size": float("inf")}, "size")):
        with pytest.raises(UserError, match=f"--mazo-{flag}: got .*, allowed: a number of 0 or more"):
            MaZO(**changes)  # type: ignore[arg-type]
    save_tiny("llama", tmp_path)
    model = opened(tmp_path)
    space = MaZO(greedy=0.5)
    space.attach(model, 0)
    space.save(tmp_path / "saved")
    other = MaZO(greedy=1.0)
    other.attach(model, 0)
    with pytest.raises(UserError, match=r"greedy: it has 0.5, this run 1.0"):
        other.load(tmp_path / "saved")
    assert set(space.frozen) == {target + INDEX for target in space.target_names}
