"""An exported model in onnxruntime: its losses on a task, and what it writes, with one adapter or none.

The folder has `model.onnx`, `export.json` (kind, adapters by name) and the tokenizer's files. Which inputs
the graph has is read from the session: tokens, perhaps token types and positions, and a causal model's cache
(`past_key_values.N.key`, (batch, heads, past, features), answered by `present.N.key`). A forward from the
start gives an empty cache. Adapters are swapped on the one session, call by call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args

import numpy as np

from hizoo_lite.base import EVALUATION, Batch, Branches, Losses, ModelKind, UserError
from hizoo_lite.edge.files import read_json
from hizoo_lite.edge.session import Session, runtime
from hizoo_lite.edge.tokenizer import EdgeTokenizer

FORMAT = 1
_RECORD, _GRAPH, _SETTINGS = "export.json", "model.onnx", "genai_config.json"
_RUN_ADAPTER, _SUFFIX = "adapter.onnx_adapter", ".onnx_adapter"
_PAST, _PRESENT = "past_key_values.", "present."
#: Bytes of float32 logits that one forward of an evaluation makes at most, where one row has fewer.
LOGITS_BYTES = 256 << 20

#: The next token of every row from its logits, (rows, vocabulary) float32.
Pick = Callable[[np.ndarray], np.ndarray]


class OnnxModel:
    """A model of an exported folder. `adapter`: a name in export.json, or a file or run folder with one."""

    writes = True
    halvings = 0  # onnxruntime takes a batch as a whole

    def __init__(self, folder: Path, adapter: str | None = None, threads: int | None = None) -> None:
        """UserError naming what is missing, damaged or unknown."""
        self.folder = folder
        record = read_json(folder / _RECORD, "a folder of: hizoo-lite export --to onnx")
        if record.get("format") != FORMAT:
            raise UserError(f"{folder / _RECORD}: format: got {record.get('format')!r}, allowed: {FORMAT}")
        if record.get("kind") not in get_args(ModelKind):
            known = ", ".join(get_args(ModelKind))
            raise UserError(f"{folder / _RECORD}: kind: got {record.get('kind')!r}, allowed: {known}")
        self.kind: ModelKind = record["kind"]
        self.bits = str(record.get("bits"))
        chosen = None if adapter is None else _adapter_file(folder, record, adapter)
        self.session = Session(folder / _GRAPH, threads)
        self._adapter = None if chosen is None else _load_adapter(chosen)
        self._check_inputs()
        self.tokenizer = EdgeTokenizer(folder, token_types="token_type_ids" in self.session.inputs)
        path = folder / _SETTINGS
        settings = read_json(path, "settings of onnxruntime-genai").get("model", {}) if path.is_file() else {}
        self.positions: int | None = settings.get("context_length")
        ends = settings.get("eos_token_id", self.tokenizer.eos_token_id)
        self._ends = [end for end in (ends if isinstance(ends, list) else [ends]) if end is not None]
        self._vocabulary = 1  # of a row of logits; known after the first forward

    def arrays(self) -> NoReturn:
        """An exported model is not trained."""
        raise NotImplementedError

    # ---------------------------------------------------------------------------- losses

    def losses(
        self,
        batch: Batch,
        branches: Branches = EVALUATION,
        mu: float = 0.0,
        directions: Mapping[str, np.ndarray] | None = None,
    ) -> Losses:
        """Losses on `batch`; one branch alone."""
        assert branches == EVALUATION
        if self.kind == "classifier":
            logits = np.concatenate([logits for _, logits in self._logits(batch)]).astype(np.float64)
            picked = log_probabilities(logits)[np.arange(len(logits)), batch.gold]
            return Losses(-picked[None], logits[None])
        scored = np.empty(len(batch.token_id))
        for rows, logits in self._logits(batch):
            sites = np.flatnonzero((batch.site_row >= rows.start) & (batch.site_row < rows.stop))
            at = logits[batch.site_row[sites] - rows.start, batch.site_position[sites]].astype(np.float64)
            place = np.full(len(batch.site_row), -1)
            place[sites] = np.arange(len(sites))
            mine = np.flatnonzero(place[batch.token_site] >= 0)
            scored[mine] = log_probabilities(at)[place[batch.token_site[mine]], batch.token_id[mine]]
        return slot_losses(scored, batch)

    def _logits(self, batch: Batch) -> Iterator[tuple[range, np.ndarray]]:
        """Rows of the batch, a few at a time, with their logits."""
        first, (count, length) = 0, batch.input_ids.shape
        while first < count:
            size = max(1, LOGITS_BYTES // (4 * length * self._vocabulary)) if self._vocabulary > 1 else 1
            rows = range(first, min(first + size, count))
            part = slice(rows.start, rows.stop)
            types = None if batch.token_type_ids is None else batch.token_type_ids[part]
            feeds = self._feeds(batch.input_ids[part], batch.attention_mask[part], types)
            [logits] = self.session.run(["logits"], feeds, self._adapter)
            self._vocabulary = logits.shape[-1]
            yield rows, logits
            first = rows.stop

    # ---------------------------------------------------------------------------- writing

    def write(
        self,
        prompts: Sequence[list[int]],
        pad_id: int,
        max_new_tokens: int,
        ended: Callable[[Sequence[Sequence[int]]], list[bool]] | None = None,
        pick: Pick | None = None,
    ) -> list[list[int]]:
        """See `evaluate.Writer.write`; with `pick` the next tokens are what it says."""
        if self.kind != "causal":
            raise UserError(f"--onnx: {self.folder} is a {self.kind} model; text is written by a causal one")
        length, count = max(map(len, prompts)), len(prompts)
        ids = np.full((count, length), pad_id, dtype=np.int64)
        mask = np.zeros((count, length), dtype=np.int64)
        for row, prompt in enumerate(prompts):
            ids[row, length - len(prompt) :] = prompt
            mask[row, length - len(prompt) :] = 1
        written: list[list[int]] = [[] for _ in prompts]
        done, cache = np.zeros(count, dtype=bool), self._empty_cache(count)
        present = [_PRESENT + name.removeprefix(_PAST) for name in cache]
        for _ in range(max_new_tokens):
            feeds = {**self._feeds(ids, mask), **cache}
            logits, *values = self.session.run(["logits", *present], feeds, self._adapter)
            cache = dict(zip(cache, values, strict=True))
            chosen = (pick or greedy)(logits[:, -1].astype(np.float32))
            new = np.where(done, pad_id, chosen)
            for text, token in zip(written, new.tolist(), strict=True):
                text.append(token)
            done |= np.isin(new, self._ends)
            if ended is not None:
                done |= np.array(ended(written))
            if done.all():
                break
            ids = new[:, None] if cache else np.concatenate([ids, new[:, None]], axis=1)
            mask = np.concatenate([mask, np.ones((count, 1), dtype=np.int64)], axis=1)
        return written

    # ---------------------------------------------------------------------------- feeds

    def _check_inputs(self) -> None:
        """UserError for an input that is none of those described above."""
        known = {"input_ids", "attention_mask", "token_type_ids", "position_ids"}
        odd = [n for n in self.session.inputs if n not in known and not n.startswith(_PAST)]
        if odd or "logits" not in self.session.outputs:
            what = f"the input {odd[0]!r} is not known" if odd else "it has no output 'logits'"
            raise UserError(f"{self.session.path}: {what}; allowed: what hizoo-lite export has written")

    def _feeds(
        self, ids: np.ndarray, mask: np.ndarray, types: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """Every input: `mask` is of all positions so far, `ids` of the newest; the cache is empty."""
        found = {"input_ids": ids, "attention_mask": mask}
        found["token_type_ids"] = np.zeros_like(ids) if types is None else types
        found["position_ids"] = np.maximum(mask.cumsum(axis=1) - 1, 0)[:, -ids.shape[1] :]
        found |= self._empty_cache(len(ids))
        return {name: found[name] for name in self.session.inputs}

    def _empty_cache(self, rows: int) -> dict[str, np.ndarray]:
        made = {}
        for name in self.session.inputs:
            if name.startswith(_PAST):
                _, heads, _, features = self.session.shape(name)
                made[name] = np.zeros((rows, heads, 0, features), dtype=self.session.dtype(name))
        return made


def greedy(logits: np.ndarray) -> np.ndarray:
    """The most likely token of every row."""
    return logits.argmax(axis=-1)


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """log softmax over the last axis."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def slot_losses(scored: np.ndarray, batch: Batch) -> Losses:
    """From the log-probabilities of the scored tokens, (scored,) float64, to the losses of one branch."""
    slots = len(batch.slot_example)
    counts = np.bincount(batch.token_slot, minlength=slots)
    scores = np.bincount(batch.token_slot, weights=scored, minlength=slots) / counts
    if batch.loss == "answer":
        return Losses(-scores[None, batch.gold], scores[None])
    peak = np.full(batch.examples, -np.inf)
    np.maximum.at(peak, batch.slot_example, scores)
    total = np.bincount(batch.slot_example, weights=np.exp(scores - peak[batch.slot_example]))
    return Losses((peak + np.log(total) - scores[batch.gold])[None], scores[None])


def _adapter_file(folder: Path, record: Mapping[str, Any], adapter: str) -> Path:
    """The file of an adapter, by its name in export.json or by path."""
    listed = record.get("adapters") or {}
    if adapter in listed:
        path = folder / str(listed[adapter].get("file"))
        if not path.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{folder / _RECORD}: adapters.{adapter}.file: {path} is outside of the folder")
        return path
    given = Path(adapter)
    if given.suffix == _SUFFIX or (given / _RUN_ADAPTER).is_file():
        return given if given.suffix == _SUFFIX else given / _RUN_ADAPTER
    known = ", ".join(listed) or "none"
    raise UserError(
        f"--adapter: got {adapter!r}, allowed: an adapter of {folder} ({known}), a file *{_SUFFIX}, "
        f"or a run folder with {_RUN_ADAPTER}"
    )


def _load_adapter(path: Path) -> Any:
    if not path.is_file():
        raise UserError(f"{path}: no such file; allowed: an adapter that hizoo-lite has written")
    adapter = runtime().LoraAdapter()
    try:
        adapter.Load(str(path))
    except Exception as error:  # onnxruntime's own classes have no public common base
        raise UserError(f"{path}: not an adapter of onnxruntime, or truncated ({error})") from error
    return adapter
