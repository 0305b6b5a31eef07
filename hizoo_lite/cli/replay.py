"""`hizoo-lite replay`: what a run has trained, computed again from its journal."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

DIFFERS = 1


def command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="run folder")],
    step: Annotated[
        int | None, typer.Option(metavar="N", help="after how many steps (default: all in the journal)")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="where the checkpoint step-N is written (default: RUN/replayed)"),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="print JSON, nothing else")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="plain lines in place of a progress bar")] = False,
) -> None:
    """Rebuild what a run had trained after any of its steps, bit for bit, from its journal.

    No example is read and no loss computed; a LoRA run does not even need its model. What the run folder has
    of the same step is compared; exit code 1 if something differs.

    Examples:

    hizoo-lite replay runs/sst2

    hizoo-lite replay runs/sst2 --step 750 --out runs/sst2-at-750

    hizoo-lite replay runs/sst2 --json
    """
    from hizoo_lite.cli import output, progress

    output.say_loading()
    from hizoo_lite.train.replay import replay

    shown = progress.display(quiet)

    def stepped(done: int, total: int) -> None:
        if done == 1:
            shown.message(f"replaying {total} steps")
            shown.phase("replay", total)
        shown.advanced(1)

    try:
        found = replay(run, step, out, stepped)
    finally:
        shown.finish()
    if json:
        output.print_json({**found._asdict(), "folder": str(found.folder)})
    else:
        typer.echo(f"{found.steps} steps replayed into {found.folder}")
        for name in found.same:
            typer.echo(f"the same: {name}")
        for name in found.differs:
            typer.echo(f"differs:  {name}")
        if not (found.same or found.differs):
            typer.echo("the run folder has nothing of that step to compare with")
    if found.differs:
        raise typer.Exit(DIFFERS)
