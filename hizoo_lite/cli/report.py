"""`hizoo-lite report`: the page of a run, or of two runs beside each other."""

from __future__ import annotations

from typing import Annotated

import typer


def command(
    run: Annotated[str, typer.Argument(metavar="RUN", help="run folder")],
    other: Annotated[
        str | None, typer.Argument(metavar="[RUN2]", help="another one to compare it with")
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="the HTML file; PNG and JSON go beside it (default: RUN/report.html)"
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="print the report as JSON, nothing else")] = False,
) -> None:
    """Show what a run did and where its memory went: one HTML page that opens from disk, a PNG, a JSON.

    A run has these drawn at its end, except with HIZOO_LITE_REPORT=0 in the environment. A comparison is
    written to RUN/report-with-RUN2.html.

    Examples:

    hizoo-lite report runs/sst2

    hizoo-lite report runs/sst2 runs/sst2-mezo --out compare.html

    hizoo-lite report runs/sst2 --json
    """
    from hizoo_lite.cli import output

    output.say_drawing()
    from hizoo_lite.report.report import write_report

    written = write_report([run] if other is None else [run, other], out)
    if json:
        typer.echo(written.json.read_text(encoding="utf-8"), nl=False)
    else:
        typer.echo("\n".join(map(str, written)))
