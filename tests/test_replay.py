"""What a run has trained is rebuilt from its journal, bit for bit and without its model's forward."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

import pytest
from typer.testing import CliRunner

from hizoo_lite import locks
from hizoo_lite.checkpoints import tensorfile
from hizoo_lite.cli import app
from hizoo_lite.config import DEMO, TrainConfig
from hizoo_lite.engine.traversal import Traversal
from hizoo_lite.errors import UserError
from hizoo_lite.export.quantize import Quantization
from hizoo_lite.run import Run, fit
from hizoo_lite.train import checkpoint
from hizoo_lite.train.replay import replay
from tests.run_fixtures import record_size, short_run, stories

STEPS = 7


def forbid(monkeypatch: pytest.MonkeyPatch) -> None:
    def losses(*args: Any, **kwargs: Any) -> NoReturn:
        raise AssertionError("a replay computes no loss")

    monkeypatch.setattr(Traversal, "losses", losses)


def run_of(folder: Path, **changes: Any) -> Run:
    return fit(TrainConfig(**short_run(folder, **{"steps": STEPS, "save_every": 3, **changes})))


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model in NF4 files, whose blocks can be read one by one."""
    folder = tmp_path_factory.mktemp("stored") / "nf4"
    Quantization(DEMO, folder, kind="causal", bits="nf4", double_quant=False).run()
    return folder


def test_every_checkpoint_is_rebuilt_bitwise_from_blocks_on_disk(
    stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(tmp_path, model=str(stored), space="dense", residency="disk", lr=1e-4)
    forbid(monkeypatch)
    for step in (3, STEPS):
        found = replay(run.folder, step, tmp_path / "out")
        theirs = run.folder / "checkpoints" / f"step-{step:06d}"
        assert found.differs == []
        assert {str(theirs / "curvature.safetensors"), str(theirs / "state.json")} <= set(found.same)
        assert any(name.startswith(str(theirs / "adapter")) for name in found.same)
        assert any(name.startswith(str(run.folder / "adapter")) for name in found.same) == (step == STEPS)
        assert found.folder == tmp_path / f"out/step-{step:06d}"


def test_a_step_between_checkpoints_is_that_of_a_shorter_run(tmp_path: Path) -> None:
    run, shorter = run_of(tmp_path / "a"), run_of(tmp_path / "b", steps=5)
    found = replay(run.folder, 5)
    assert (found.steps, found.same, found.differs) == (5, [], [])
    assert found.folder == run.folder / "replayed/step-000005"
    theirs = shorter.folder / "checkpoints/step-000005"
    for name in ("curvature.safetensors", "adapter/adapter_model.safetensors"):
        assert tensorfile.equal(found.folder / name, theirs / name)
    assert checkpoint.numbers(found.folder) == checkpoint.numbers(theirs)


def test_a_classifiers_head_is_rebuilt(tmp_path: Path) -> None:
    run = run_of(tmp_path, model=stories(), kind="classifier", lr=1e-2)
    found = replay(run.folder)
    assert found.differs == []
    assert found.same
    with tensorfile_of(found.folder) as names:
        assert any("lora" not in name for name in names)


class tensorfile_of:
    """The names in a checkpoint's adapter."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "adapter/adapter_model.safetensors"

    def __enter__(self) -> list[str]:
        return list(tensorfile.load(self.path))

    def __exit__(self, *_: object) -> None:
        pass


def test_skipped_steps_are_replayed_as_steps_that_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, calls = Traversal.losses, [0]

    def losses(self: Traversal, batch: Any, *args: Any, **kwargs: Any) -> Any:
        found = plain(self, batch, *args, **kwargs)
        calls[0] += bool(args or kwargs)
        return found._replace(per_example=found.per_example * float("nan")) if calls[0] in (3, 4) else found

    monkeypatch.setattr(Traversal, "losses", losses)
    run = run_of(tmp_path)
    assert run.summary["skipped_steps"] > 0
    assert replay(run.folder).differs == []


def test_the_best_state_is_compared_with_the_adapter(tmp_path: Path) -> None:
    run = run_of(tmp_path, steps=6, lr=1e-2, mu=1e-2, eval_every=1, keep="best", save_total_limit=1)
    best = run.summary["adapter_step"]
    found = replay(run.folder, best)
    assert found.differs == []
    assert str(run.folder / "adapter/adapter_model.safetensors") in found.same


def test_what_differs_is_named_with_exit_code_1(tmp_path: Path) -> None:
    run = run_of(tmp_path, lr=1e-2)
    path = run.folder / "adapter/adapter_model.safetensors"
    tensors = tensorfile.load(path)
    next(iter(tensors.values()))[0] += 1
    tensorfile.save(path, tensors)
    result = CliRunner().invoke(app, ["replay", str(run.folder)])
    assert result.exit_code == 1
    assert result.stdout.startswith(f"{STEPS} steps replayed into {run.folder / 'replayed'}")
    assert f"differs:  {path}\n" in result.stdout
    assert f"the same: {run.folder / 'checkpoints/step-000007/curvature.safetensors'}\n" in result.stdout
    assert f"replaying {STEPS} steps" in result.stderr
    again = CliRunner().invoke(app, ["replay", str(run.folder), "--step", "2", "--json"])
    assert again.exit_code == 0
    assert json.loads(again.stdout) == {
        "steps": 2,
        "folder": str(run.folder / "replayed/step-000002"),
        "same": [],
        "differs": [],
    }


def test_what_cannot_be_replayed_is_refused(tmp_path: Path) -> None:
    run = run_of(tmp_path, steps=3)
    with pytest.raises(UserError, match=r"--step: got 4, allowed: 0 to 3, the steps of .*journal.bin"):
        replay(run.folder, 4)
    replay(run.folder, 1)
    with pytest.raises(UserError, match=r"--out: .*step-000001 exists already"):
        replay(run.folder, 1)
    first = run.folder / "checkpoints/step-000000"
    state = json.loads((first / "state.json").read_text())
    fewer = {name: value for name, value in state.items() if name not in ("format", "checksum")}
    (first / "state.json").write_text(json.dumps({**fewer, "parameters": [*state["parameters"], "b"]}))
    with pytest.raises(UserError, match=r"does not hold the parameters that state.json beside it names"):
        replay(run.folder, 2)
    (first / "adapter/adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"adapter_model.safetensors: is damaged"):
        replay(run.folder, 2)
    config = run.folder / "config.toml"
    config.write_text(config.read_text().replace("seed = 0", "seed = 1"))
    (first / "state.json").unlink()
    with pytest.raises(UserError, match=r"step-000000: not a complete checkpoint"):
        replay(run.folder, 2)


def test_two_replays_do_not_write_into_one_folder(tmp_path: Path) -> None:
    run, out = run_of(tmp_path, steps=2), tmp_path / "out"
    refused = []

    def second(done: int, total: int) -> None:
        with pytest.raises(UserError, match=rf"--out: another process runs in {out}; wait for it") as error:
            replay(run.folder, 1, out)
        refused.append(error)

    assert replay(run.folder, 2, out, second).differs == []
    assert len(refused) == 2
    assert {path.name for path in out.iterdir()} == {locks.NAME, "step-000002"}


def test_a_journal_of_another_run_or_with_a_gap_is_refused(tmp_path: Path) -> None:
    run, other = run_of(tmp_path / "a", steps=3), run_of(tmp_path / "b", steps=3, seed=1)
    journal = run.folder / "journal.bin"
    whole = journal.read_bytes()
    journal.write_bytes((other.folder / "journal.bin").read_bytes())
    with pytest.raises(UserError, match=r"journal.bin: step 0: seed 1, the run has 0"):
        replay(run.folder)
    journal.write_bytes(whole)
    config = run.folder / "config.toml"
    config.write_text(config.read_text().replace('lr = "auto"', "lr = 0.5"))
    with pytest.raises(UserError, match=r"learning rate and decay were .* it is of another run"):
        replay(run.folder)


def test_a_damaged_journal_is_replayed_up_to_the_damage(tmp_path: Path) -> None:
    run, shorter = run_of(tmp_path / "a", steps=5), run_of(tmp_path / "b", steps=3)
    path, size = run.folder / "journal.bin", record_size(run.folder)
    path.write_bytes(path.read_bytes()[: -2 * size] + bytes(2 * size))
    words = r"the record of step 3 is missing or damaged; .*: --step 0 to --step 3$"
    with pytest.raises(UserError, match=words):
        replay(run.folder)
    with pytest.raises(UserError, match=r"--step: got 4, allowed: 0 to 3, .*record of step 3 is missing or"):
        replay(run.folder, 4)
    assert replay(run.folder, 2).steps == 2
    found = replay(run.folder, 3)
    assert (found.differs, len(found.same)) == ([], 4)
    theirs = shorter.folder / "checkpoints/step-000003/curvature.safetensors"
    assert tensorfile.equal(found.folder / "curvature.safetensors", theirs)


def test_weights_are_replayed_on_the_model_they_were_trained_on(tmp_path: Path) -> None:
    run = run_of(tmp_path, space="dense", lr=1e-4, steps=2)
    record = json.loads((run.folder / "run.json").read_text())
    (run.folder / "run.json").write_text(json.dumps({**record, "weights": "0"}))
    with pytest.raises(UserError, match=r"the run was begun with others than are here now:\n  --model: its"):
        replay(run.folder)
