"""The laws of every member: a run with it is planned, trains, is saved, resumes, replays and is exported.

The table is `members.py`; a member's own mathematics is tested in its own file.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import pytest

from hizoo_lite.checkpoints import tensorfile
from hizoo_lite.config import DEMO, TrainConfig, settings
from hizoo_lite.engine.traversal import Traversal
from hizoo_lite.errors import UserError
from hizoo_lite.export import merged, peft
from hizoo_lite.export.quantize import Quantization
from hizoo_lite.registry import Registry
from hizoo_lite.run import Run, categories, evaluate, fit
from hizoo_lite.train import checkpoint, config_file, journal
from hizoo_lite.train.replay import replay
from tests.members import AXES, MEMBERS, TOYS, Case
from tests.run_fixtures import short_run, write_texts

STEPS, SAVED = 4, 2
#: Of the journal.
HEADER = 32
EXPORTS: dict[str, Any] = {
    "peft": lambda run, out: peft.export(run, out),
    "merged": lambda run, out: merged.prepare(run, out).run(),
}


@pytest.fixture(autouse=True, scope="module")
def registered() -> Any:
    """The members of the tests' own beside the others."""
    with pytest.MonkeyPatch.context() as patch:
        for axis, name, line in TOYS:
            patch.setitem(axis.lines, name, line)
        yield


class Trained(NamedTuple):
    """A case, and its run of `STEPS` steps in one go."""

    case: Case
    config: TrainConfig
    run: Run


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The embedded model in NF4 files."""
    folder = tmp_path_factory.mktemp("stored") / "nf4"
    Quantization(DEMO, folder, kind="causal", bits="nf4", double_quant=False).run()
    return str(folder)


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[pytest.mark.grid] * case.grid) for name, case in MEMBERS.items()],
)
def trained(
    request: pytest.FixtureRequest, stored: str, registered: None, tmp_path_factory: pytest.TempPathFactory
) -> Trained:
    case, folder = MEMBERS[request.param], tmp_path_factory.mktemp("member")
    model = "embedded" if "bits" in case.settings else stored
    if case.writes:
        write_texts(folder)
    settings = {"model": model, "steps": STEPS, "save_every": SAVED, "test_examples": 4, **case.settings}
    config = TrainConfig(**short_run(folder, **settings))
    return Trained(case, config, fit(config))


def same_files(ours: Path, theirs: Path) -> bool:
    """Whether two folders have the same tensors, bit for bit."""
    names = sorted(file.relative_to(ours) for file in ours.rglob("*.safetensors"))
    assert names == sorted(file.relative_to(theirs) for file in theirs.rglob("*.safetensors")) != []
    return all(tensorfile.equal(ours / name, theirs / name) for name in names)


@pytest.mark.parametrize("axis", AXES, ids=lambda axis: axis.axis)
def test_every_member_has_its_name_its_settings_and_a_case(axis: Registry[Any]) -> None:
    for name in axis.lines:
        assert axis[name].name == name
        assert set(axis.arguments(name).values()) <= set(settings())
        assert any(case.settings.get(axis.axis) == name for case in MEMBERS.values())
        chosen = TrainConfig(model="m", task="sst2", lr=1e-3, **{axis.axis: name})
        said = axis.said_by(axis.configured(chosen))
        assert said.pop(axis.axis) == name
        assert set(said) <= set(axis.arguments(name).values())


def test_its_settings_round_trip_through_toml(trained: Trained, tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(config_file.write(trained.config))
    assert config_file.read(path) == trained.config


def test_it_is_planned_with_the_bytes_that_it_holds(trained: Trained) -> None:
    found = {line["owner"]: line for line in categories(trained.run.setup)}
    for name in ("adapters", "curvature"):
        assert found[name]["predicted_bytes"] == (found[name]["measured_bytes"] or 0)


def test_it_trains(trained: Trained) -> None:
    run = trained.run
    assert run.summary["skipped_steps"] == 0
    assert run.summary["space"] == trained.config.space
    assert run.summary["estimator"] == (trained.config.estimator if trained.config.estimates else "exact")
    assert run.before is not None
    assert run.after is not None
    assert run.before.loss != run.after.loss


def test_what_is_saved_is_what_was_trained(trained: Trained) -> None:
    assert trained.run.after is not None
    assert evaluate(trained.run.folder).loss == trained.run.after.loss


def test_a_killed_run_goes_on_to_the_same_bits(trained: Trained, tmp_path: Path) -> None:
    """From the checkpoint after two steps: the third is in the journal, the last is computed.

    A secret step is another one when it is computed again; those that were recorded are the same.
    """
    run = tmp_path / "run"
    shutil.copytree(trained.run.folder, run)
    shutil.rmtree(checkpoint.path_of(run / "checkpoints", STEPS))
    shutil.rmtree(run / "adapter")
    data = (run / "journal.bin").read_bytes()
    (run / "journal.bin").write_bytes(data[: len(data) - (len(data) - HEADER) // STEPS])
    resumed = fit(replace(trained.config, out=str(run), resume=True))
    if resumed.setup.stepper.estimator.secret:
        ours, theirs = (journal.read(folder / "journal.bin") for folder in (run, trained.run.folder))
        assert ours[:-1] == theirs[:-1]
        assert ours[-1].coefficients != theirs[-1].coefficients
        assert replay(run, STEPS, tmp_path / "replayed").differs == []
        return
    for part in ("adapter", checkpoint.path_of(Path("checkpoints"), STEPS)):
        assert same_files(run / part, trained.run.folder / part)


def test_a_replay_makes_the_same_bits(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def losses(*args: Any, **kwargs: Any) -> NoReturn:
        raise AssertionError("a replay computes no loss")

    monkeypatch.setattr(Traversal, "losses", losses)
    found = replay(trained.run.folder, STEPS, tmp_path)
    theirs = checkpoint.path_of(trained.run.folder / "checkpoints", STEPS)
    assert found.differs == []
    assert {str(theirs / "curvature.safetensors"), str(theirs / "state.json")} < set(found.same)
    assert any(name.startswith(str(trained.run.folder / "adapter")) for name in found.same)


@pytest.mark.parametrize("form", EXPORTS)
def test_it_is_exported_or_refused_with_one_message(form: str, trained: Trained, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if form in trained.case.exports:
        EXPORTS[form](trained.run.folder, out)
        assert any(out.glob("*.safetensors"))
        return
    with pytest.raises(UserError) as refused:
        EXPORTS[form](trained.run.folder, out)
    assert "\n" not in str(refused.value)
    assert not out.exists()
