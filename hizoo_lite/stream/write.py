"""Continuation of prompts by a causal model, through transformers' own `generate`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from hizoo_lite.model.model import Model

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
    """The tokens that follow each prompt, in one batch padded on the left; see `evaluate.Writer`.

    Prompt by prompt where the codes of positions depend on how long a text is.
    """
    length = max(map(len, prompts))
    if model.row_positions.depend_on(length + max_new_tokens):
        model.row_positions.forget()
        if len(prompts) > 1:
            return [write(model, [prompt], pad_id, max_new_tokens, ended)[0] for prompt in prompts]
    ids = torch.full((len(prompts), length), pad_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = torch.tensor(prompt)
        mask[row, length - len(prompt) :] = 1
    stops = StoppingCriteriaList([] if ended is None else [_Stop(ended, length)])
    written = generated(model, ids, mask, pad_id, max_new_tokens, stopping_criteria=stops)
    return written[:, length:].tolist()


def generated(
    model: Model, ids: Tensor, mask: Tensor, pad_id: int, max_new_tokens: int, **more: Any
) -> Tensor:
    """The prompts with the likeliest tokens behind them, (rows, tokens) int64 on the model's device.

    ids, mask: (rows, length) int64. more: what else `generate` takes. transformers takes the first
    parameter's device for the model's; where blocks stream that one is away, of which it would warn.
    """
    with warnings.catch_warnings():
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
