"""What is wrong with a command is told before torch is imported, and names of other tools are known."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hizoo_lite import synonyms
from hizoo_lite.cli import app
from hizoo_lite.config import TrainConfig, settings
from hizoo_lite.errors import UserError
from hizoo_lite.train import config_file, preflight

#: Runs a command and tells whether torch was imported for it.
SCRIPT = """
import sys
from hizoo_lite.cli import app
try:
    app(sys.argv[1:], prog_name="hizoo-lite")
except SystemExit as end:
    print("torch" in sys.modules, "transformers" in sys.modules, end.code)
"""
EMBEDDED = "--model embedded --task embedded --data embedded"


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("train --model embedded --task nope", "task: unknown name 'nope'"),
        ("train --model embedded --task sst2 --data nowhere", "no such file or folder: nowhere"),
        ("train --model embedded --task sst2 --data FOLDER", "field 'sentence' or 'text' is missing"),
        (
            "train --model nobody/nothing --task embedded --data embedded",
            "nobody/nothing is not a local folder",
        ),
        ("train --model ./nothing --task embedded --data embedded", "the folder ./nothing does not exist"),
        (
            "train --model embeded --task embedded --data embedded",
            "no folder embeded; did you mean 'embedded'",
        ),
        (f"train {EMBEDDED} --out FOLDER", "is not empty"),
        (f"train {EMBEDDED} --tracker clearml", "clearml is not installed"),
        (f"train {EMBEDDED} --chat-template nope", "--chat-template: got 'nope', allowed: chatml"),
        (
            "train --model SHORT --task embedded --data embedded --max-length 64",
            "model: it has positions for 1 token; allowed: 2 or more",
        ),
        ("train --config nope", "a recipe (chat"),
        ("eval --adapter nowhere", "--adapter: got 'nowhere'"),
        ("generate --adapter nowhere --prompt a", "--adapter: got 'nowhere'"),
        ("generate --model ./nothing --prompt a", "the folder ./nothing does not exist"),
        ("export nowhere --to onnx --out b", "got 'nowhere'"),
        ("plan --model ./nothing", "the folder ./nothing does not exist"),
        ("quantize --model ./nothing --out b", "the folder ./nothing does not exist"),
        pytest.param(
            *("eval --model ./nothing --task embedded --data embedded", "./nothing does not exist"),
            marks=pytest.mark.grid,
        ),
    ],
)
def test_refused_before_torch_is_imported(command: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text('{"other": "a row"}\n')
    (tmp_path / "short").mkdir()
    (tmp_path / "short" / "config.json").write_text('{"max_position_embeddings": 1}')
    places = {"FOLDER": tmp_path / "data", "SHORT": tmp_path / "short"}
    arguments = [str(places.get(word, word)) for word in command.split()]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, cwd=tmp_path
    )
    assert told in done.stderr
    assert done.stdout.split() == ["False", "False", "2"]


def test_a_first_look_passes_what_can_be_run(tmp_path: Path) -> None:
    out = tmp_path / "new"
    preflight.check(TrainConfig(model="embedded", task="embedded", data="embedded", out=str(out)))
    assert not out.exists()  # it only looked


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("--learning-rate", "--lr"), ("--output-dir", "--out"), ("--lora-r", "--rank"), ("--stepz", "--steps")],
)
def test_flags_of_other_tools_are_answered_with_ours(theirs: str, ours: str) -> None:
    done = CliRunner().invoke(app, ["train", theirs, "3"], terminal_width=200)
    assert done.exit_code == 2
    assert f"{theirs} (Possible options: {ours})" in done.stderr


def test_ours_exist_and_theirs_do_not() -> None:
    for ours, theirs in synonyms.THEIRS.items():
        assert ours in settings()
        assert not set(theirs.split()) & set(settings())


def test_the_version_is_shown() -> None:
    from hizoo_lite import __version__

    assert CliRunner().invoke(app, ["--version"]).stdout == f"hizoo-lite {__version__}\n"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_completes_commands(shell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--install-completion" in CliRunner().invoke(app, ["--help"]).stdout
    asked = {
        "bash": {"COMP_WORDS": "hizoo-lite tr", "COMP_CWORD": "1"},
        "zsh": {"_TYPER_COMPLETE_ARGS": "hizoo-lite tr"},
        "fish": {"_TYPER_COMPLETE_ARGS": "hizoo-lite tr", "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
    }[shell]
    environment = {"_HIZOO_LITE_COMPLETE": f"complete_{shell}", **asked}
    done = CliRunner().invoke(app, [], prog_name="hizoo-lite", env=environment)
    assert "train" in done.stdout


def test_settings_in_yaml(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("model: embedded\ntask: embedded\nlr: 1e-3\nmu: 0.001\nbalanced: off\nquiet-typo: 1\n")
    with pytest.raises(UserError, match=r"mine.yaml: quiet-typo: unknown key"):
        config_file.resolve(str(file))
    file.write_text("model: embedded\ntask: embedded\nlr: 1e-3\nbalanced: off\ntargets: [q_proj, v_proj]\n")
    found = config_file.resolve(str(file), {"steps": "3"})
    assert (found.lr, found.balanced, found.targets, found.steps) == (1e-3, "off", "q_proj,v_proj", 3)
    file.write_text("- model\n")
    with pytest.raises(UserError, match="not valid YAML: got"):
        config_file.resolve(str(file))


def test_recipes_are_listed_printed_and_copied(tmp_path: Path) -> None:
    run = CliRunner().invoke
    assert "sst2-lora" in run(app, ["recipes"]).stdout
    copied = tmp_path / "mine.toml"
    assert run(app, ["recipes", "demo", "--out", str(copied)]).exit_code == 0
    assert copied.read_text() == config_file.find("demo").read_text()
    assert run(app, ["recipes", "demo"]).stdout == copied.read_text()
    again = run(app, ["recipes", "demo", "--out", str(copied)])
    assert (again.exit_code, "is there already" in again.stderr) == (2, True)
    assert "NAME: got 'nope', allowed: chat" in run(app, ["recipes", "nope"]).stderr


def test_numbers_in_yaml_are_what_is_seen_or_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("model: embedded\ntask: embedded\nout: 2024-01-02\nsteps: 010\nlr: 1_0.5\nrslora: true\n")
    found = config_file.resolve(str(file))
    assert (found.out, found.steps, found.lr, found.rslora) == ("2024-01-02", 10, 10.5, True)
    for text in ("steps: 1:30", "steps: 0x10", "steps: 0o10", "rslora: on", "rslora: yes", "lr: .nan"):
        key, _, value = text.partition(": ")
        file.write_text(f"model: embedded\ntask: embedded\n{text}\n")
        with pytest.raises(UserError, match=rf"mine\.yaml: {key}: got '{value}', allowed: "):
            config_file.resolve(str(file))
    file.write_text("model: embedded\ntask: embedded\nsteps: !!int 010\n")
    with pytest.raises(UserError, match="not valid YAML: could not determine a constructor"):
        config_file.resolve(str(file))


def test_settings_in_yaml_lists(tmp_path: Path) -> None:
    file = tmp_path / "both.yaml"
    file.write_text("model: embedded\ntask: [sst2, rte]\ndata: [a, b]\ntask_weight: [1e-1, 2]\n")
    assert config_file.resolve(str(file)).task_weight == (0.1, 2.0)
    with pytest.raises(UserError, match="with several tasks"):
        config_file.resolve(str(file), {"epochs": "1"})


def test_a_run_folder_of_another_system_is_its_own(tmp_path: Path) -> None:
    values = {"out": "g\\run", "task": "g\\run\\task.toml", "data": "elsewhere\\data"}
    found = config_file._of_folder(values, tmp_path)
    assert found["task"] == str(tmp_path / "task.toml")
    assert found["data"] == "elsewhere\\data"


def test_only_recipes_are_printed() -> None:
    done = CliRunner().invoke(app, ["recipes", sys.executable])
    assert (done.exit_code, "allowed: chat" in done.stderr) == (2, True)
