"""Continuation of prompts by a causal model, through transformers' own `generate`.

Sampling draws from a generator of its own (Gumbel noise on the logits, then the largest), because
transformers samples from torch's global one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from hizoo_lite.branches import Branches
from hizoo_lite.device import is_gpu
from hizoo_lite.errors import UserError
from hizoo_lite.model.linear import BranchLinear
from hizoo_lite.model.model import Model
from hizoo_lite.quant import FourBitWeight
from hizoo_lite.tasks.chat import Prompt, Shown, prompt_text
from hizoo_lite.tasks.tokens import check_sampling, pad_id, prompt_ids

#: Whether each row is done, from the tokens that were written into each.
Ended = Callable[[Sequence[Sequence[int]]], list[bool]]


class _Stop(StoppingCriteria):
    """Ends a row once `ended` says so."""

    def __init__(self, ended: Ended, prompt_length: int) -> None:
        self.ended, self.prompt_length = ended, prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        done = self.ended(input_ids[:, self.prompt_length :].tolist())
        return torch.tensor(done, device=input_ids.device)


def write(
    model: Model, prompts: Sequence[list[int]], pad_id: int, max_new_tokens: int, ended: Ended | None
) -> list[list[int]]:
    """The tokens that follow each prompt, in one batch padded on the left; see `evaluate.Write`.

    Of every branch that the model's state is set to, branch after branch. Prompt by prompt if the codes of
    positions depend on how long a text is.
    """
    count = model.state.branches.count
    length = max(map(len, prompts))
    if model.row_positions.depend_on(length + max_new_tokens):
        model.row_positions.forget()
        if len(prompts) > 1:
            each = [write(model, [prompt], pad_id, max_new_tokens, ended) for prompt in prompts]
            return [rows[branch] for branch in range(count) for rows in each]
    ids = torch.full((len(prompts), length), pad_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = torch.tensor(prompt)
        mask[row, length - len(prompt) :] = 1
    stops = StoppingCriteriaList([] if ended is None else [_Stop(ended, length)])
    ids, mask = ids.repeat(count, 1), mask.repeat(count, 1)
    written = generated(model, ids, mask, pad_id, max_new_tokens, stopping_criteria=stops)
    return written[:, length:].tolist()


def generated(
    model: Model, ids: Tensor, mask: Tensor, pad_id: int, max_new_tokens: int, **more: Any
) -> Tensor:
    """The prompts with the likeliest tokens behind them, (rows, tokens) int64 on the model's device.

    ids, mask: (rows, length) int64. more: what else `generate` takes. transformers takes the first
    parameter's device for the model's; if blocks stream that one is offloaded, of which it would warn.
    """
    with warnings.catch_warnings(), _few_rows(model):
        warnings.filterwarnings("ignore", ".*`input_ids` being on a device type different", UserWarning)
        return model.module.generate(  # type: ignore[operator]
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=pad_id,
            **more,
        )


@contextmanager
def _few_rows(model: Model) -> Iterator[None]:
    """While this is open a GPU multiplies few rows with 4-bit weights as they are.

    Of one token a row unpacking would move ten times the weight's bytes. Losses are not computed so: their
    products are of many rows, and are rounded as those of any other stored form.
    """
    changed = [
        linear
        for linear in model.linears.values()
        if is_gpu(model.device) and isinstance(linear.weight, FourBitWeight)
    ]
    for linear in changed:
        linear.__dict__["shared_product"] = partial(_product, linear)
    try:
        yield
    finally:
        for linear in changed:
            del linear.__dict__["shared_product"]


def _product(linear: BranchLinear, x: Tensor, branches: Branches, *sources: Tensor | None) -> Tensor:
    """As `BranchLinear.shared_product`."""
    if branches.directions == 0 and isinstance(linear.weight, FourBitWeight):
        found = linear.weight.product(x.reshape(-1, linear.in_features).to(linear.compute))
        if found is not None:
            y = found.float().view(*x.shape[:-1], linear.out_features)
            return y if linear.bias is None else y.add_(linear.bias)
    return BranchLinear.shared_product(linear, x, branches, *sources)


def generate(
    model: Model,
    prompt: Prompt,
    max_new_tokens: int = 64,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    on_text: Callable[[str], None] | None = None,
) -> str:
    """The text that a causal model writes after `prompt`; a pure function of the arguments.

    Args:
        model: made by `load`, with or without an adapter.
        prompt: a text, continued as it is, of one token at least; or the turns of a conversation, such as
            `[{"role": "user", "content": "Why?"}]`, put into the tokenizer's chat template (see
            `tasks/chat.py` for a tokenizer without one), and what is written is the assistant's next turn.
        max_new_tokens: at most so many.
        temperature: 0 takes the most likely token each time.
        top_p: otherwise, tokens are drawn from the most likely ones that hold this share of the probability.
        seed: of the draws.
        on_text: is called with every piece of the text as it is written.

    Raises:
        UserError: if the model cannot continue the prompt, or a number is out of its range.

    Example:
        >>> import hizoo_lite as hz
        >>> model = hz.load("embedded", device="cpu")
        >>> isinstance(hz.generate(model, "The soup was", max_new_tokens=4), str)
        True
    """
    if model.kind != "causal":
        raise UserError(f"generate: {model.source} is a {model.kind} model; allowed: a causal one")
    check_sampling(max_new_tokens, temperature, top_p, seed)
    if model.tokenizer is None:
        raise UserError(f"--model: {model.source} has no tokenizer files")
    text, special = prompt_text(model.tokenizer, prompt)
    known = prompt_ids(model.tokenizer, text, max_new_tokens, model.positions, model.vocabulary, special)
    ids = torch.tensor([known])
    processors = LogitsProcessorList(_sampling(model, temperature, top_p, seed) if temperature > 0 else [])
    shown = None if on_text is None else Shown(model.tokenizer, known, on_text)
    stops = StoppingCriteriaList([] if shown is None else [_Stop(shown, len(known))])
    pad = pad_id(model.tokenizer, model.vocabulary)
    more: dict[str, Any] = {"logits_processor": processors, "stopping_criteria": stops}
    written = generated(model, ids, torch.ones_like(ids), pad, max_new_tokens, **more)
    whole = model.tokenizer.decode(written[0], skip_special_tokens=True)
    found = whole[len(model.tokenizer.decode(ids[0], skip_special_tokens=True)) :]
    if shown is not None:
        shown.finish(found)
    return found


def _sampling(model: Model, temperature: float, top_p: float, seed: int) -> list[LogitsProcessor]:
    """Processors whose argmax is a sample."""

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
