"""`hizoo-lite export`: what a run has made, in the format of another program."""

from __future__ import annotations

from typing import Annotated, Literal

import typer


def command(
    run: Annotated[str, typer.Argument(metavar="RUN", help="run folder, or a PEFT adapter's")],
    to: Annotated[Literal["onnx"], typer.Option("--to", help="format")],
    out: Annotated[str, typer.Option(metavar="DIR", help="new folder, or an export to add the adapter to")],
    name: Annotated[str | None, typer.Option(help="of the adapter; default: the run folder's")] = None,
    int8: Annotated[
        Literal["exact", "fast"] | None,
        typer.Option(help="products of 8-bit weights; fast rounds activations to 8 bits (default: exact)"),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="print JSON, nothing else")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="plain lines in place of a progress bar")] = False,
) -> None:
    """Export a run for onnxruntime: its base once, its adapter as a file that is swapped at run time.

    The base keeps its quantized weights and is compared with the model before it is left behind. Where DIR
    has the same base already, the adapter alone is added.

    Examples:

    hizoo-lite export runs/sst2 --to onnx --out onnx/opt-125m

    hizoo-lite export runs/rte --to onnx --out onnx/opt-125m --name rte
    """
    from hizoo_lite.cli import output, progress
    from hizoo_lite.export.onnx.export import export_onnx
    from hizoo_lite.memory.sizes import format_bytes

    export = export_onnx(run, out, name=name, int8=int8, listener=progress.listener(quiet))
    if json:
        output.print_json({"out": out, **export.record})
        return
    worst = export.record["check"]["max_abs_difference"]
    size = sum(about["bytes"] for about in export.record["model"]["files"].values())
    typer.echo(
        f"{out}: {export.kind}, {export.record['bits']}, {format_bytes(size)}, adapters "
        f"{', '.join(export.adapters)}; logits within {worst:.1e} of the model's"
    )
