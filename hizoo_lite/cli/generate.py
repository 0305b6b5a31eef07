"""`hizoo-lite generate`: text from a causal model, with or without an adapter.

Sampling draws from a generator of its own (Gumbel noise on the logits, then the largest), because
transformers samples from torch's global one.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hizoo_lite.cli.options import DeviceBudget, Onnx, Profile, Residency, of_profile, refuse_with_onnx

if TYPE_CHECKING:
    from transformers import LogitsProcessor

    from hizoo_lite.model.model import Model


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
        loaded = _load(model, adapter, of_profile(profile, given) | given, len(prompt) + max_new_tokens)
        source = loaded.source
        text = continue_text(loaded, prompt, max_new_tokens, **sampling)
    if json:
        output.print_json({"prompt": prompt, "text": text, "model": source, "adapter": adapter})
    else:
        typer.echo(prompt + text)


def _load(source: str | None, adapter: str | None, flags: dict[str, Any], length: int) -> Model:
    """The model, with room for a text of `length` tokens (characters are at least as many)."""
    from dataclasses import asdict

    from hizoo_lite.base import EVALUATION
    from hizoo_lite.engine.load import load
    from hizoo_lite.engine.residency import Streamed
    from hizoo_lite.errors import UserError
    from hizoo_lite.model import kinds
    from hizoo_lite.plan.estimate import pass_bytes
    from hizoo_lite.plan.workload import cache_bytes
    from hizoo_lite.train import saved

    run = saved.saved_config(adapter)
    if run is not None:
        names = (
            "bits",
            "compute_dtype",
            "device",
            "double_quant",
            "revision",
            "residency",
            "device_budget",
            "host_budget",
        )
        flags = {**{name: asdict(run)[name] for name in names}, **flags}
        source = source or run.model
    if source is None and adapter is not None:
        source = saved.base_model(adapter)
    if not source:
        raise UserError("--model: missing; give a folder or hub id, or an --adapter that names one")
    loaded = load(kinds.model_path(source), kind="causal", **flags)
    if isinstance(loaded.residency, Streamed):
        tokens = min(length, loaded.positions or length)
        cache = cache_bytes(loaded.config, 1, tokens)
        loaded.residency.reserved_bytes = pass_bytes(loaded, 1, tokens, EVALUATION) + cache
        loaded.residency.scratch = None if adapter is None else saved.find_adapter(adapter)
    if adapter is not None:
        saved.attach_adapter(loaded, adapter)
    return loaded


def continue_text(
    model: Model,
    prompt: str,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> str:
    """The text that a causal model writes after `prompt`; a pure function of the arguments.

    temperature 0 takes the most likely token each time; otherwise it is sampled from the most likely ones
    that hold `top_p` of the probability. Raises `UserError` as `answer.continue_text` does.
    """
    import torch
    from transformers import LogitsProcessorList

    from hizoo_lite.edge.answer import check_sampling, prompt_ids
    from hizoo_lite.engine.generate import generated
    from hizoo_lite.errors import UserError
    from hizoo_lite.tasks.tokens import pad_id

    check_sampling(max_new_tokens, temperature, top_p, seed)
    if model.tokenizer is None:
        raise UserError(f"--model: {model.source} has no tokenizer files")
    known = prompt_ids(model.tokenizer, prompt, max_new_tokens, model.positions, model.vocabulary)
    ids = torch.tensor([known])
    processors = LogitsProcessorList(_sampling(model, temperature, top_p, seed) if temperature > 0 else [])
    pad = pad_id(model.tokenizer, model.vocabulary)
    written = generated(model, ids, torch.ones_like(ids), pad, max_new_tokens, logits_processor=processors)
    whole = model.tokenizer.decode(written[0], skip_special_tokens=True)
    return whole[len(model.tokenizer.decode(ids[0], skip_special_tokens=True)) :]


def _sampling(model: Model, temperature: float, top_p: float, seed: int) -> list[LogitsProcessor]:
    """Processors whose argmax is a sample."""
    import torch
    from transformers import LogitsProcessor, TemperatureLogitsWarper, TopPLogitsWarper

    class Gumbel(LogitsProcessor):
        """Adds -log(-log(u)), which turns the argmax into a draw from the softmax."""

        def __init__(self) -> None:
            self.generator = torch.Generator(device=model.device).manual_seed(seed)

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            uniform = torch.rand(scores.shape, generator=self.generator, device=scores.device)
            return scores - torch.log(-torch.log(uniform.clamp_min(torch.finfo(uniform.dtype).tiny)))

    warpers: list[LogitsProcessor] = [TemperatureLogitsWarper(temperature)]
    if top_p < 1.0:
        warpers.append(TopPLogitsWarper(top_p))
    return [*warpers, Gumbel()]
