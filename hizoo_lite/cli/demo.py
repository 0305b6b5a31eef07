"""`hizoo-lite demo`: the shipped demo profile through the ordinary `fit`, and a table of what changed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from hizoo_lite.cli.train import INTERRUPTED, resume_line
from hizoo_lite.train import config_file

if TYPE_CHECKING:
    from hizoo_lite.run import Run

#: Test sentences shown, the first ones of the test split.
_SAMPLES = 8


def command(
    out: Annotated[
        str | None,
        typer.Option(metavar="RUN", help="run folder; without it ./hizoo-demo, with a number if taken"),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="print the summary as JSON, nothing else")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="plain lines in place of a progress bar")] = False,
) -> None:
    """Quantize, tune and evaluate a tiny embedded model: the whole story in under three minutes on a CPU.

    The model and its sentiment task are part of the package; nothing is downloaded.

    Examples:

    hizoo-lite demo

    hizoo-lite demo --out runs/demo
    """
    from hizoo_lite.cli import output, progress

    output.say_loading()
    from hizoo_lite.run import fit
    from hizoo_lite.train.folder import next_free

    config = config_file.resolve("demo", {"out": out or str(next_free("hizoo-demo"))})
    run = fit(config, callbacks=[progress.display(quiet)])
    if json:
        output.print_json(run.summary)
    else:
        output.print_run(run.summary)
        _print_samples(run)
    typer.echo(f"saved in {run.folder} (adapter in PEFT format, summary.json, report.html)", err=True)
    if run.interrupted:
        typer.echo(f"interrupted; go on with: {resume_line(str(run.folder))}", err=True)
        raise typer.Exit(INTERRUPTED)
    output.print_commands(run.folder, run.summary)


def _print_samples(run: Run) -> None:
    """The first test sentences with the model's verdicts."""
    from hizoo_lite.cli import output

    if run.before is None or run.after is None:
        return
    rows = []
    samples = zip(
        run.setup.splits.test[:_SAMPLES], run.before.predictions, run.after.predictions, strict=False
    )
    for example, before, after in samples:
        words = [answer.strip() for answer in example.answers]
        right = words[example.gold]
        marked = [words[int(p)] + ("" if words[int(p)] == right else " (wrong)") for p in (before, after)]
        rows.append([str(example.fields["sentence"]), right, *marked])
    output.print_table("some test sentences", ["sentence", "truth", "before", "after"], rows)
