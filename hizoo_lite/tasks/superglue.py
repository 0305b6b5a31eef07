"""Yes-or-no tasks of SuperGLUE over a passage: BoolQ, WSC, WiC and MultiRC.

Causal prompts: MeZO (2305.17333, Appendix E.2). It has no masked prompts for these; ours ask the same
question with the mask as the answer. Labels are false / true (0 / 1), answers No / Yes. MultiRC: one example
for each answer option; the examples of one question share a group.

MultiRC's main metric is F1a, as SuperGLUE defines it; MeZO's table reports accuracy, which is given as well.
"""

from __future__ import annotations

from collections.abc import Iterator

from hizoo_lite.batch import Example
from hizoo_lite.tasks import metrics
from hizoo_lite.tasks.classification import numbered
from hizoo_lite.tasks.files import Row
from hizoo_lite.tasks.hub import HubSource
from hizoo_lite.tasks.task import Task

_NAMES = ("false", "true")
_LABELS = numbered(*_NAMES)
_NO_YES = ("No", "Yes")
_ACCURACY = {"accuracy": metrics.accuracy}


def _boolq(row: Row) -> Iterator[Example]:
    column = "answer" if "answer" in row.values and "label" not in row.values else "label"
    question = row.text("question").removesuffix("?")
    fields = {"passage": row.text("passage"), "question": question}
    yield Example(fields, _NO_YES, row.label(column, _LABELS))


def _wsc(row: Row) -> Iterator[Example]:
    spans = row.record("target") if "target" in row.values else row
    fields = {
        "text": row.text("text"),
        "noun": spans.text("span1_text"),
        "pronoun": spans.text("span2_text").lower(),
    }
    yield Example(fields, _NO_YES, row.label("label", _LABELS))


def _wic(row: Row) -> Iterator[Example]:
    fields = {name: row.text(name) for name in ("word", "sentence1", "sentence2")}
    yield Example(fields, _NO_YES, row.label("label", _LABELS))


def _multirc(row: Row) -> Iterator[Example]:
    if "passage" not in row.values:  # the hub's rows are flat: paragraph, question, answer, idx
        index = row.record("idx")
        group = f"{index.value('paragraph')}-{index.value('question')}"
        yield _option(row.text("paragraph"), row.text("question"), row, row.text("answer"), group)
        return
    passage = row.record("passage")
    for number, question in enumerate(passage.records("questions")):
        group = f"{row.where}-{number}"
        for answer in question.records("answers"):
            yield _option(passage.text("text"), question.text("question"), answer, answer.text("text"), group)


def _option(paragraph: str, question: str, row: Row, answer: str, group: str) -> Example:
    fields = {"paragraph": paragraph, "question": question, "answer": answer}
    return Example(fields, _NO_YES, row.label("label", _LABELS), group=group)


BOOLQ = Task(
    name="boolq",
    kind="choice",
    build=_boolq,
    scorers=_ACCURACY,
    causal="{passage} {question!u}?\n",
    masked="{passage} {question!u}? {mask}.",
    text="{passage}",
    text_pair="{question!u}?",
    num_labels=2,
    labels=_NAMES,
    cut="passage",
    hub=HubSource("aps/super_glue", "boolq"),
)

WSC = Task(
    name="wsc",
    kind="choice",
    build=_wsc,
    scorers=_ACCURACY,
    causal='{text}\nIn the previous sentence, does the pronoun "{pronoun}" refer to {noun}? Yes or No?\n',
    masked='{text} In the previous sentence, does the pronoun "{pronoun}" refer to {noun}? {mask}.',
    text="{text}",
    text_pair='Does the pronoun "{pronoun}" refer to {noun}?',
    num_labels=2,
    labels=_NAMES,
    cut="text",
    hub=HubSource("aps/super_glue", "wsc.fixed"),
)

WIC = Task(
    name="wic",
    kind="choice",
    build=_wic,
    scorers=_ACCURACY,
    causal='Does the word "{word}" have the same meaning in these two sentences? Yes, No?\n'
    "{sentence1}\n{sentence2}\n",
    masked='{sentence1} {sentence2} Does the word "{word}" have the same meaning? {mask}.',
    text="{word}: {sentence1}",
    text_pair="{sentence2}",
    num_labels=2,
    labels=_NAMES,
    cut="sentence1",
    hub=HubSource("aps/super_glue", "wic"),
)

MULTIRC = Task(
    name="multirc",
    kind="choice",
    build=_multirc,
    scorers={
        "f1": metrics.positive_f1,
        "accuracy": metrics.accuracy,
        "exact_match": metrics.group_exact_match,
    },
    causal='{paragraph}\nQuestion: {question}\nI found this answer "{answer}". Is that correct? Yes or No?\n',
    masked='{paragraph} Question: {question} I found this answer "{answer}". Is that correct? {mask}.',
    text="{paragraph}",
    text_pair="{question} {answer}",
    num_labels=2,
    labels=_NAMES,
    cut="paragraph",
    hub=HubSource("aps/super_glue", "multirc"),
)

TASKS = (BOOLQ, WSC, WIC, MULTIRC)
