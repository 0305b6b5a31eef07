"""What data is, before anything is trained on it: form, examples as a model sees them, lengths, labels."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import numpy as np

from hizoo_lite import tasks
from hizoo_lite.batch import Example
from hizoo_lite.config import TrainConfig
from hizoo_lite.errors import UserError
from hizoo_lite.tasks import Encoder, Splits, Task, chat_templates
from hizoo_lite.tasks.splits import key
from hizoo_lite.tasks.task import where
from hizoo_lite.tasks.templates import render
from hizoo_lite.train import components
from hizoo_lite.units import counted

#: Around what is scored.
MARKS = ("»", "«")
_SHOWN = 5
_MOST_MEASURED = 5000  # examples whose tokens are counted
_MOST_LEFT_OUT = 10  # that are listed
_NO_LIMIT = 1 << 30


def inspect(config: TrainConfig, find_encoder: Callable[[Task], Encoder] | None) -> dict[str, Any]:
    """What a run of this configuration would do with its data, a single source.

    find_encoder: of the model; None: characters are counted, and examples are shown without a template.

    Raises UserError for data that a run refuses.
    """
    form = next(iter(components.understood(config)), None)
    task = components.find_task(config.task) if form is None else tasks.get(form.keys)
    splits = components.run_splits(config, task)
    every = [*splits.train, *splits.dev, *splits.test]
    encoder = None if find_encoder is None else find_encoder(task)
    if encoder is not None:
        splits = components.usable_splits(encoder, splits, config, refuses=False)
    counted = _Counted(task, encoder)
    lengths = [counted.length(example) for example in every[:_MOST_MEASURED]]
    return {
        "data": config.data,
        "form": task.name if form is None else form.form,
        "kind": "chat" if task.chat else task.kind,
        "lines": [task.name] if form is None else form.lines(splits.total + len(splits.left_out)),
        "columns": [] if form is None else form.columns,
        "unused_columns": [] if form is None else form.unused,
        "parts": {name: len(getattr(splits, name)) for name in ("train", "dev", "test")},
        "unused": splits.unused,
        "division": str(splits),
        "notes": splits.notes,
        "lengths": {"unit": counted.unit, "examples": len(lengths), **_quantiles(lengths)},
        "labels": _labels(task, every),
        "duplicates": len(every) - len(set(map(key, every))),
        "contradictions": (contradictions := _contradictions(task, every)),
        "left_out": {
            "count": len(splits.left_out),
            "first": [one._asdict() for one in splits.left_out[:_MOST_LEFT_OUT]],
        },
        "examples": [
            {"where": where(example), "length": counted.length(example), "text": counted.shown(example)}
            for example in (splits.train or every)[:_SHOWN]
        ],
        "advice": [
            *_advice(config, task, splits, lengths, None if encoder is None else encoder.max_length),
            *_decide(len(contradictions)),
            *filter(None, [chat_templates.lacking(encoder.tokenizer, task) if encoder else ""]),
            *filter(None, [components.few_held_out(config, splits, task.metric)]),
        ],
    }


class _Counted:
    """Lengths of examples, and examples as they are seen: in tokens of a model, else in characters."""

    def __init__(self, task: Task, encoder: Encoder | None) -> None:
        self.task, self.encoder = task, encoder
        self.unit = "characters" if encoder is None else "tokens"
        self.whole = copy.copy(encoder)
        if self.whole is not None:
            self.whole.max_length = _NO_LIMIT

    def length(self, example: Example) -> int:
        """Of the whole example; 0 if it cannot be encoded."""
        if self.whole is None:
            return sum(len(text) for text, _ in self._texts(example))
        try:
            rows = self.whole.encode(example, training=True).rows
        except UserError:
            return 0
        return max(map(len, rows)) + (self.whole.model_kind == "causal")

    def shown(self, example: Example) -> str:
        """Its text, with marks around what is scored."""
        if self.encoder is None:
            return "".join(_marked(text, scored) for text, scored in self._texts(example))
        assert self.whole is not None
        try:
            encoded = self.encoder.encode(example, training=True)
        except UserError:  # too long, and shown all the same
            encoded = self.whole.encode(example, training=True)
        tokenizer = self.encoder.tokenizer
        if self.encoder.model_kind != "causal":
            label = example.answers[example.gold].strip() if example.answers else str(example.gold)
            return f"{tokenizer.decode(encoded.rows[0])}  {_marked(label, True)}"
        gold = [(encoded.sites[site], token) for site, token, slot in encoded.tokens if slot == encoded.gold]
        row = gold[0][0][0]
        scored = {position + 1: token for (_, position), token in gold}
        ids = list(encoded.rows[row][: max(scored)])
        ids += [scored[max(scored)]] if len(ids) == max(scored) else []
        runs = ((is_scored, list(run)) for is_scored, run in groupby(range(len(ids)), scored.__contains__))
        text, done = "", ""
        for is_scored, run in runs:
            until = tokenizer.decode(ids[: run[-1] + 1])
            text, done = text + _marked(until[len(done) :], is_scored), until
        return text

    def _texts(self, example: Example) -> list[tuple[str, bool]]:
        """The parts of an example without a tokenizer, each with whether it is scored."""
        if self.task.chat:
            turns = example.fields["messages"]
            return [
                part
                for turn in turns
                for part in ((f"{turn.role}: ", False), (f"{turn.content}\n", turn.role == "assistant"))
            ]
        prompt = render(self.task.causal, example.fields)
        if self.task.kind == "lm":
            return [(prompt, True)]
        return [(prompt, False), (example.answers[example.gold], True)]


def _marked(text: str, scored: bool) -> str:
    return f"{MARKS[0]}{text}{MARKS[1]}" if scored and text else text


def _quantiles(lengths: Sequence[int]) -> dict[str, int]:
    """Of the examples that have a length; the smallest that so many do not exceed."""
    found = [length for length in lengths if length] or [0]
    shares = {"min": 0, "median": 50, "p95": 95, "p99": 99, "max": 100}
    return {n: int(np.percentile(found, share, method="inverted_cdf")) for n, share in shares.items()}


def _labels(task: Task, examples: Sequence[Example]) -> dict[str, int] | None:
    """How many examples each label has; None without fixed ones."""
    if task.num_labels is None:
        return None
    counts = Counter(example.gold for example in examples)
    names = task.labels or tuple(map(str, range(task.num_labels)))
    return {name: counts[number] for number, name in enumerate(names)}


def _contradictions(task: Task, examples: Sequence[Example]) -> list[list[dict[str, str]]]:
    """The examples that ask the same and have different labels, together, each with its place and label."""
    if task.num_labels is None:
        return []
    alike: dict[Any, list[Example]] = {}
    for example in examples:
        alike.setdefault(key(example), []).append(example)
    names = task.labels or tuple(map(str, range(task.num_labels)))
    return [
        [{"where": where(example), "label": names[example.gold]} for example in group]
        for group in alike.values()
        if len({example.gold for example in group}) > 1
    ]


def _decide(count: int) -> list[str]:
    """What to do about so many contradictions."""
    if not count:
        return []
    return [
        f"{counted(count, 'text')} with different labels, listed above: give the rows of each the label that "
        "is right, or delete them; a model can learn no more than the most frequent one"
    ]


def _advice(
    config: TrainConfig, task: Task, splits: Splits, lengths: Sequence[int], limit: int | None
) -> list[str]:
    """What to do about it, the most useful first. limit: tokens of the model's sequences; None: no model."""
    found = []
    if limit is not None:
        longer = sum(length > limit for length in lengths)
        p99 = -(-max(8, _quantiles(lengths)["p99"]) // 8) * 8
        if longer:
            than = f"--max-length {limit}; --max-length {p99} fits 99 %"
            if limit < config.max_length:
                than = f"{limit} tokens, which are the positions that the model has"
            found.append(f"{100 * longer / len(lengths):.1f} % of the examples are longer than {than}")
        else:
            found.append(f"all examples fit --max-length {limit}; --max-length {p99} fits 99 %")
    if task.num_labels and all(name.replace(".", "").lstrip("-").isdigit() for name in task.labels):
        found.append(
            "labels are numbers: a causal model does better with words, in a task's file (--write-task)"
        )
    if task.kind == "completion" and 2 * sum(map(_runs_on, splits.train)) > len(splits.train):
        found.append(
            "prompts run into their completions without white space; end prompts with it, or --task chat"
        )
    if limit is None:
        found.append("with --model tokens are counted, and examples are shown as the model sees them")
    return found


def _runs_on(example: Example) -> bool:
    prompt = str(example.fields.get("prompt", " "))
    return not (prompt[-1:].isspace() or example.answers[0][:1].isspace())
