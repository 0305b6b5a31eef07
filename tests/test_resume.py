"""A run goes on from wherever it was stopped to the bytes of one that was not, or says why it cannot."""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hizoo_lite import tasks
from hizoo_lite.checkpoints import fingerprint, tensorfile
from hizoo_lite.checkpoints.checkpoint import Checkpoint
from hizoo_lite.config import DEMO, TrainConfig
from hizoo_lite.curvature import Grouped
from hizoo_lite.engine.traversal import Traversal
from hizoo_lite.errors import BudgetError, StorageError, UserError
from hizoo_lite.files import storage_errors
from hizoo_lite.report.report import write_report
from hizoo_lite.run import Run, fit
from hizoo_lite.spaces import LoRA
from hizoo_lite.train import checkpoint, identity, journal
from hizoo_lite.train.config_file import resolve
from hizoo_lite.train.folder import RunFolder
from hizoo_lite.train.loop import Loop
from hizoo_lite.train.progress import Progress
from hizoo_lite.train.replay import replay
from hizoo_lite.train.step import StepRecord
from tests.run_fixtures import record_size, short_run, write_task

STEPS = 6
MEASURED = ("seconds", "inference_peak_bytes")


class Killed(BaseException):
    """Ends a run where it stands: nothing catches it, so nothing is saved, as after SIGKILL."""


class Told(Progress):
    """Keeps what was said; is killed once so many steps are done."""

    def __init__(self, killed_after: int = -1) -> None:
        self.messages: list[str] = []
        self.killed_after = killed_after

    def message(self, text: str) -> None:
        self.messages.append(text)

    def stepped(self, record: StepRecord) -> None:
        if record.step + 1 == self.killed_after:
            raise Killed


def config_of(folder: Path, **changes: Any) -> TrainConfig:
    settings = {"steps": STEPS, "save_every": 2, "lr": 1e-2, "mu": 1e-2, **changes}
    return TrainConfig(**short_run(folder, **settings))


def run_of(folder: Path, progress: Progress | None = None, **changes: Any) -> Run:
    return fit(config_of(folder, **changes), callbacks=[progress] if progress else [])


def contents(run: Path) -> dict[str, bytes]:
    """What must be the same of two runs."""
    folder = RunFolder(run)
    newest = checkpoint.newest(folder.checkpoints)
    assert newest is not None
    files = [path for top in (folder.adapter, newest) for path in sorted(top.rglob("*")) if path.is_file()]
    found = {str(path.relative_to(run)): path.read_bytes() for path in [*files, folder.journal]}
    lines = [{k: v for k, v in line.items() if k not in MEASURED} for line in folder.read_metrics()]
    return {**found, "metrics": json.dumps(lines).encode()}


@pytest.fixture(scope="module")
def left_alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return contents(run_of(tmp_path_factory.mktemp("alone"), eval_every=2).folder)


#: The files of runs that were stopped after so many steps, and the folder that they were made in.
_STOPPED: dict[int, tuple[Path, dict[Path, bytes]]] = {}


def stopped(folder: Path, after: int = 5, **changes: Any) -> Path:
    """A run that was killed; one without changes is made once, and then put wherever it is wanted."""
    run = folder / "run"
    if not changes and after in _STOPPED:
        first, files = _STOPPED[after]
        config_of(folder)  # writes the task and its data
        for path, content in files.items():
            (run / path).parent.mkdir(parents=True, exist_ok=True)
            (run / path).write_bytes(content.replace(bytes(first), bytes(folder)))
        return run
    with pytest.raises(Killed):
        run_of(folder, Told(after), eval_every=2, **changes)
    if not changes:
        found = {path.relative_to(run): path.read_bytes() for path in run.rglob("*") if path.is_file()}
        _STOPPED[after] = folder, found
    return run


def resumed(folder: Path, told: Told | None = None, **changes: Any) -> dict[str, bytes]:
    return contents(run_of(folder, told, eval_every=2, resume=True, **changes).folder)


@pytest.mark.parametrize(
    "after",
    # before the first checkpoint, behind one, at the end; between two of them others here are killed
    [after if after in (1, 4, 6) else pytest.param(after, marks=pytest.mark.grid) for after in range(1, 7)],
)
def test_a_run_that_is_killed_after_any_step_ends_in_the_same_bytes(
    after: int, left_alone: dict[str, bytes], tmp_path: Path
) -> None:
    stopped(tmp_path, after)
    assert resumed(tmp_path) == left_alone


def killed_at(plain: Any, call: int, when: str) -> Any:
    """A method before or behind whose call of that number the process ends."""
    calls = [0]

    def method(*given: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] == call and when == "before":
            raise Killed
        found = plain(*given, **named)
        if calls[0] == call:
            raise Killed
        return found

    return method


@pytest.mark.parametrize("name", ["_due", "_evaluate", "save"])
@pytest.mark.parametrize("call", [2, pytest.param(3, marks=pytest.mark.grid)])
def test_a_run_that_is_killed_around_evaluations_and_checkpoints_ends_in_the_same_bytes(
    name: str, call: int, left_alone: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for when in ("before", "behind"):
        plain = getattr(Loop, name)

        monkeypatch.setattr(Loop, name, killed_at(plain, call, when))
        with pytest.raises(Killed):
            run_of(tmp_path / when, eval_every=2)
        monkeypatch.setattr(Loop, name, plain)
        assert resumed(tmp_path / when) == left_alone


def test_a_finished_run_that_is_resumed_is_not_changed(left_alone: dict[str, bytes], tmp_path: Path) -> None:
    run_of(tmp_path, eval_every=2)
    assert resumed(tmp_path) == left_alone


def test_the_first_evaluation_is_made_again_where_it_was_cut_off(
    left_alone: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Loop._evaluate

    def evaluate(self: Loop, when: str, *rest: Any, **named: Any) -> Any:
        raise Killed

    monkeypatch.setattr(Loop, "_evaluate", evaluate)
    with pytest.raises(Killed):
        run_of(tmp_path, eval_every=2)
    monkeypatch.setattr(Loop, "_evaluate", plain)
    assert resumed(tmp_path) == left_alone


# ------------------------------------------------------------------------------- what the disk has lost


def test_a_journal_without_its_header_is_begun_again(left_alone: dict[str, bytes], tmp_path: Path) -> None:
    run = stopped(tmp_path, 1)
    for length in (0, 20):
        shutil.rmtree(run)
        stopped(tmp_path, 1)
        (run / "journal.bin").write_bytes((run / "journal.bin").read_bytes()[:length])
        assert resumed(tmp_path) == left_alone


def without(found: dict[str, bytes], *names: str) -> dict[str, bytes]:
    return {name: content for name, content in found.items() if name not in names}


def test_steps_that_metrics_have_lost_are_written_again_from_the_journal(
    left_alone: dict[str, bytes], tmp_path: Path
) -> None:
    run = stopped(tmp_path)
    whole = json.loads(left_alone["metrics"])
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]) + '{"kind": "st')
    told = Told()
    found = resumed(tmp_path, told)
    assert without(found, "metrics") == without(left_alone, "metrics")
    assert "resuming after 5 of 6 steps" in told.messages
    assert any("lacks 1 of 5 steps; 1 are written again" in text for text in told.messages)
    wanted = [{**line, "tokens": None} if line.get("when") is None else line for line in whole]
    again = [
        {**line, "tokens": None} if line.get("when") is None else line
        for line in json.loads(found["metrics"])
    ]
    assert again == wanted
    assert [line["step"] for line in RunFolder(run).read_metrics() if line.get("tokens", 0) is None] == [4]


@pytest.mark.parametrize("missing", [True, pytest.param(False, marks=pytest.mark.grid)])
def test_a_run_without_metrics_goes_on_from_the_journal(
    missing: bool, left_alone: dict[str, bytes], tmp_path: Path
) -> None:
    run = stopped(tmp_path, save_every=0)
    path = run / "metrics.jsonl"
    path.unlink()
    if not missing:
        path.touch()
    told = Told()
    again = run_of(tmp_path, told, eval_every=2, save_every=0, resume=True)
    assert "taking 5 steps from the journal" in told.messages
    assert without(contents(run), "metrics") == without(left_alone, "metrics")
    steps = [line for line in json.loads(left_alone["metrics"]) if line["kind"] == "step"]
    found = [line for line in json.loads(contents(run)["metrics"]) if line["kind"] == "step"]
    assert found == [{**line, "tokens": None} for line in steps[:5]] + steps[5:]
    summary = again.summary
    assert (summary["steps"], summary["forward_passes"], summary["skipped_steps"]) == (6, 12, 0)
    assert summary["loss_before"] is None
    assert summary["loss_after"] == json.loads(left_alone["metrics"])[-1]["loss"]
    assert summary["seconds_per_step"] > 0
    assert write_report([run]).html.is_file()


def test_a_skipped_step_is_written_again_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, calls = Traversal.losses, [0]

    def losses(self: Traversal, batch: Any, *args: Any, **kwargs: Any) -> Any:
        found = plain(self, batch, *args, **kwargs)
        calls[0] += bool(args or kwargs)
        return found._replace(per_example=found.per_example * float("nan")) if calls[0] == 2 else found

    monkeypatch.setattr(Traversal, "losses", losses)
    run = stopped(tmp_path, 5, save_every=0)
    before = [line for line in RunFolder(run).read_metrics() if line["kind"] == "step"]
    assert any(line["skipped"] for line in before)
    (run / "metrics.jsonl").unlink()
    assert run_of(tmp_path, eval_every=2, save_every=0, resume=True).summary["skipped_steps"] == 1
    after = [line for line in RunFolder(run).read_metrics() if line["kind"] == "step"]
    assert after[:5] == [{**line, "seconds": None, "tokens": None} for line in before]


def test_steps_that_metrics_and_journal_have_lost_count(left_alone: dict[str, bytes], tmp_path: Path) -> None:
    run = stopped(tmp_path)
    for name in ("metrics.jsonl", "journal.bin"):
        (run / name).unlink()
    told = Told()
    again = run_of(tmp_path, told, eval_every=2, resume=True)
    assert again.summary["steps"] == STEPS
    assert again.summary["forward_passes"] == 4  # of the last two steps: the others are not known
    assert any("lacks 4 of 4 steps; 0 are written again" in text for text in told.messages)


@pytest.mark.parametrize("lost", [2, 5])
def test_records_of_zeros_at_the_end_are_computed_again(
    lost: int, left_alone: dict[str, bytes], tmp_path: Path
) -> None:
    run = stopped(tmp_path, save_every=0)
    path = run / "journal.bin"
    data, size = path.read_bytes(), record_size(path.parent)
    path.write_bytes(data[: -lost * size] + bytes(lost * size))
    told = Told()
    assert resumed(tmp_path, told, save_every=0) == left_alone
    assert (
        f"{path}: {lost} records after the first {5 - lost} do not hold, as after a power failure: dropped"
        in told.messages
    )
    assert f"resuming after {5 - lost} of 6 steps" in told.messages


def test_a_damaged_record_before_a_checkpoint_ends_replay_but_not_the_run(
    left_alone: dict[str, bytes], tmp_path: Path
) -> None:
    run = stopped(tmp_path)
    path = run / "journal.bin"
    data = bytearray(path.read_bytes())
    data[32 + record_size(path.parent) + 60] ^= 1
    path.write_bytes(data)
    told = Told()
    found = resumed(tmp_path, told)
    assert (
        f"{path}: 4 records after the first 1 do not hold, as after a power failure: dropped" in told.messages
    )
    assert (
        f"{path}: lacks steps 1 to 3: the run goes on from its checkpoint, but replay --step goes up to 1"
    ) in told.messages
    assert without(found, "journal.bin", "metrics") == without(left_alone, "journal.bin", "metrics")
    assert [record.step for record in journal.read(path)] == [0, 4, 5]
    assert replay(run, 1).steps == 1
    with pytest.raises(
        UserError, match=r"the record of step 1 is missing or damaged; .* --step 0 to --step 1"
    ):
        replay(run)


def test_steps_behind_a_gap_of_the_journal_are_computed_again(
    left_alone: dict[str, bytes], tmp_path: Path
) -> None:
    run = stopped(tmp_path)
    path = run / "journal.bin"
    records = journal.read(path)
    found = journal._form(path)
    assert found is not None
    path.unlink()
    with journal.Journal(path, *found[1]) as file:
        for record in records:
            if record.step != 2:
                file.append(record)
    shutil.rmtree(run / "checkpoints/step-000004")
    told = Told()
    assert resumed(tmp_path, told) == left_alone
    assert f"{path}: 2 steps after 2 are taken again" in told.messages


@pytest.mark.parametrize("space", ["dense", pytest.param("lora", marks=pytest.mark.grid)])
def test_a_journal_of_zeros_is_no_obstacle(space: str, tmp_path: Path) -> None:
    settings = {"space": space, "lr": 1e-4}
    alone = contents(run_of(tmp_path / "a", eval_every=2, **settings).folder)
    run = stopped(tmp_path / "b", **settings)
    path = run / "journal.bin"
    path.write_bytes(bytes(path.stat().st_size))
    told = Told()
    found = resumed(tmp_path / "b", told, **settings)
    assert (
        f"{path}: 5 records after the first 0 do not hold, as after a power failure: dropped" in told.messages
    )
    assert any(text.endswith("but replay is over for this run") for text in told.messages)
    assert without(found, "journal.bin") == without(alone, "journal.bin")
    data = path.read_bytes()
    path.write_bytes(b"\x01" + data[1:])
    with pytest.raises(UserError, match=r"is not a journal; move it away: --resume then goes on from the ne"):
        resumed(tmp_path / "b", **settings)


def test_steps_that_the_journal_has_lost_are_computed_again(
    left_alone: dict[str, bytes], tmp_path: Path
) -> None:
    run = stopped(tmp_path)
    path = run / "journal.bin"
    os.truncate(path, path.stat().st_size - 10)
    assert resumed(tmp_path) == left_alone


def test_without_a_journal_a_run_goes_on_from_its_checkpoint(
    left_alone: dict[str, bytes], tmp_path: Path
) -> None:
    run = stopped(tmp_path)
    path = run / "journal.bin"
    path.unlink()
    told = Told()
    found = resumed(tmp_path, told)
    assert (
        f"{path}: lacks steps 0 to 3: the run goes on from its checkpoint, but replay is over for this run"
    ) in told.messages
    assert [record.step for record in journal.read(path)] == [4, 5]
    assert without(found, "journal.bin") == without(left_alone, "journal.bin")
    with pytest.raises(UserError, match="record of step 0 is missing or damaged"):
        replay(run)


def test_a_damaged_checkpoint_is_passed_over_and_named(left_alone: dict[str, bytes], tmp_path: Path) -> None:
    run = stopped(tmp_path)
    path = run / "checkpoints/step-000004/curvature.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    told = Told()
    assert resumed(tmp_path, told) == left_alone
    assert any("is damaged" in text and "an older checkpoint is taken" in text for text in told.messages)
    assert "taking 3 steps from the journal" in told.messages
    assert (run / "checkpoints/damaged-step-000004").is_dir()
    assert [path.name for path in checkpoint.every(run / "checkpoints")] == [
        *("step-000006", "step-000002", "step-000000")
    ]


def test_a_state_in_which_a_bit_is_flipped_is_passed_over(
    left_alone: dict[str, bytes], tmp_path: Path
) -> None:
    run = stopped(tmp_path)
    path = run / "checkpoints/step-000004/state.json"
    whole = path.read_bytes()
    record = json.loads(whole)
    unseen = 0
    for position in range(len(whole)):
        data = bytearray(whole)
        data[position] ^= 1
        path.write_bytes(data)
        try:
            checkpoint.check(path.parent)
        except UserError:
            continue
        unseen += 1
        assert json.loads(path.read_bytes()) == record  # such as white space of another kind
    assert unseen < len(whole) / 10
    place = whole.index(b'"library": "') + len(b'"library": "')
    path.write_bytes(whole[:place] + b"x" + whole[place + 1 :])
    told = Told()
    assert resumed(tmp_path, told) == left_alone
    assert any("state.json: is damaged: its checksum" in text for text in told.messages)


def test_a_checkpoint_under_the_name_of_another_is_passed_over(
    left_alone: dict[str, bytes], tmp_path: Path
) -> None:
    folder = stopped(tmp_path) / "checkpoints"
    shutil.rmtree(folder / "step-000004")
    (folder / "step-000002").rename(folder / "step-000003")
    told = Told()
    assert resumed(tmp_path, told) == left_alone
    assert any("step: got 2, the folder is step-000003; an older" in text for text in told.messages)


def test_a_state_without_its_files_or_of_a_later_format_is_refused(tmp_path: Path) -> None:
    path = stopped(tmp_path, 3) / "checkpoints/step-000002/state.json"
    record = json.loads(path.read_text())
    del record["checksum"]

    def write(**changes: Any) -> None:
        changed = {**record, **changes}
        path.write_text(json.dumps({**changed, "checksum": checkpoint._checksum(changed)}))

    write()
    checkpoint.check(path.parent)
    kept = record["files"]
    for files in (
        {},
        {name: value for name, value in kept.items() if not name.startswith("adapter/")},
        {name: value for name, value in kept.items() if name != "curvature.safetensors"},
    ):
        write(files=files)
        with pytest.raises(UserError, match=r"state.json: files: curvature.safetensors and those of adapter"):
            checkpoint.check(path.parent)
    for count in (-1, 1.0, "1", True):
        write(halvings=count)
        with pytest.raises(UserError, match=r"step-000002: not a complete checkpoint .* is not a count"):
            checkpoint.check(path.parent)
    write(format=3)
    with pytest.raises(UserError, match=r"state.json: format: got 3, this program reads 1 and 2"):
        checkpoint.check(path.parent)


def test_a_checkpoint_of_an_earlier_version_has_no_checksum(
    left_alone: dict[str, bytes], tmp_path: Path
) -> None:
    run = stopped(tmp_path)
    for path in run.glob("checkpoints/*/state.json"):
        record = json.loads(path.read_text())
        del record["checksum"]
        path.write_text(json.dumps(record))
        with pytest.raises(UserError, match="is damaged: its checksum"):
            checkpoint.check(path.parent)
        del record["format"]
        path.write_text(json.dumps(record))
    told = Told()
    assert resumed(tmp_path, told) == left_alone
    assert "taking 1 steps from the journal" in told.messages


def test_a_damaged_line_of_metrics_is_named(tmp_path: Path) -> None:
    run = stopped(tmp_path)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    for bad in (
        *("{\n", "[]\n", '{"kind": "step"}\n', '{"kind": ["step"], "step": 1}\n', '"kind"\n'),
        '{"kind": "step", "step": null, "skipped": false, "forwards": 3}\n',
        '{"kind": "step", "step": 1, "skipped": false, "forwards": "3"}\n',
        '{"kind": "eval", "step": 1}\n',
        '{"kind": "other", "step": 1}\n',
    ):
        (run / "metrics.jsonl").write_text("".join([*lines[:2], bad, *lines[3:]]))
        with pytest.raises(UserError, match=r"metrics.jsonl: line 3 is damaged; remove it and what follows"):
            resumed(tmp_path)
    (run / "metrics.jsonl").write_text("".join(lines))


# ------------------------------------------------------------------------------------ the best on dev


def test_an_evaluation_that_decides_on_the_best_is_made_again_where_it_is_lost(tmp_path: Path) -> None:
    options = {"eval_every": 1, "save_every": 2, "keep": "best"}
    alone = run_of(tmp_path / "a", **options)
    with pytest.raises(Killed):
        run_of(tmp_path / "b", Told(5), **options)
    path = tmp_path / "b/run/metrics.jsonl"
    lines = [line for line in path.read_text().splitlines(keepends=True) if '"kind": "step"' not in line]
    path.write_text("".join(line for line in lines if json.loads(line)["step"] < 4))
    told = Told()
    again = run_of(tmp_path / "b", told, resume=True, **options)
    assert "resuming after 4 of 6 steps" in told.messages
    assert again.summary["adapter_step"] == alone.summary["adapter_step"]
    assert without(contents(again.folder), "metrics") == without(contents(alone.folder), "metrics")

    def judged(folder: Path) -> list[Any]:
        return [(line["step"], line["loss"]) for line in RunFolder(folder).evaluations()]

    assert judged(again.folder) == judged(alone.folder)


@pytest.mark.parametrize("limit", [0, 1])
def test_the_best_state_survives_a_kill_between_its_evaluation_and_its_checkpoint(
    limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"eval_every": 1, "save_every": 0, "keep": "best", "save_total_limit": limit}
    alone = run_of(tmp_path / "a", **options)
    best = alone.summary["adapter_step"]
    assert 0 < best < STEPS  # otherwise the adapter says nothing
    plain = Loop.save

    def save(self: Loop) -> None:
        if self.position.step == best:
            raise Killed
        plain(self)

    monkeypatch.setattr(Loop, "save", save)
    with pytest.raises(Killed):
        run_of(tmp_path / "b", **options)
    monkeypatch.setattr(Loop, "save", plain)
    again = run_of(tmp_path / "b", resume=True, **options)
    assert again.summary["adapter_step"] == best
    assert contents(again.folder) == contents(alone.folder)


def test_a_run_told_late_to_keep_the_best_takes_the_best_that_is_there(tmp_path: Path) -> None:
    stopped(tmp_path, 5, save_every=3)
    run = run_of(tmp_path, eval_every=2, save_every=3, keep="best", resume=True)
    there = {checkpoint.steps_of(path) for path in checkpoint.every(run.folder / "checkpoints")}
    assert run.summary["adapter_step"] in there


# ------------------------------------------------------------------------------------ failures to write


def refusing(plain: Any, first: int) -> Any:
    """A method that raises from its call number `first` on, after its work, as a full disk does."""
    calls = [0]

    def method(self: Any, *rest: Any) -> Any:
        calls[0] += 1
        found = plain(self, *rest)
        if calls[0] >= first:
            with storage_errors(Path("/full")):
                raise OSError(28, "No space left on device", "/full/file")
        return found

    return method


@pytest.mark.parametrize(
    ("owner", "name", "first"),
    [(LoRA, "save", 1), (LoRA, "save", 3), (RunFolder, "append_metrics", 4), (journal.Journal, "append", 3)],
)
def test_a_full_disk_ends_a_run_that_goes_on_to_the_same_bytes(
    owner: Any,
    name: str,
    first: int,
    left_alone: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = getattr(owner, name)
    monkeypatch.setattr(owner, name, refusing(plain, first))
    with pytest.raises(StorageError, match=r"No space left.*--resume goes on after \d steps once this is me"):
        run_of(tmp_path, eval_every=2)
    monkeypatch.setattr(owner, name, plain)
    found = list((tmp_path / "run").rglob("*.tmp"))
    assert found == []
    if first == 1:  # nothing was begun yet
        assert not checkpoint.every(tmp_path / "run/checkpoints")
    assert resumed(tmp_path) == left_alone


def test_a_state_that_is_half_changed_is_not_saved(
    left_alone: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    observe, calls = Grouped.observe, [0]

    def refused(self: Grouped, *rest: Any) -> None:
        calls[0] += 1
        observe(self, *rest)
        if calls[0] == 4:
            raise MemoryError

    monkeypatch.setattr(Grouped, "observe", refused)
    with pytest.raises(BudgetError, match=r"memory ran out.*step-000002 is the last good state, --res"):
        run_of(tmp_path, eval_every=2)
    monkeypatch.setattr(Grouped, "observe", observe)
    assert not (tmp_path / "run/checkpoints/step-000003").exists()
    assert resumed(tmp_path) == left_alone


def test_an_adapter_is_replaced_as_a_whole(tmp_path: Path) -> None:
    run = run_of(tmp_path, steps=1)
    before = contents(run.folder)

    class Refusing:
        def save(self, folder: Path) -> None:
            folder.mkdir()
            (folder / "half").write_text("")
            raise OSError(28, "No space left on device")

    with pytest.raises(StorageError, match="No space left"):
        checkpoint.save_adapter(Refusing(), run.folder / "adapter")  # type: ignore[arg-type]
    assert contents(run.folder) == before
    assert not (run.folder / ".adapter.tmp").exists()


def test_an_adapter_outlives_a_kill_between_its_renames_and_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(tmp_path, steps=2)
    folder, space = run.folder / "adapter", run.setup.space
    before = contents(run.folder)
    plain = os.replace

    def replace_and_die(source: Any, target: Any) -> None:
        plain(source, target)
        if str(target).endswith(".adapter.old"):
            raise Killed

    with monkeypatch.context() as dying:
        dying.setattr(os, "replace", replace_and_die)
        with pytest.raises(Killed):
            checkpoint.save_adapter(space, folder)
    assert not folder.exists()
    with monkeypatch.context() as full:
        full.setattr(LoRA, "save", refusing(LoRA.save, 1))
        with pytest.raises(StorageError, match="No space left"):
            checkpoint.save_adapter(space, folder)
    assert contents(run.folder) == before
    checkpoint.save_adapter(space, folder)
    assert contents(run.folder) == before
    assert not [path for path in run.folder.iterdir() if path.name.startswith(".adapter")]


def test_a_checkpoint_that_cannot_be_removed_is_a_failure_to_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(source: Any, target: Any) -> None:
        raise OSError(30, "Read-only file system")

    (tmp_path / "step-000001").mkdir()
    (tmp_path / "step-000002").mkdir()
    monkeypatch.setattr(os, "replace", refused)
    with pytest.raises(StorageError, match=r"step-000001: cannot be written: Read-only file system"):
        checkpoint.keep(tmp_path, 1)


def test_without_a_sound_checkpoint_the_journal_rebuilds_everything(
    left_alone: dict[str, bytes], tmp_path: Path
) -> None:
    run = stopped(tmp_path)
    folder = run / "checkpoints"
    for path in folder.glob("*/curvature.safetensors"):
        path.write_bytes(b"")
    words = rf"no checkpoint can be used:\n.*is damaged(.|\n)*\nmove {folder} away: --resume then takes"
    with pytest.raises(UserError, match=words):
        resumed(tmp_path)
    folder.rename(tmp_path / "away")
    told = Told()
    assert resumed(tmp_path, told) == left_alone
    assert "taking 5 steps from the journal" in told.messages
    assert replay(run).differs == []


# --------------------------------------------------------------------------------------------- refusals


def test_fewer_steps_than_were_taken_are_refused(tmp_path: Path) -> None:
    run_of(tmp_path, steps=4)
    with pytest.raises(UserError, match=r"--steps: got 3, the run has taken 4 already; allowed: 4 or more"):
        run_of(tmp_path, steps=3, resume=True)


def test_a_folder_that_another_run_took_in_the_meantime_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import hizoo_lite.run as module

    plain, config = module.build, config_of(tmp_path)

    def build(*given: Any, **named: Any) -> Any:
        monkeypatch.setattr(module, "build", plain)
        fit(config)
        return plain(*given, **named)

    monkeypatch.setattr(module, "build", build)
    with pytest.raises(UserError, match=r"holds a run already"):
        fit(config)


def test_a_folder_that_cannot_be_made_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--out: .*file/run cannot be made: Not a directory; allowed"):
        run_of(tmp_path, out=str(tmp_path / "file/run"))


def test_what_a_killed_start_left_does_not_stop_the_next_one(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.config.toml.tmp").write_text("")
    assert run_of(tmp_path, steps=1).summary["steps"] == 1


def test_other_data_another_task_and_another_model_are_named(
    left_alone: dict[str, bytes], tmp_path: Path
) -> None:
    write_task(tmp_path)
    model = tmp_path / "model"
    shutil.copytree(DEMO, model)
    run = stopped(tmp_path, model=str(model))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    data = tmp_path / "data/train.jsonl"
    for path, old, new, words in (
        (data, "game", "play", "--data: the training examples"),
        (tmp_path / "data/test.jsonl", "The", "That", "--data: the test examples"),
        (tmp_path / "moods.toml", "It was", "It is", "--task: its prompts, answers or metrics"),
        (model / "tokenizer_config.json", "{", "{ ", "--model: its tokenizer"),
    ):
        text = path.read_text()
        path.write_text(text.replace(old, new))
        with pytest.raises(UserError, match=rf"the run was begun with others.*\n  {words}\n"):
            resumed(tmp_path, model=str(model))
        path.write_text(text)
    weights = model / "model.safetensors"
    content = weights.read_bytes()
    place = Checkpoint.open(model).place("model.norm.weight")
    weights.write_bytes(content[: place.offset] + b"\x01" + content[place.offset + 1 :])
    with pytest.raises(UserError, match=r"\n  --model: its weights\nput them"):
        resumed(tmp_path, model=str(model))
    weights.write_bytes(content)
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "library": "torch-cuda"}))
    with pytest.raises(UserError, match=r"\n  --device: what it is computed with\n"):
        resumed(tmp_path, model=str(model))
    (run / "run.json").write_text("[")
    with pytest.raises(UserError, match=r"run.json: not valid JSON .* or no file: then nothing is compared"):
        resumed(tmp_path, model=str(model))
    (run / "run.json").write_bytes(before[run / "run.json"])
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert resumed(tmp_path, model=str(model))["metrics"] == left_alone["metrics"]


@pytest.mark.parametrize(
    ("name", "was", "now"),
    [
        *(("batch_size", 4, 8), ("mu", 0.01, 0.02), ("smoothing", 0.01, 0.5), ("max_length", 32, 16)),
        *(("clip", None, 1e-6), ("lr_schedule", "constant", "linear")),
    ],
)
def test_a_config_that_was_edited_is_named(name: str, was: Any, now: Any, tmp_path: Path) -> None:
    run = stopped(tmp_path, 3)
    path = run / "config.toml"
    before = path.read_text()
    line = f"# {name} is not set" if was is None else f"{name} = {json.dumps(was)}"
    assert f"\n{line}\n" in before
    path.write_text(before.replace(f"\n{line}\n", f"\n{name} = {json.dumps(now)}\n"))
    with pytest.raises(UserError) as refused:
        fit(resolve(flags={"resume": True, "out": str(run)}))
    assert str(refused.value) == (
        f"--resume: {name}: the run has {was!r}, got {now!r}; it cannot change on --resume; "
        f"put back into config.toml: {line}"
    )


def test_a_config_that_was_edited_does_not_hide_what_the_run_has(
    left_alone: dict[str, bytes], tmp_path: Path
) -> None:
    run = stopped(tmp_path, 3)
    path = run / "config.toml"
    before = path.read_text()
    path.write_text(before.replace("batch_size = 4\n", "batch_size = 8\n"))
    assert resumed(tmp_path) == left_alone  # which was told 4
    assert path.read_text() == before


def test_a_run_that_keeps_no_settings_is_compared_with_its_config(
    left_alone: dict[str, bytes], tmp_path: Path
) -> None:
    run = stopped(tmp_path, 3)
    record = json.loads((run / "run.json").read_text())
    for unsound in ([], "x"):
        (run / "run.json").write_text(json.dumps({**record, "settings": unsound}))
        with pytest.raises(UserError, match=r"run.json: settings: got .*, allowed: an object"):
            resumed(tmp_path)
    settings = {**record["settings"], "seed": {"": None}}
    (run / "run.json").write_text(json.dumps({**record, "settings": settings}))
    with pytest.raises(UserError, match=r"run.json: settings: seed: got .*, allowed: what config.toml"):
        resumed(tmp_path)
    del record["settings"]
    (run / "run.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"mu: the run has 0.01, got 0.5; it cannot change on --resume$"):
        resumed(tmp_path, mu=0.5)
    assert resumed(tmp_path) == left_alone


@pytest.mark.parametrize("limit", [fingerprint.WHOLE_BYTES, 1 << 20])  # looked at as a whole; by samples
def test_another_config_and_other_weights_of_the_model_are_named(
    limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprint, "WHOLE_BYTES", limit)
    model = tmp_path / "model"
    shutil.copytree(DEMO, model)
    stopped(tmp_path, 1, model=str(model))
    config, weights = model / "config.json", model / "model.safetensors"
    text, content = config.read_text(), weights.read_bytes()
    settings = json.loads(text)
    assert settings["rms_norm_eps"] != 1e-2
    config.write_text(json.dumps({**settings, "rms_norm_eps": 1e-2}))
    with pytest.raises(UserError, match=r"\n  --model: its config.json\nput them back"):
        resumed(tmp_path, model=str(model))
    config.write_text(text)
    place = Checkpoint.open(model).place("model.layers.0.mlp.up_proj.weight")
    begin, end = place.offset + 2000, place.offset + place.nbytes
    weights.write_bytes(content[:begin] + bytes(end - begin) + content[end:])
    with pytest.raises(UserError, match=r"\n  --model: its weights\nput them back"):
        resumed(tmp_path, model=str(model))
    weights.write_bytes(content)
    resumed(tmp_path, model=str(model))


def test_weights_are_told_apart_by_samples_of_every_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprint, "WHOLE_BYTES", 1 << 20)
    monkeypatch.setattr(fingerprint, "_TENSOR_SAMPLES", 8)
    values = {name: np.zeros(1 << 20, np.uint8) for name in ("a", "b")}
    tensorfile.save(tmp_path / "model.safetensors", values)
    first = identity.of_model(tmp_path)["weights"]
    step = ((1 << 20) - 4096) // 3
    for place, seen in ((0, True), (step, True), (step - 1, False), ((1 << 20) - 1, True)):
        changed = values["b"].copy()
        changed[place] = 1
        tensorfile.save(tmp_path / "model.safetensors", {**values, "b": changed})
        assert (identity.of_model(tmp_path)["weights"] != first) == seen
    for name, value in values.items():  # the same tensors in two files
        tensorfile.save(tmp_path / f"{name}.safetensors", {name: value})
    index = {"weight_map": {name: f"{name}.safetensors" for name in values}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "model.safetensors").unlink()  # it would be read in their place
    assert identity.of_model(tmp_path)["weights"] == first


def test_a_thousand_examples_are_looked_at_in_a_few_calls_each() -> None:
    data = Path(__file__).parents[1] / "../shared/data/sst2"
    if not data.is_dir():
        pytest.skip("../shared/data/sst2 is not here")
    task = tasks.get("sst2")
    splits = tasks.make_splits(task, data, train_examples=1000, seed=0)
    calls: list[bool] = []
    sys.setprofile(lambda frame, event, argument: calls.append(event in ("call", "c_call")))
    try:
        found = identity.of_run(splits, task, "", DEMO, "torch-cpu")
    finally:
        sys.setprofile(None)
    assert sum(calls) < 20 * sum(len(part) for part in (splits.train, splits.dev, splits.test))
    other = replace(splits, train=[*splits.train[1:], splits.train[0]])
    changed = identity.of_run(other, task, "", DEMO, "torch-cpu")
    assert {name for name in found if found[name] != changed[name]} == {"train"}


def test_large_files_are_told_apart_by_samples(tmp_path: Path) -> None:
    path, size = tmp_path / "weights", 65 << 20
    path.touch()
    os.truncate(path, size)
    first = fingerprint.of_files([path])
    with path.open("rb+") as file:
        file.seek(size - 1)
        file.write(b"\x01")
    assert fingerprint.of_files([path]) != first
    assert fingerprint.of_files([path, path]) == fingerprint.of_files([path])
