"""README's commands: the one on one's own data runs as it stands there, the others have flags that exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from hizoo_lite.cli import app

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


COMMANDS = [
    line.partition("hizoo-lite ")[2]
    for block in blocks("sh")
    for line in block.splitlines()
    if line.startswith("hizoo-lite ")
]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_has_flags_that_exist(command: str) -> None:
    name, *arguments = shlex.split(command, comments=True)
    known = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    while hasattr(known, "commands"):
        known = known.commands[arguments.pop(0)]
    assert known.make_context(name, arguments).args == []  # nothing is left over; unknown flags raise


def test_the_example_with_own_data_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = README.partition("### Your own data")[2].partition("\n### ")[0]
    for language in ("csv", "toml"):
        [content], [path] = blocks(language, section), re.findall(rf"`(mine/\w+\.{language})`", section)
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(content)
    monkeypatch.chdir(tmp_path)
    [commands] = blocks("sh", section)
    told = ""
    for line in commands.replace("models/opt-125m", "embedded").replace("500", "2").splitlines():
        done = CliRunner().invoke(app, shlex.split(line)[1:])
        assert done.exit_code == 0, done.stderr
        told += done.stderr
    assert "classification: 6 examples, text in 'review', 2 labels in 'verdict' (bad, good)" in told
    assert "reviews, 6 examples: 5 train, 0 dev, 1 test; test held out of train" in told
