"""What a finished run offers in Python beside its figures: history, saving, the Hub."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hizoo_lite.checkpoints import hub
from hizoo_lite.cli import app
from hizoo_lite.config import TrainConfig
from hizoo_lite.errors import UserError
from hizoo_lite.run import Run, fit
from tests.run_fixtures import short_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return fit(TrainConfig(**short_run(tmp_path_factory.mktemp("python"), lr=1e-2)))


def test_the_history_is_every_step_and_evaluation(run: Run) -> None:
    kinds = [line["kind"] for line in run.history]
    assert kinds.count("step") == run.summary["steps"]
    assert [line["when"] for line in run.history if line["kind"] == "eval"] == ["before", "after"]


def test_it_is_saved_as_peft_has_it(run: Run, tmp_path: Path) -> None:
    found = {path.name for path in run.save_pretrained(tmp_path / "saved").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "tokenizer.json"} <= found


def test_it_is_pushed_as_it_would_be_saved(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, object]] = []

    class Api:
        def create_repo(self, name: str, *, private: bool, exist_ok: bool) -> None:
            told.append((name, private))

        def upload_folder(self, *, folder_path: Path, repo_id: str) -> str:
            told.append((repo_id, sorted(path.name for path in folder_path.iterdir())))
            return f"address of {repo_id}"

    monkeypatch.setattr(hub, "HfApi", Api)
    assert run.push_to_hub("me/mine") == "address of me/mine"
    assert told[0] == ("me/mine", True)
    assert "adapter_model.safetensors" in told[1][1]  # type: ignore[operator]


def test_a_hub_that_cannot_be_reached_is_one_message(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    class Api:
        def create_repo(self, *arguments: object, **more: object) -> None:
            raise OSError("no route")

    monkeypatch.setattr(hub, "HfApi", Api)
    with pytest.raises(UserError, match=r"push: me/mine cannot be written on the Hub \(no route\)"):
        run.push_to_hub("me/mine")


def test_an_export_is_pushed(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[Path, str]] = []

    def push(folder: Path, name: str, *, private: bool) -> str:
        told.append((folder, name))
        return "there"

    monkeypatch.setattr(hub, "push", push)
    out = str(tmp_path / "out")
    flags = ["export", str(run.folder), "--push", "me/mine"]
    done = CliRunner().invoke(app, [*flags, "--to", "peft", "--out", out])
    assert (done.exit_code, told) == (0, [(Path(out), "me/mine")])
    refused = CliRunner().invoke(app, [*flags, "--to", "onnx", "--out", "b"])
    assert "--push: got 'me/mine', allowed only with --to peft or merged or gguf" in refused.stderr


def test_a_notebook_shows_a_table_of_it(run: Run) -> None:
    shown = run._repr_html_()
    for key in ("loss_before", "loss_after", "metric_before", "metric_after"):
        assert f"<td>{run.summary[key]:.4f}</td>" in shown
    assert "6 steps" in shown
    assert len(repr(run)) < 300


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("progress", "shows"), [(True, True), (False, False)])
def test_a_bar_is_shown_at_a_terminal_unless_it_is_not_wanted(
    progress: bool, shows: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr", Terminal())
    fit(TrainConfig(**short_run(tmp_path, steps=2)), progress=progress)
    assert isinstance(sys.stderr, Terminal)
    assert ("train" in sys.stderr.getvalue()) == shows


def test_a_script_is_shown_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(TrainConfig(**short_run(tmp_path, steps=2)))
    assert capsys.readouterr() == ("", "")
