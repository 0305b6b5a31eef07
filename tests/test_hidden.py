"""Hidden states below the first trained block, computed once: losses are those of all blocks."""

from __future__ import annotations

import errno
import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from hizoo_lite.batch import Batch
from hizoo_lite.branches import Branches
from hizoo_lite.config import TrainConfig
from hizoo_lite.engine import head, hidden
from hizoo_lite.engine.hidden import first_trained
from hizoo_lite.engine.load import load
from hizoo_lite.engine.traversal import Traversal
from hizoo_lite.errors import StorageError, UserError
from hizoo_lite.run import Run, fit
from hizoo_lite.train import loop, progress, setup
from hizoo_lite.train.progress import Progress
from hizoo_lite.train.step import StepRecord
from tests.batches import tiny_task_batch
from tests.test_fanout import EVERY, FLOAT32_ROUNDING, MU, opened, rows_seen, trained_on_top

#: Hand more than hidden states from block to block, or read them elsewhere.
UNSUITED = {"gemma4"}


def known(model: Any, batch: Batch) -> Batch:
    """With hidden states, and nothing at padding, as a run keeps them."""
    found = Traversal(model).hidden_states(batch, first_trained(model))
    return batch._replace(hidden=np.where(np.asarray(batch.attention_mask)[..., None], found, np.float32(0)))


@pytest.mark.parametrize("name", EVERY)
def test_losses_are_those_of_all_blocks(name: str, tmp_path: Path) -> None:
    model = opened(name, tmp_path, num_hidden_layers=4)
    directions = trained_on_top(model)
    traversal, batch = Traversal(model), tiny_task_batch(model.kind, 3)
    wanted = traversal.losses(batch, Branches.of(), MU, directions).per_example
    evaluated = traversal.losses(batch).per_example
    held, seen = known(model, batch), rows_seen(model)
    found = traversal.losses(held, Branches.of(), MU, directions).per_example
    assert model.reads_below == (name in UNSUITED)
    if name not in UNSUITED:
        assert seen == [9]  # the last of four blocks, three branches of three rows
    torch.testing.assert_close(found, wanted, rtol=0, atol=FLOAT32_ROUNDING)
    assert torch.equal(traversal.losses(held).per_example, evaluated)
    assert not model.reads_again


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_so_are_a_classifiers(name: str, tmp_path: Path) -> None:
    model = opened(name, tmp_path, "classifier")
    directions = trained_on_top(model)
    traversal, batch = Traversal(model), tiny_task_batch(model.kind, 3)
    wanted = traversal.losses(batch, Branches.of(), MU, directions).per_example
    found = traversal.losses(known(model, batch), Branches.of(), MU, directions).per_example
    assert not model.reads_below
    torch.testing.assert_close(found, wanted, rtol=0, atol=FLOAT32_ROUNDING)


def test_a_streamed_model_brings_in_only_what_is_run(tmp_path: Path) -> None:
    resident = opened("llama", tmp_path, num_hidden_layers=4)
    stored: dict[str, Any] = {"bits": "none", "compute_dtype": "float32", "residency": "disk"}
    model = load(tmp_path, kind="causal", device="cpu", **stored)
    model.residency.prepare()  # type: ignore[attr-defined]
    batch, moved = tiny_task_batch("causal", 3), []
    for one in (resident, model):
        directions = trained_on_top(one)
        held = known(one, batch)
        found = Traversal(one).losses(held, Branches.of(), MU, directions).per_example
        moved.append(found)
    assert torch.equal(*moved)
    asked: list[int] = []
    acquire = model.residency.acquire
    model.residency.acquire = lambda block: asked.append(block) or acquire(block)  # type: ignore[method-assign, func-returns-value]
    before = model.residency.moved_bytes  # type: ignore[attr-defined]
    for _ in range(3):
        Traversal(model).losses(held, Branches.of(), MU, directions)
    assert asked == [3, 3, 3]
    assert model.residency.moved_bytes == before  # type: ignore[attr-defined]  # it is in its slot


# -------------------------------------------------------------------------------------------- runs


def settings(**changes: Any) -> dict[str, Any]:
    """The demo's model with the last of its blocks trained; every example comes thrice."""
    given = {
        "model": "embedded",
        "task": "embedded",
        "data": "embedded",
        "device": "cpu",
        "blocks": 1,
        "steps": 12,
        "batch_size": 8,
        "train_examples": 32,
        "test_examples": 8,
        "dev_examples": 0,
        "eval_every": 0,
        "save_every": 0,
        "lr": 0.01,
        "lr_schedule": "constant",
    }
    return {**given, **changes}


def losses_of(folder: Path) -> list[list[float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["losses"] for line in lines if line["kind"] == "step"]


def trained(tmp_path: Path, name: str, **changes: Any) -> Path:
    fit(TrainConfig(**settings(**changes), out=str(tmp_path / name)))
    return tmp_path / name


def adapter(folder: Path) -> bytes:
    return (folder / "adapter/adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that keeps them."""
    return trained(tmp_path_factory.mktemp("hidden"), "run")


def test_a_run_with_them_is_one_without(undisturbed: Path, tmp_path: Path) -> None:
    with_them, without = undisturbed, trained(tmp_path, "without", hidden_states="off")
    np.testing.assert_allclose(losses_of(with_them), losses_of(without), rtol=0, atol=FLOAT32_ROUNDING)
    assert '"hidden_states": "kept"' in (with_them / "run.json").read_text()
    assert '"hidden_states": "kept"' not in (without / "run.json").read_text()
    assert not list(with_them.glob("hidden.*"))  # a finished run needs them no more


def test_where_examples_do_not_come_twice_none_are_kept(tmp_path: Path) -> None:
    folder = trained(tmp_path, "few", steps=7)
    assert '"kept"' not in (folder / "run.json").read_text()
    fit(TrainConfig(**settings(steps=12), out=str(folder), resume=True))  # as it was begun
    assert '"kept"' not in (folder / "run.json").read_text()


@pytest.mark.parametrize(
    "harm",
    [
        *("none", "changed", "removed"),
        *(pytest.param(harm, marks=pytest.mark.grid) for harm in ("cut", "garbled", "another's")),
    ],
)
def test_a_resumed_run_is_the_undisturbed_one(harm: str, undisturbed: Path, tmp_path: Path) -> None:
    stopped = tmp_path / "stopped"

    def fail(self: Any) -> None:
        if self.position.step == 5:
            raise loop.Interrupted
        original(self)

    original = loop.Loop._step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Loop, "_step", fail)
        fit(TrainConfig(**settings(), out=str(stopped)))
    data = stopped / "hidden.bin"
    kept = data.read_bytes()
    if harm == "cut":
        data.write_bytes(kept[:-100])
    elif harm == "changed":
        data.write_bytes(kept[:-4] + b"\0\0\x80?")
    elif harm == "removed":
        data.unlink()
    elif harm == "garbled":
        (stopped / "hidden.json").write_text("{")
    elif harm == "another's":
        data.write_bytes(bytes(len(kept)))
        about = json.loads((stopped / "hidden.json").read_text())
        about |= {"blake2b": hashlib.blake2b(data.read_bytes()).hexdigest(), "of": {"train": "others"}}
        (stopped / "hidden.json").write_text(json.dumps(about))
    fit(TrainConfig(**settings(steps=12), out=str(stopped), resume=True))
    assert losses_of(stopped) == losses_of(undisturbed)
    assert adapter(stopped) == adapter(undisturbed)


class Watches(Progress):
    """Notes what it is told, and after every step how large the file is and how much was moved."""

    def __init__(self) -> None:
        super().__init__()
        self.phases: list[tuple[str, int]] = []
        self.done: list[int] = []
        self.sizes: set[int] = set()
        self.moved: list[int] = []

    def phase(self, label: str, total: int, done: int = 0) -> None:
        self.phases.append((label, total))
        self.done.append(done)

    def advanced(self, units: int) -> None:
        self.done[-1] += units

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        path = Path(args.output_dir) / "hidden.bin"
        self.sizes.add(path.stat().st_size if path.exists() else 0)
        self.moved.append(getattr(self.residency, "moved_bytes", 0))


def watched(tmp_path: Path, **changes: Any) -> tuple[Watches, Run]:
    """A run, each of whose steps is watched."""
    watches, prepare = Watches(), setup.prepare_blocks

    def prepared(model: Any, *given: Any) -> None:
        watches.residency = model.residency
        prepare(model, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "prepare_blocks", prepared)
        run = fit(TrainConfig(**settings(**changes), out=str(tmp_path / "run")), callbacks=[watches])
    return watches, run


def test_the_plan_counts_the_file_to_the_byte(tmp_path: Path) -> None:
    watches, run = watched(tmp_path)
    plan = run.setup.plan
    assert plan is not None
    assert watches.sizes == {plan.ledger.disk["hidden_states"]}
    assert plan.assumed == ()


@pytest.mark.parametrize(
    ("blocks", "changes"),
    [
        (1, {}),
        (2, {"hidden_states": "off"}),
        (3, {}),
        pytest.param(3, {"exact_blocks": 3, "lr": "auto", "lr_schedule": "linear"}, marks=pytest.mark.grid),
        (2, {"exact_blocks": 2, "lr": "auto", "lr_schedule": "linear"}),
        pytest.param(
            3, {"exact_blocks": 2, "lr_schedule": "linear", "hidden_states": "off"}, marks=pytest.mark.grid
        ),
    ],
    ids=str,
)
def test_the_plan_says_what_a_step_moves(blocks: int, changes: dict[str, Any], tmp_path: Path) -> None:
    watches, run = watched(tmp_path, bits="none", residency="disk", blocks=blocks, **changes)
    assert run.setup.plan is not None
    before, after = watches.moved[-2:]
    assert run.setup.plan.moved_bytes == after - before
    assert (after > before) == (blocks > 2 or "hidden_states" in changes)


def test_how_far_they_are_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    watches, _ = watched(tmp_path)
    assert watches.phases == [
        ("evaluate before", 8),
        ("hidden states", 32),
        ("train", 12),
        ("evaluate after", 8),
    ]
    assert watches.done == [8, 32, 0, 8]
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    fit(TrainConfig(**settings(), out=str(tmp_path / "lines")), callbacks=[progress.Lines()])
    shown = capsys.readouterr().err
    assert "hidden states 8/32, ETA " in shown
    assert "train 12/12: mean loss " in shown


class Removes(Progress):
    """Takes the file away after the third step."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def stepped(self, record: StepRecord) -> None:
        if record.step == 2:
            self.path.unlink()


def test_a_file_that_is_gone_in_the_middle_ends_the_run_saved(undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(
        StorageError, match=r"hidden\.bin: cannot be read: .*step-000003 is the last good state"
    ):
        fit(TrainConfig(**settings(), out=str(folder)), callbacks=[Removes(folder / "hidden.bin")])
    fit(TrainConfig(**settings(), out=str(folder), resume=True))
    assert adapter(folder) == adapter(undisturbed)


def test_a_disk_that_is_full_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(hidden, "write_text", full)
    with pytest.raises(StorageError, match=r"hidden\.json: cannot be written: No space left on device"):
        trained(tmp_path, "run")
    monkeypatch.undo()
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"are needed at .*: --hidden-states off"):
        trained(tmp_path, "other")


def test_a_streamed_run_is_the_resident_one(tmp_path: Path) -> None:
    resident = trained(tmp_path, "here", bits="none")
    streamed = trained(tmp_path, "streamed", bits="none", residency="disk")
    assert losses_of(resident) == losses_of(streamed)
    assert adapter(resident) == adapter(streamed)


def test_exact_blocks_take_them(tmp_path: Path) -> None:
    changes = {"blocks": "auto", "exact_blocks": 1, "lr": "auto", "lr_schedule": "linear"}
    with_them = trained(tmp_path, "with", **changes)
    without = trained(tmp_path, "without", hidden_states="off", **changes)
    np.testing.assert_allclose(losses_of(with_them), losses_of(without), rtol=0, atol=FLOAT32_ROUNDING)
    assert len(losses_of(with_them)) == 12


def test_gradients_of_a_long_head_are_the_resident_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "MOST_ROWS", 6)  # less than the scored tokens of a batch
    changes = {"bits": "none", "lr": "auto", "lr_schedule": "linear", "steps": 3}
    resident = trained(tmp_path, "here", **changes)
    streamed = trained(tmp_path, "streamed", residency="disk", **changes)
    assert losses_of(resident) == losses_of(streamed)
