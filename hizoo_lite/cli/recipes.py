"""`hizoo-lite recipes`: settings for a purpose, to run as they are or to begin one's own from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hizoo_lite.config import refuse
from hizoo_lite.files import storage_errors, write_text
from hizoo_lite.train import config_file


def command(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="print this one")] = None,
    out: Annotated[
        str | None, typer.Option(metavar="FILE.toml", help="copy it there, to change it (not over a file)")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="print JSON, nothing else")] = False,
) -> None:
    """List the recipes that `hizoo-lite train --config` takes, print one, or copy it.

    Flags override what a recipe says.

    Examples:

    hizoo-lite recipes

    hizoo-lite recipes exact --out mine.toml

    hizoo-lite train --config exact --model models/opt-125m --task sst2 --data data/sst2
    """
    from hizoo_lite.cli import output

    if name is None:
        if out is not None:
            refuse([f"--out: got {out!r}, but no recipe; allowed: hizoo-lite recipes NAME --out FILE"])
        found = {recipe: purpose(config_file.find(recipe)) for recipe in config_file.recipes()}
        if json:
            output.print_json({"recipes": found})
        else:
            output.print_table("recipes", ["name", "for"], [list(row) for row in found.items()])
        return
    if name not in config_file.recipes():
        refuse([f"NAME: got {name!r}, allowed: {', '.join(config_file.recipes())}"])
    path = config_file.find(name)
    if out is not None:
        copy(path, Path(out))
        typer.echo(f"{out}: {name}, to change; run it with: hizoo-lite train --config {out}")
    elif json:
        output.print_json({"name": name, "purpose": purpose(path), "file": str(path)})
    else:
        typer.echo(path.read_text(encoding="utf-8").rstrip("\n"))


def purpose(path: Path) -> str:
    """The first sentence of the comment that a recipe begins with."""
    lines: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#") or line.strip() == "#":
            break
        lines.append(line.lstrip("# ").strip())
    return " ".join(lines).partition(". ")[0].rstrip(".")


def copy(path: Path, out: Path) -> None:
    """Raises UserError if there is a file already."""
    if out.exists():
        refuse([f"--out: {out} is there already; allowed: a new file"])
    with storage_errors(out):
        write_text(out, path.read_text(encoding="utf-8"))
