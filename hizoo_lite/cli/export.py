"""`hizoo-lite export`: what a run has made, in the format of another program."""

from __future__ import annotations

from typing import Annotated, Literal

import typer


def command(
    run: Annotated[str, typer.Argument(metavar="RUN", help="run folder, or a PEFT adapter's")],
    to: Annotated[Literal["onnx"], typer.Option("--to", help="format")],
    out: Annotated[str, typer.Option(metavar="DIR", help="new folder, or an export to add the adapter to")],
    name: Annotated[str | None, typer.Option(help="of the adapter; default: the run folder's")] = None,
    format: Annotated[
        Literal["exact", "fast"] | None,
        typer.Option(
            help="products of quantized weights; fast codes 4-bit weights anew and rounds activations to 8 "
            "bits, and its error is measured (default: exact)"
        ),
    ] = None,
    merge: Annotated[bool, typer.Option("--merge", help="fold the adapter into the weights")] = False,
    dtype: Annotated[
        Literal["fp16", "float32"] | None, typer.Option(help="of merged weights (default: fp16)")
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

    hizoo-lite export runs/sst2 --to onnx --out onnx/merged --merge --dtype float32
    """
    from hizoo_lite.cli import output, progress
    from hizoo_lite.export.onnx.export import export_onnx
    from hizoo_lite.memory.sizes import format_bytes

    export = export_onnx(
        run, out, name=name, format=format, merge=merge, dtype=dtype, listener=progress.listener(quiet)
    )
    if json:
        output.print_json({"out": out, **export.record})
        return
    record, check = export.record, export.record["check"]
    size = sum(about["bytes"] for about in record["model"]["files"].values())
    named = f"adapters {', '.join(export.adapters)}" if record["form"] == "base" else record["form"]
    typer.echo(
        f"{out}: {export.kind}, {record['bits']}, {format_bytes(size)}, {named}; logits within "
        f"{check['max_abs_difference']:.1e} of the model's, {check['mean_abs_difference']:.1e} in the mean, "
        f"the same choice at {100 * check['same_choice']:.1f} % of the places"
    )
