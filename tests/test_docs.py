"""README and guides: links lead somewhere, flags exist, and every block of a guide runs."""

from __future__ import annotations

import doctest
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import hizoo_lite
from hizoo_lite import base
from hizoo_lite.cli import app
from hizoo_lite.edge.__main__ import main as edge
from hizoo_lite.spaces.targets import settled

ROOT = Path(__file__).parents[1]
GUIDES = sorted((Path(hizoo_lite.__file__).parent / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / ".github" / "CONTRIBUTING.md", ROOT / "tools" / "RESULTS.md", *GUIDES]
#: Commands that are not run here, by how they begin: why.
ELSEWHERE = {
    "python3 -m venv": "installs; the two commands of README, which are tried in a fresh clone",
    ".venv/bin/": "the same",
    "torchrun": "several processes: tests/test_ranks.py starts them",
}


def blocks(path: Path, *languages: str) -> list[tuple[str, str]]:
    """(language, content) of the fenced blocks, in order."""
    found = re.findall(r"^```(\w+)\n(.*?)^```", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [(language, content) for language, content in found if language in languages]


COMMANDS = sorted(
    {
        line.partition("hizoo-lite ")[2]
        for page in PAGES
        for _, block in blocks(page, "sh")
        for line in block.splitlines()
        if line.startswith("hizoo-lite ")
    }
)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_has_flags_that_exist(command: str) -> None:
    name, *arguments = shlex.split(command, comments=True)
    known = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    if hasattr(known, "commands"):
        known = known.commands[arguments.pop(0)]
    assert known.make_context(name, arguments).args == []  # nothing is left over; unknown flags raise


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?://)([^)\s]+)\)", page.read_text(encoding="utf-8")):
        file, _, section = target.partition("#")
        linked = page.parent / file if file else page
        if not (ROOT / "tools").is_dir() and "tools" in file:
            continue  # an installed package has the guides alone
        assert linked.exists(), target
        if section:
            titles = re.findall(r"^#+ (.*)", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert section in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, (
                target
            )


def test_readme_is_short_and_names_every_guide() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 160
    assert all(f"docs/{guide.name}" in text for guide in GUIDES)


def test_readme_says_how_many_exact_blocks_the_console_proposes() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    [(blocks, proposed)] = re.findall(r"of (\d+); the console proposes (\d+)", text)
    assert settled("auto", "auto", int(blocks)) == int(proposed)


def write_files(page: Path) -> None:
    """The files that a page shows behind their names, such as `mine/reviews.csv`, into the working folder."""
    text = page.read_text(encoding="utf-8")
    for name, content in re.findall(r"`([\w/]+\.\w+)`:\n\n```\w+\n(.*?)```", text, re.DOTALL):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(content, encoding="utf-8")


def run(line: str) -> str:
    """What a command of a guide tells, with less work: it must end with exit code 0."""
    words = shlex.split(re.sub(r"--steps [0-9]+", "--steps 2", line), comments=True)
    if "--config" in words and "--resume" not in words:
        words += ["--train-examples", "40", "--test-examples", "8"]
    if words[:3] == ["python", "-m", "hizoo_lite.edge"]:
        assert edge(words[3:]) == 0
        return ""
    assert words[0] == "hizoo-lite", line
    done = CliRunner().invoke(app, words[1:])
    assert done.exit_code == 0, f"{line}: {done.output[-2000:]}"
    return done.output


#: Guides whose commands take a minute; what they run is tested piece by piece elsewhere.
LONG = ("edge", "export", "memory", "methods", "runs")


def with_marks(guides: list[Path]) -> list[Any]:
    """The guides as parameters, the long ones under `grid`."""
    return [
        pytest.param(guide, id=guide.stem, marks=[pytest.mark.grid] if guide.stem in LONG else [])
        for guide in guides
    ]


@pytest.mark.parametrize("guide", with_marks([guide for guide in GUIDES if blocks(guide, "sh")]))
def test_the_commands_of_a_guide_run(guide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HIZOO_LITE_REPORT", "0")
    write_files(guide)
    for _, block in blocks(guide, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            if line and not line.startswith(("#", *ELSEWHERE)):
                run(line)


@pytest.mark.parametrize("guide", [g for g in GUIDES if blocks(g, "python")], ids=lambda guide: guide.stem)
def test_the_python_of_a_guide_runs(guide: Path, tmp_path: Path) -> None:
    """All blocks of a page in one fresh process, one after the other."""
    script = tmp_path / "guide.py"
    script.write_text("\n".join(content for _, content in blocks(guide, "python")), encoding="utf-8")
    if guide.stem == "extending":
        first, second = (content for _, content in blocks(guide, "python"))
        (tmp_path / "signed.py").write_text(first, encoding="utf-8")
        script.write_text(second + SIGNED, encoding="utf-8")
    environment = {**os.environ, "HIZOO_LITE_REPORT": "0", "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


#: What `extending.md` says of its estimator: it trains, and is replayed.
SIGNED = """
from hizoo_lite.cli import app
import sys
shared = "--model embedded --task embedded --data embedded --batch-size 4 --test-examples 4 --device cpu"
for command in (
    f"train {shared} --estimator signed --directions 2 --lr 0.01 --steps 3 --out runs/signed",
    "replay runs/signed",
    "methods",
):
    try:
        app(command.split(), prog_name="hizoo-lite")
    except SystemExit as end:
        assert end.code == 0, command
"""


def test_readme_trains_on_own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = ROOT / "README.md"
    monkeypatch.chdir(tmp_path)
    write_files(readme)
    section = readme.read_text(encoding="utf-8").partition("## Your own data")[2].partition("\n## ")[0]
    [commands] = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
    told = "".join(run(line) for line in commands.replace("models/opt-125m", "embedded").splitlines())
    assert "classification: 6 examples" in told


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cells in one namespace; what is stored of them names no folder of a machine."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HIZOO_LITE_REPORT", "0")
    text = (Path(hizoo_lite.__file__).parent / "docs" / "first_hour.ipynb").read_text(encoding="utf-8")
    assert not re.search(r"[\"\s'](/\w+){2,}|[A-Z]:\\\\", text)
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    space: dict[str, Any] = {}
    for cell in cells:
        exec("".join(cell["source"]), space)
    assert space["run"].summary["steps"] == 30
    assert (tmp_path / "adapters" / "reviews" / "adapter_model.safetensors").is_file()


#: The pages of the site's reference: the paths that each documents. An installed package has no tools.
REFERENCE = import_module("tools.reference").pages() if (ROOT / "tools").is_dir() else {}
#: What the members of an axis provide without being derived from it.
PROTOCOLS = {"optimizers": base.Optimizer}
#: From a section's title to the next one, or the end.
SECTION = re.compile(r"^(Args|Attributes):\n(.*?)(?=^\S|\Z)", re.DOTALL | re.MULTILINE)


def located(path: str) -> Any:
    """What a module has by this name, though a module of its own may be called the same."""
    return resolve_name(":".join(path.rsplit(".", 1)))


def said(owners: tuple[Any, ...], name: str = "") -> str:
    """The docstrings of an object, or of what has this name in a class, its bases and its protocol."""
    found = [vars(owner).get(name) if name else owner for owner in owners if not name or vars(owner)]
    return "\n".join(inspect.getdoc(each) or "" for each in found if each is not None) + "\n"


def entries(text: str) -> set[str]:
    """The names that the sections Args and Attributes explain."""
    lines = re.findall(
        r"^ {4}(\w[\w, ]*):", "\n".join(body for _, body in SECTION.findall(text)), re.MULTILINE
    )
    return {name.strip() for line in lines for name in line.split(",")}


def parameters(function: Any) -> set[str]:
    return {name for name in inspect.signature(function).parameters if name not in ("self", "cls")}


def unexplained(path: str, protocol: Any) -> Iterator[str]:
    """Parameters that nothing explains: of a function, a constructor or a public method.

    Functions and constructors have a section of arguments. A method may name its one or two in the text, as
    `name`, and may leave them to what it overrides.
    """
    found: Any = located(path)
    if not isinstance(found, type):
        yield from (f"{path}: {name}" for name in parameters(found) - entries(said((found,))))
        return
    owners = (*(owner for owner in found.__mro__ if owner is not object), *filter(None, [protocol]))
    fields = getattr(found, "_fields", getattr(found, "__dataclass_fields__", ()))
    own = "__init__" in vars(found) and "hizoo_lite" in getattr(found.__init__, "__module__", "")
    made = set(fields) or (parameters(found.__init__) if own else set())
    own_text = said((found,)) + said((found,), "__init__")
    yield from (f"{path}: {name}" for name in made - entries(own_text))
    for name, value in vars(found).items():
        method = getattr(value, "__func__", value)
        if name.startswith("_") or not inspect.isfunction(method) or method.__module__ != found.__module__:
            continue
        text = said(owners, name)
        named = entries(text) | set(re.findall(r"`(\w+)`", text))
        yield from (f"{path}.{name}: {each}" for each in parameters(method) - named)


@pytest.mark.parametrize("page", REFERENCE)
def test_every_parameter_of_the_reference_is_explained(page: str) -> None:
    assert not [each for path in REFERENCE[page] for each in unexplained(path, PROTOCOLS.get(page))]


def test_the_examples_of_the_reference_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HIZOO_LITE_REPORT", "0")
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner()
    for path in (path for paths in REFERENCE.values() for path in paths):
        found: Any = located(path)
        names = vars(sys.modules[found.__module__])
        for test in finder.find(found, path, globs=dict(names)):
            runner.run(test)
    done = runner.summarize(verbose=False)
    assert done.failed == 0
    assert done.attempted > 60
