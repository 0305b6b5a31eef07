"""`hizoo-lite quantize`: a checkpoint in bitsandbytes' form, one file a block, for every later run."""

from __future__ import annotations

import time
from typing import Annotated, Any, Literal

import typer


def command(
    model: Annotated[str, typer.Option(help="folder or hub id, in 16 or 32 bits")],
    out: Annotated[str, typer.Option(metavar="DIR", help="new folder, or that of an unfinished call")],
    bits: Annotated[str, typer.Option(metavar="nf4|fp4|int8", help="stored form")] = "nf4",
    double_quant: Annotated[
        bool, typer.Option("--double-quant/--no-double-quant", help="of 4-bit weights: absmax in 8 bits")
    ] = True,
    kind: Annotated[Literal["auto", "causal", "masked", "classifier"], typer.Option()] = "auto",
    revision: Annotated[str | None, typer.Option(help="branch, tag or commit of a hub id")] = None,
    json: Annotated[bool, typer.Option("--json", help="print JSON, nothing else")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="plain lines in place of a progress bar")] = False,
) -> None:
    """Quantize a model once. transformers loads the result too.

    Memory is that of the largest matrix. An interrupted call goes on where it stopped when it is repeated.

    Examples:

    hizoo-lite quantize --model models/opt-13b --out models/opt-13b-nf4

    hizoo-lite quantize --model models/opt-13b --bits int8 --out models/opt-13b-int8
    """
    from hizoo_lite.train import preflight

    preflight.check_model(model, revision)
    from hizoo_lite.cli import output, progress

    output.say_loading()
    from hizoo_lite.export.quantize import Quantization
    from hizoo_lite.model import kinds

    source = kinds.model_path(model)
    found = kinds.find_kind(source, revision, None) if kind == "auto" else kind
    began = time.perf_counter()
    chosen: Any = bits  # checked there
    work = Quantization(source, out, kind=found, bits=chosen, double_quant=double_quant, revision=revision)
    figures, line = progress.write_checkpoint(work, out, bits, "quantize", began, quiet)
    if json:
        about = {"model": model, "out": out, "bits": bits, "double_quant": work.double_quant, "kind": found}
        output.print_json({**about, **figures})
    else:
        typer.echo(line)
