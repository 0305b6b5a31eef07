"""`hizoo-lite generate`: text from a causal model, with or without an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hizoo_lite.cli.options import DeviceBudget, Onnx, Profile, Residency, of_profile, refuse_with_onnx


def command(
    prompt: Annotated[str, typer.Option(help="text to continue")],
    model: Annotated[
        str | None, typer.Option(help="folder or hub id; without it the one the adapter was made for")
    ] = None,
    adapter: Annotated[
        str | None, typer.Option(metavar="RUN", help="run folder, or a PEFT adapter's")
    ] = None,
    onnx: Onnx = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the most likely token")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="sample from this share of the mass")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="of the sampling")] = 0,
    bits: Annotated[str | None, typer.Option(metavar="nf4|fp4|int8|none", help="stored form")] = None,
    compute_dtype: Annotated[str | None, typer.Option(metavar="auto|bf16|fp16|float32")] = None,
    device: Annotated[str | None, typer.Option(metavar="auto|cpu|cuda|cuda:N")] = None,
    residency: Residency = None,
    device_budget: DeviceBudget = None,
    profile: Profile = None,
    json: Annotated[bool, typer.Option("--json", help="print JSON, nothing else")] = False,
) -> None:
    """Continue a text.

    Examples:

    hizoo-lite generate --model embedded --prompt "The soup was"

    hizoo-lite generate --adapter runs/sst2 --prompt "The film was" --temperature 0.8 --top-p 0.9

    hizoo-lite generate --onnx exports/sst2 --adapter sst2 --prompt "The film was"
    """
    from hizoo_lite.cli import output

    flags = {"bits": bits, "compute_dtype": compute_dtype, "device": device}
    flags |= {"residency": residency, "device_budget": device_budget}
    given = {name: value for name, value in flags.items() if value is not None}
    sampling: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "seed": seed}
    if onnx is not None:
        from hizoo_lite.edge import answer
        from hizoo_lite.edge.model import OnnxModel

        refused = {"model": model, "profile": profile}
        refuse_with_onnx({**given, **{name: value for name, value in refused.items() if value is not None}})
        source = onnx
        text = answer.continue_text(OnnxModel(Path(onnx), adapter), prompt, max_new_tokens, **sampling)
    else:
        from hizoo_lite.train import preflight

        preflight.check_adapter(adapter)
        preflight.check_model(model)
        from hizoo_lite.engine.generate import generate
        from hizoo_lite.train.saved import load_to_write

        loaded = load_to_write(
            model, adapter, of_profile(profile, given) | given, len(prompt) + max_new_tokens
        )
        source = loaded.source
        text = generate(loaded, prompt, max_new_tokens, **sampling)
    if json:
        output.print_json({"prompt": prompt, "text": text, "model": source, "adapter": adapter})
    else:
        typer.echo(prompt + text)
