"""An exported model in onnxruntime: its losses on a task, and what it writes, with one adapter or none.

The folder has `model.onnx`, `export.json` (kind, adapters by name) and the tokenizer's files. Which inputs
the graph has is read from the session: tokens, perhaps token types and positions, and a causal model's cache
(`past_key_values.N.key`, (batch, heads, past, features), answered by `present.N.key`). A forward from the
start gives an empty cache. Adapters are swapped on the one session, call by call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hizoo_lite.arrays import NumpyArrays
from hizoo_lite.base import ModelKind
from hizoo_lite.batch import Batch, Losses
from hizoo_lite.branches import EVALUATION, Branches
from hizoo_lite.checkpoints.declared import model_config, positions_of, vocabulary_of
from hizoo_lite.edge.folder import Export
from hizoo_lite.edge.session import Session
from hizoo_lite.edge.tokenizer import EdgeTokenizer
from hizoo_lite.errors import UserError
from hizoo_lite.files import read_json
from hizoo_lite.tasks.losses import class_losses, slot_losses

_SETTINGS = "genai_config.json"
#: Bytes of float32 logits that one forward of an evaluation makes at most, if one row has fewer.
LOGITS_BYTES = 256 << 20
_ARRAYS = NumpyArrays()

#: The next token of every row from its logits, (rows, vocabulary) float32.
Pick = Callable[[np.ndarray], np.ndarray]


class OnnxModel:
    """A model of an exported folder. `adapter`: a name in export.json, or a file or run folder with one."""

    def __init__(self, folder: Path, adapter: str | None = None, threads: int | None = None) -> None:
        """UserError naming what is missing, damaged or unknown."""
        self.folder, self.adapter = folder, adapter
        export = Export.open(folder)
        self.kind: ModelKind = export.kind
        self.bits = str(export.record["bits"])
        self.adapters = list(export.record["adapters"])
        self.session = Session(export, threads=threads)
        if adapter is not None:
            self.session.adapter(adapter)  # to be told now
        self.inputs = self.session.graph.inputs
        self._check_inputs()
        self.tokenizer = EdgeTokenizer(folder, token_types="token_type_ids" in self.inputs)
        path = folder / _SETTINGS
        settings = read_json(path, "settings of onnxruntime-genai").get("model", {}) if path.is_file() else {}
        self.positions: int | None = settings.get("context_length", positions_of(folder))
        self.vocabulary = vocabulary_of(folder)
        self.id2label: Any = model_config(folder).get("id2label")
        ends = settings.get("eos_token_id", self.tokenizer.eos_token_id)
        self._ends = [end for end in (ends if isinstance(ends, list) else [ends]) if end is not None]
        self._vocabulary = 1  # of a row of logits; known after the first forward

    # ---------------------------------------------------------------------------- losses

    def losses(
        self,
        batch: Batch,
        branches: Branches = EVALUATION,
        mu: float = 0.0,
        directions: Mapping[str, np.ndarray] | None = None,
        exact: Mapping[str, np.ndarray] | None = None,
    ) -> Losses:
        """Losses on `batch`; one branch alone, and nothing that is trained."""
        assert branches == EVALUATION
        if self.kind == "classifier":
            logits = np.concatenate([logits for _, logits in self._logits(batch)]).astype(np.float64)
            return class_losses(_ARRAYS, logits[None], batch.gold, branches.compared)
        scored = np.empty(len(batch.token_id))
        for rows, logits in self._logits(batch):
            sites = np.flatnonzero((batch.site_row >= rows.start) & (batch.site_row < rows.stop))
            at = logits[batch.site_row[sites] - rows.start, batch.site_position[sites]].astype(np.float64)
            place = np.full(len(batch.site_row), -1)
            place[sites] = np.arange(len(sites))
            mine = np.flatnonzero(place[batch.token_site] >= 0)
            scored[mine] = _ARRAYS.log_softmax(at)[place[batch.token_site[mine]], batch.token_id[mine]]
        between = np.empty((branches.directions, len(batch.site_row)))
        return slot_losses(_ARRAYS, scored[None], between, batch, branches.compared)

    def _logits(self, batch: Batch) -> Iterator[tuple[range, np.ndarray]]:
        """Rows of the batch, a few at a time, with their logits."""
        first, (count, length) = 0, batch.input_ids.shape
        while first < count:
            size = max(1, LOGITS_BYTES // (4 * length * self._vocabulary)) if self._vocabulary > 1 else 1
            rows = range(first, min(first + size, count))
            part = slice(rows.start, rows.stop)
            types = None if batch.token_type_ids is None else batch.token_type_ids[part]
            feeds = self._feeds(batch.input_ids[part], batch.attention_mask[part], types)
            [logits] = self.session.run(feeds, self.adapter, ["logits"])
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
        """See `evaluate.Write`; with `pick` the next tokens are what it says."""
        if self.kind != "causal":
            raise UserError(f"--onnx: {self.folder} is a {self.kind} model; text is written by a causal one")
        length, count = max(map(len, prompts)), len(prompts)
        ids = np.full((count, length), pad_id, dtype=np.int64)
        mask = np.zeros((count, length), dtype=np.int64)
        for row, prompt in enumerate(prompts):
            ids[row, length - len(prompt) :] = prompt
            mask[row, length - len(prompt) :] = 1
        written: list[list[int]] = [[] for _ in prompts]
        done, cache = np.zeros(count, dtype=bool), self.session.empty_cache(count)
        for _ in range(max_new_tokens):
            feeds = {**self._feeds(ids, mask), **cache}
            outputs = self.session.run(feeds, self.adapter)
            cache = self.session.grown_cache(outputs)
            chosen = (pick or greedy)(outputs[0][:, -1].astype(np.float32))
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
        graph = self.session.graph
        odd = [name for name in self.inputs if name not in {*known, *self.session.empty_cache(1)}]
        if odd or graph.outputs[0] != "logits":
            what = f"the input {odd[0]!r} is not known" if odd else "its first output is not 'logits'"
            raise UserError(f"{graph.path}: {what}; allowed: what hizoo-lite export has written")

    def _feeds(
        self, ids: np.ndarray, mask: np.ndarray, types: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """Every input: `mask` is of all positions so far, `ids` of the newest; the cache is empty."""
        found = {"input_ids": ids, "attention_mask": mask}
        found["token_type_ids"] = np.zeros_like(ids) if types is None else types
        found["position_ids"] = np.maximum(mask.cumsum(axis=1) - 1, 0)[:, -ids.shape[1] :]
        found |= self.session.empty_cache(len(ids))
        return {name: found[name] for name in self.inputs}


def greedy(logits: np.ndarray) -> np.ndarray:
    """The most likely token of every row."""
    return logits.argmax(axis=-1)
