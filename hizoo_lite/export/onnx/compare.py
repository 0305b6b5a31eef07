"""Does onnxruntime compute what the model computes? Compares logits; needs numpy and onnxruntime alone.

    python -m hizoo_lite.export.onnx.compare FOLDER

reads what `check.py` wrote there and prints JSON: a process of its own, so that what torch holds is not
held beside what onnxruntime needs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hizoo_lite.edge.folder import Export
from hizoo_lite.edge.session import Session
from hizoo_lite.errors import ExportError, UserError
from hizoo_lite.process import map_large

#: The largest difference of a logit that float32 sums in another order may make, if no logit is above 1;
#: times the largest one otherwise, as rounding is relative.
LIMIT = 1e-4
#: Tokens of a decoding that are given at once; the others come one by one.
PREFILL = 6
_REQUEST = "request.json"


class Tokens(NamedTuple):
    """A right-padded batch; int64 (rows, length)."""

    ids: np.ndarray
    mask: np.ndarray


class Case(NamedTuple):
    """Tokens, and the model's logits of them. decoded: all but the first few are given one by one."""

    tokens: Tokens
    logits: np.ndarray
    decoded: bool


class Reference(NamedTuple):
    """Cases of the model with one adapter, or without, and what a logit may differ from them.

    limit: None allows any finite difference. share: the limit is one of the largest logit.
    """

    cases: Sequence[Case]
    adapter: str | None = None
    limit: float | None = LIMIT
    share: bool = False
    model: str = "tuned"  # what it is a reference of, for export.json


def compare(session: Session, reference: Reference) -> list[dict[str, Any]]:
    """Run the cases in onnxruntime: one entry each, what it was and its differences.

    same_choice: the share of places where the largest logit is the same one. Raises `ExportError`, saying
    where, for a difference above the limit.
    """
    found = []
    for case in reference.cases:
        rows, length = case.tokens.ids.shape
        entry = {"run": "decode" if case.decoded else "forward", "rows": rows, "length": length}
        got = _logits(session, case, reference.adapter)
        shown = case.tokens.mask.astype(bool) if got.ndim == 3 else slice(None)  # padding has no meaning
        got, wanted = got[shown], case.logits[shown]
        differences = np.abs(got - wanted)
        limit = np.inf if reference.limit is None else reference.limit
        largest = float(np.abs(case.logits).max())
        limit *= largest if reference.share else max(1.0, largest)
        worst = float(differences.max())
        if not (worst <= limit and np.isfinite(worst)):  # NaN is above it too
            raise ExportError(_failed(session, entry, reference.adapter, differences, limit))
        entry |= {"adapter": reference.adapter, "model": reference.model, "max_abs_difference": worst}
        entry["mean_abs_difference"] = float(differences.mean())
        entry["same_choice"] = float((got.argmax(-1) == wanted.argmax(-1)).mean())
        found.append(entry)
    return found


def _logits(session: Session, case: Case, adapter: str | None) -> np.ndarray:
    if case.decoded:
        return decode(session, case.tokens, min(PREFILL, case.tokens.ids.shape[1] - 1), adapter)
    feeds = {**_feeds(session, case.tokens), **session.empty_cache(len(case.tokens.ids))}
    return session.run(feeds, adapter, [session.export.outputs[0]])[0]


def decode(session: Session, tokens: Tokens, prefill: int, adapter: str | None) -> np.ndarray:
    """Logits of every position if all behind the first `prefill` tokens are given one by one."""
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


def write_request(folder: Path, export: Path, references: Sequence[Reference], low_memory: bool) -> None:
    """Leave in `folder` what `main` reads."""
    request: dict[str, Any] = {"export": str(export.absolute()), "low_memory": low_memory, "references": []}
    for number, reference in enumerate(references):
        named = reference._asdict()
        named["cases"] = [case.decoded for case in reference.cases]
        request["references"].append(named)
        arrays = {
            f"{index}.{part}": value
            for index, case in enumerate(reference.cases)
            for part, value in {**case.tokens._asdict(), "logits": case.logits}.items()
        }
        np.savez(folder / f"{number}.npz", **arrays)
    (folder / _REQUEST).write_text(json.dumps(request), encoding="utf-8")


def _read_reference(path: Path, named: dict[str, Any]) -> Reference:
    with np.load(path, allow_pickle=False) as arrays:
        cases = [
            Case(Tokens(arrays[f"{n}.ids"], arrays[f"{n}.mask"]), arrays[f"{n}.logits"], decoded)
            for n, decoded in enumerate(named["cases"])
        ]
    return Reference(**{**named, "cases": cases})


def main(folder: Path) -> dict[str, Any]:
    """{"runs": entries}, or {"error": message} with "at": "load" or "run"."""
    map_large()  # a product's decoded weight is given back before the next one's is made
    request = json.loads((folder / _REQUEST).read_text(encoding="utf-8"))
    export = Export.open(request["export"])
    try:
        session = Session(export, low_memory=request["low_memory"])
    except UserError as error:
        return {"error": str(error), "at": "load"}
    runs: list[dict[str, Any]] = []
    try:
        for number, named in enumerate(request["references"]):
            runs += compare(session, _read_reference(folder / f"{number}.npz", named))
    except ExportError as error:
        return {"error": str(error), "at": "run"}
    return {"runs": runs}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
