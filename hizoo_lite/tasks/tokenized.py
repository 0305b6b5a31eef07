"""Examples that are tokens already, as users of transformers' Trainer have them: no template, no cut.

A row has `input_ids`, perhaps `attention_mask` (what it masks is padding and is left out) and
`token_type_ids`, and `labels`. Of a causal model those are a token for every position, -100 where there is no
loss, or nothing, which is every token; as in transformers a label is predicted from the position before. Of a
classifier it is the number of the class.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hizoo_lite.batch import Example
from hizoo_lite.errors import UserError
from hizoo_lite.tasks import metrics
from hizoo_lite.tasks.files import Row
from hizoo_lite.tasks.task import Task

COLUMNS = ("input_ids", "attention_mask", "token_type_ids", "labels")
#: The label of a position without a loss.
IGNORED = -100


def tokenized(name: str, answers: Mapping[str, str]) -> Task:
    """The task of such rows. answers: the names of the classes, as they are shown; none of a causal model."""
    return Task(
        name=name,
        kind="choice" if answers else "lm",
        build=_Tokens(tuple(answers.values())),
        scorers={"accuracy": metrics.accuracy} if answers else {},
        causal="{input_ids}",
        text="{input_ids}",
        num_labels=len(answers) or None,
        labels=tuple(answers),
        tokenized=True,
        columns=COLUMNS,
        dev_from="dev",
        test_from="test",
    )


class _Tokens:
    """The example of a row."""

    def __init__(self, answers: tuple[str, ...]) -> None:
        self.answers = answers

    def __call__(self, row: Row) -> Iterator[Example]:
        ids = _numbers(row, "input_ids", row.value("input_ids"))
        given = {name: row.values.get(name) for name in COLUMNS[1:]}
        mask = given["attention_mask"]
        kept = [True] * len(ids) if mask is None else list(map(bool, _numbers(row, "attention_mask", mask)))
        fields: dict[str, Any] = {"input_ids": _kept(row, "input_ids", ids, kept)}
        if given["token_type_ids"] is not None:
            types = _numbers(row, "token_type_ids", given["token_type_ids"])
            fields["token_type_ids"] = _kept(row, "token_type_ids", types, kept)
        if self.answers:
            yield Example(fields, self.answers, _class(row, len(self.answers)))
            return
        labels = ids if given["labels"] is None else _numbers(row, "labels", given["labels"], IGNORED)
        fields["labels"] = _kept(row, "labels", labels, kept)
        if all(label == IGNORED for label in fields["labels"][1:]):
            raise UserError(
                f"{row.where}: field 'labels': no token has a loss, all behind the first are -100"
            )
        yield Example(fields, ("",), 0)


def _numbers(row: Row, name: str, found: Any, also: int = 0) -> list[int]:
    """Those of 0 or more, and `also`."""
    if isinstance(found, list) and all(type(each) is int and (each >= 0 or each == also) for each in found):
        return found
    allowed = "of 0 or more" if also >= 0 else f"of 0 or more, or {also}"
    raise UserError(
        f"{row.where}: field {name!r}: expected a list of whole numbers {allowed}, got {found!r:.80}"
    )


def _kept(row: Row, name: str, values: Sequence[int], kept: Sequence[bool]) -> list[int]:
    if len(values) != len(kept):
        raise UserError(f"{row.where}: field {name!r}: got {len(values)} numbers for {len(kept)} tokens")
    return [value for value, is_kept in zip(values, kept, strict=True) if is_kept]


def _class(row: Row, count: int) -> int:
    found = row.value("labels")
    if type(found) is not int or not 0 <= found < count:
        raise UserError(
            f"{row.where}: field 'labels': expected a whole number from 0 to {count - 1}, the model's "
            f"classes, got {found!r:.80}"
        )
    return found
