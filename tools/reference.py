"""The site's pages that nobody writes: the reference, from the package's public names; README, results, log.

    pip install -e '.[docs]' && mkdocs build --strict -f .github/mkdocs.yml

mkdocs calls `on_files` and `on_page_markdown`. The guides link as the forge shows them; here a link out of
the guides leads to the page that the site has of that file, and otherwise to the file in the repository.
"""

from __future__ import annotations

import posixpath
import re
from importlib import import_module
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

import hizoo_lite
from hizoo_lite import registry

ROOT = Path(__file__).parents[1]
GUIDES = "hizoo_lite/docs"
#: Files beside the guides that are pages or pictures of the site, by where they are there.
BESIDE = {
    "index.md": "README.md",
    "contributing.md": ".github/CONTRIBUTING.md",
    "results.md": "tools/RESULTS.md",
    "log.md": "tools/LOG.md",
    "quality.png": "tools/quality.png",
    "trajectories.png": "tools/trajectories.png",
}
PLACES = {file: page for page, file in BESIDE.items()}
AXES = {
    "estimators": registry.ESTIMATORS,
    "spaces": registry.SPACES,
    "curvature": registry.CURVATURES,
    "optimizers": registry.OPTIMIZERS,
    "objectives": registry.OBJECTIVES,
}


def entry(path: str) -> str:
    """What mkdocstrings puts the documentation of an object in the place of."""
    return f"::: {path}\n"


def package() -> str:
    """The names of `hizoo_lite` itself, which are no packages."""
    paths = [f"hizoo_lite.{name}" for name in hizoo_lite.__all__ if name not in {*AXES, "tasks"}]
    return "# hizoo_lite\n\n" + "\n".join(map(entry, paths))


def _paper(source: str) -> str:
    """A source behind what it is of; numbers of arXiv lead there."""
    linked = re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", source)
    return f" ({linked})" if source else ""


def axis(folder: str, members: registry.Registry[Any]) -> str:
    """A table of the members of an axis, then the class of each."""
    rows = [
        f"| `{name}` | {line.help}{_paper(line.source)} | {line.holds} |"
        for name, line in members.lines.items()
    ]
    table = "\n".join(["| name | what it is | keeps in memory |", "|---|---|---|", *rows])
    classes = [line.path.replace(":", ".") for line in members.lines.values()]
    paths = [
        path if "." in path else f"{members.folder}.{name}.{path}"
        for path, name in zip(classes, members, strict=True)
    ]
    return f"# {folder}\n\n{table}\n\n" + "\n".join(map(entry, paths))


def tasks() -> str:
    """The built-in tasks, then the public names of the package."""
    module: Any = import_module("hizoo_lite.tasks")
    built_in = ", ".join(f"`{name}`" for name in module.names())
    paths = [f"hizoo_lite.tasks.{name}" for name in module.__all__]
    return f"# tasks\n\nBuilt in: {built_in}.\n\n" + "\n".join(map(entry, paths))


def on_files(files: Files, config: Any) -> Files:
    """Add what is made and what lies beside the guides."""
    made = {"hizoo_lite": package(), **{folder: axis(folder, own) for folder, own in AXES.items()}}
    for name, content in (made | {"tasks": tasks()}).items():
        files.append(File.generated(config, f"reference/{name}.md", content=content))
    for page, file in BESIDE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / file)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Links between files of the repository as links between pages of the site."""
    here = page.file.src_uri
    if here.startswith("reference/"):
        return markdown
    folder = posixpath.dirname(BESIDE.get(here, f"{GUIDES}/{here}"))

    def moved(found: re.Match[str]) -> str:
        target, mark, section = found[1].partition("#")
        file = posixpath.normpath(posixpath.join(folder, target))
        place = PLACES.get(file, posixpath.relpath(file, GUIDES) if file.startswith(GUIDES) else "")
        address = place or f"{config.repo_url}/blob/main/{file}"
        return f"]({address}{mark}{section})"

    return re.sub(r"\]\((?!https?://|#)([^)\s]+)\)", moved, markdown)
