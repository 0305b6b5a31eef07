"""Does onnxruntime compute what the model computes? Logits of both, on the same tokens.

The reference is the loaded model itself, through its own linears, in float32: what a run was evaluated with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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


def check(session: Session, model: Model, adapter: str | None, fast: bool = False) -> list[dict[str, Any]]:
    """One entry for each run: what it was, and its largest difference.

    model: has the adapter attached where one is named. fast: allow `FAST_SHARE`, not `LIMIT`.
    Raises `ExportError`, saying where, for a larger one.
    """
    found = []
    for what, got, expected in _runs(session, model, adapter):
        worst = float(np.abs(got - expected).max())
        limit = FAST_SHARE * float(np.abs(expected).max()) if fast else LIMIT
        entry = {**what, "adapter": adapter, "max_abs_difference": worst}
        if not worst <= limit:  # NaN is above it too
            raise ExportError(_failed(session, entry, np.abs(got - expected), limit))
        found.append(entry)
    return found


Run = tuple[dict[str, Any], np.ndarray, np.ndarray]


def _runs(session: Session, model: Model, adapter: str | None) -> Iterator[Run]:
    most = model.positions or max(length for _, length in _BATCHES)
    for rows, length in _BATCHES:
        tokens = draw(model, rows, min(length, most))
        expected = reference(model, tokens)
        got = session.run({**_feeds(session, tokens), **session.empty_cache(rows)}, adapter)[0]
        shown = tokens.mask.astype(bool) if got.ndim == 3 else slice(None)  # padding has no meaning
        yield {"run": "forward", "rows": rows, "length": tokens.ids.shape[1]}, got[shown], expected[shown]
    if session.export.cache:
        tokens = draw(model, 2, min(_PREFILL + _DECODED, most), padded=False)
        got = decode(session, tokens, min(_PREFILL, most - 1), adapter)
        yield {"run": "decode", "rows": 2, "length": tokens.ids.shape[1]}, got, reference(model, tokens)


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


def _failed(session: Session, entry: dict[str, Any], differences: np.ndarray, limit: float) -> str:
    place = np.unravel_index(int(np.argmax(np.nan_to_num(differences, nan=np.inf))), differences.shape)
    adapter = "without adapter" if entry["adapter"] is None else f"with adapter {entry['adapter']!r}"
    return (
        f"{session.export.graph}: differs from the model by {entry['max_abs_difference']:.2e}, allowed is "
        f"{limit:.0e}: {entry['run']} of {entry['rows']} x {entry['length']} tokens {adapter}, "
        f"logit {tuple(int(i) for i in place)}"
    )
