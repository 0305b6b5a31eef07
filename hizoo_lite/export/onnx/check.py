"""Does onnxruntime compute what the model computes? Logits of both, on the same tokens.

The reference is the loaded model itself, through its own linears, in float32: what a run was evaluated with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from hizoo_lite.errors import ExportError
from hizoo_lite.export.onnx.session import Session
from hizoo_lite.model.model import Model

#: The largest difference of a logit that float32 sums in another order may make.
LIMIT = 1e-4
#: Of the largest logit, where activations are rounded to 8 bits: more than rounding would be a wrong graph.
FAST_SHARE = 0.2
#: (rows, length) of the batches; rows after the first are padded.
_BATCHES = ((1, 1), (1, 9), (3, 17), (2, 40))
#: Tokens that are given at once, then one by one.
_PREFILL, _DECODED = 6, 4


class Tokens(NamedTuple):
    """A right-padded batch; int64 (rows, length)."""

    ids: np.ndarray
    mask: np.ndarray


class Case(NamedTuple):
    """Tokens, and the model's logits of them. decoded: all but the first few are given one by one."""

    tokens: Tokens
    logits: np.ndarray
    decoded: bool


def cases(model: Model) -> list[Case]:
    """Several lengths and batch sizes, and a decoding for models with a cache, as `model` is now.

    Apart from the comparison, so that the model need not be in memory beside onnxruntime's.
    """
    most = model.positions or max(length for _, length in _BATCHES)
    batches = [(draw(model, rows, min(length, most)), False) for rows, length in _BATCHES]
    if model.kind == "causal":
        batches.append((draw(model, 2, min(_PREFILL + _DECODED, most), padded=False), True))
    return [Case(tokens, reference(model, tokens), decoded) for tokens, decoded in batches]


def compare(
    session: Session, cases: Sequence[Case], adapter: str | None, fast: bool = False
) -> list[dict[str, Any]]:
    """Run the cases in onnxruntime: one entry each, what it was and its largest difference.

    adapter: the one that was on the model. fast: allow `FAST_SHARE` of the largest logit, not `LIMIT`.
    Raises `ExportError`, saying where, for a larger one.
    """
    found = []
    for case in cases:
        rows, length = case.tokens.ids.shape
        entry = {"run": "decode" if case.decoded else "forward", "rows": rows, "length": length}
        got = _logits(session, case, adapter)
        shown = case.tokens.mask.astype(bool) if got.ndim == 3 else slice(None)  # padding has no meaning
        differences = np.abs(got - case.logits)[shown]
        worst = float(differences.max())
        limit = FAST_SHARE * float(np.abs(case.logits).max()) if fast else LIMIT
        if not worst <= limit:  # NaN is above it too
            raise ExportError(_failed(session, entry, adapter, differences, limit))
        found.append({**entry, "adapter": adapter, "max_abs_difference": worst})
    return found


def _logits(session: Session, case: Case, adapter: str | None) -> np.ndarray:
    if case.decoded:
        return decode(session, case.tokens, min(_PREFILL, case.tokens.ids.shape[1] - 1), adapter)
    feeds = {**_feeds(session, case.tokens), **session.empty_cache(len(case.tokens.ids))}
    return session.run(feeds, adapter, [session.export.outputs[0]])[0]


def draw(model: Model, rows: int, length: int, padded: bool = True) -> Tokens:
    """Tokens from the whole vocabulary, the same at every call; each row 2 shorter than the one above."""
    random = np.random.default_rng(rows * 1000 + length)
    padding = model.config.pad_token_id or 0
    ids = random.integers(0, model.config.get_text_config().vocab_size - 1, (rows, length))
    ids += ids >= padding  # any token but the padding
    mask = np.ones_like(ids)
    if padded:
        for row in range(1, rows):
            mask[row, max(1, length - 2 * row) :] = 0
    return Tokens(np.where(mask == 1, ids, padding), mask)


@torch.no_grad()
def reference(model: Model, tokens: Tokens) -> np.ndarray:
    """The model's logits: (rows, length, vocabulary) or (rows, classes) float32."""
    no_cache = {"use_cache": False} if model.kind == "causal" else {}
    ids, mask = torch.from_numpy(tokens.ids), torch.from_numpy(tokens.mask)
    return model.module(input_ids=ids, attention_mask=mask, **no_cache).logits.float().numpy()


def decode(session: Session, tokens: Tokens, prefill: int, adapter: str | None) -> np.ndarray:
    """Logits of every position where all behind the first `prefill` tokens are given one by one."""
    cache = session.empty_cache(len(tokens.ids))
    logits = []
    for first, last in [(0, prefill), *((n, n + 1) for n in range(prefill, tokens.ids.shape[1]))]:
        part = Tokens(tokens.ids[:, first:last], tokens.mask[:, :last])
        outputs = session.run({**_feeds(session, part), **cache}, adapter)
        logits.append(outputs[0])
        cache = session.grown_cache(outputs)
    return np.concatenate(logits, axis=1)


def _feeds(session: Session, tokens: Tokens) -> dict[str, np.ndarray]:
    made: dict[str, Callable[[], np.ndarray]] = {
        "input_ids": lambda: tokens.ids,
        "attention_mask": lambda: tokens.mask,
        "token_type_ids": lambda: np.zeros_like(tokens.ids),
    }
    return {name: made[name]() for name in session.export.inputs if name in made}


def _failed(
    session: Session, entry: dict[str, Any], adapter: str | None, differences: np.ndarray, limit: float
) -> str:
    worst = float(np.max(differences))
    place = np.unravel_index(int(np.argmax(np.nan_to_num(differences, nan=np.inf))), differences.shape)
    named = "without adapter" if adapter is None else f"with adapter {adapter!r}"
    return (
        f"{session.export.graph}: differs from the model by {worst:.2e}, allowed is {limit:.0e}: "
        f"{entry['run']} of {entry['rows']} x {entry['length']} tokens {named}, "
        f"logit {tuple(int(i) for i in place)} of those that count"
    )
