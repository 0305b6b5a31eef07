"""`hizoo-lite export`: what a run has made, in the format of another program."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer


def command(
    run: Annotated[str, typer.Argument(metavar="RUN", help="run folder, or a PEFT adapter's")],
    to: Annotated[Literal["onnx", "onnx-train"], typer.Option("--to", help="format")],
    out: Annotated[str, typer.Option(metavar="DIR", help="new folder, or an export to add the adapter to")],
    name: Annotated[str | None, typer.Option(help="of the adapter; default: the run folder's")] = None,
    int8: Annotated[
        Literal["exact", "fast"] | None,
        typer.Option(help="products of 8-bit weights; fast rounds activations to 8 bits (default: exact)"),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="onnx-train: new parameters from the run's seed, not the run's")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="print JSON, nothing else")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="plain lines in place of a progress bar")] = False,
) -> None:
    """Export a run for onnxruntime: its base once, its adapter as a file that is swapped at run time.

    The base keeps its quantized weights and is compared with the model before it is left behind. Where DIR
    has the same base already, the adapter alone is added. onnx-train: a graph of the run's losses, from which
    `python -m hizoo_lite.edge train DIR` tunes further on a device.

    Examples:

    hizoo-lite export runs/sst2 --to onnx --out onnx/opt-125m

    hizoo-lite export runs/rte --to onnx --out onnx/opt-125m --name rte

    hizoo-lite export runs/sst2 --to onnx-train --out onnx/opt-125m-train
    """
    from hizoo_lite.cli import output, progress

    if to == "onnx-train":
        figures, line = _onnx_train(run, out, quiet, fresh=fresh)
        if json:
            output.print_json({"out": out, **figures})
        else:
            typer.echo(line)
        return
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


def _onnx_train(run: str, out: str, quiet: bool, *, fresh: bool = False) -> tuple[dict[str, Any], str]:
    """A training graph: train.json, and a line about it."""
    import math

    from hizoo_lite.cli import progress
    from hizoo_lite.export.onnx_train.export import export_train

    record = export_train(run, out, fresh=fresh, listener=progress.listener(quiet))
    count = sum(math.prod(parameter["shape"]) for parameter in record["parameters"])
    worst = record["check"]["max_abs_difference"]
    line = f"{out}: {record['kind']}, {record['bits']}, {count:,} trainable parameters; "
    return record, line + f"losses within {worst:.1e} of the model's"
