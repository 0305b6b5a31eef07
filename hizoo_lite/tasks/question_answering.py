"""Questions answered by a written completion: SQuAD v1.1 and DROP. Causal models only.

Prompts: MeZO (2305.17333, Appendix E.2); an answer ends with a line break. Training uses the first
reference. A DROP answer of several spans is written with "; " between them (MeZO trains on the first span
and scores the best span, which is not DROP's metric).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hizoo_lite.batch import Example
from hizoo_lite.errors import UserError
from hizoo_lite.tasks import metrics
from hizoo_lite.tasks.files import Row
from hizoo_lite.tasks.hub import HubSource
from hizoo_lite.tasks.task import WHERE, Task


def _example(row: Row, fields: dict[str, str], references: Sequence[str]) -> Example:
    kept = tuple(dict.fromkeys(reference.strip() for reference in references if reference.strip()))
    if not kept:
        raise UserError(f"{row.where}: field 'answers': question {fields['question']!r:.80} has no answer")
    return Example({**fields, WHERE: row.where}, (f" {kept[0]}\n",), 0, kept)


def _squad(row: Row) -> Iterator[Example]:
    if "paragraphs" not in row.values:  # the hub's rows are flat: title, context, question, answers
        fields = {name: row.text(name) for name in ("title", "context", "question")}
        yield _example(row, fields, row.record("answers").texts("text"))
        return
    title = row.text("title")
    for paragraph in row.records("paragraphs"):
        context = paragraph.text("context")
        for question in paragraph.records("qas"):
            asked = Row(f"{row.where}, question {question.values.get('id')!r}", question.values)
            fields = {"title": title, "context": context, "question": asked.text("question")}
            yield _example(asked, fields, [answer.text("text") for answer in asked.records("answers")])


def _drop(row: Row) -> Iterator[Example]:
    if "qa_pairs" not in row.values:  # the hub's rows are flat: passage, question, answers_spans
        fields = {"context": row.text("passage"), "question": row.text("question")}
        yield _example(row, fields, [metrics.SPAN_SEPARATOR.join(row.record("answers_spans").texts("spans"))])
        return
    context = row.text("passage")
    for question in row.records("qa_pairs"):
        asked = Row(f"{row.where}, question {question.values.get('query_id')!r}", question.values)
        answers = [asked.record("answer")]
        if asked.values.get("validated_answers"):
            answers += asked.records("validated_answers")
        fields = {"context": context, "question": asked.text("question")}
        yield _example(asked, fields, [_drop_answer(answer) for answer in answers])


def _drop_answer(answer: Row) -> str:
    """A DROP answer as text: its number, its spans, or its date as "day month year"."""
    number = answer.values.get("number")
    if number not in (None, ""):
        return str(number)
    if answer.values.get("spans"):
        return metrics.SPAN_SEPARATOR.join(answer.texts("spans"))
    date = answer.record("date").values
    return " ".join(str(date[part]) for part in ("day", "month", "year") if date.get(part))


SQUAD = Task(
    name="squad",
    kind="completion",
    build=_squad,
    scorers={"f1": metrics.squad_f1, "exact_match": metrics.squad_exact},
    causal="Title: {title}\nContext: {context}\nQuestion: {question}\nAnswer:",
    cut="context",
    stop="\n",
    max_new_tokens=50,
    hub=HubSource("rajpurkar/squad"),
)

DROP = Task(
    name="drop",
    kind="completion",
    build=_drop,
    scorers={"f1": metrics.drop_f1, "exact_match": metrics.drop_exact},
    causal="Passage: {context}\nQuestion: {question}\nAnswer:",
    cut="context",
    stop="\n",
    max_new_tokens=50,
    hub=HubSource("ucinlp/drop"),
)

TASKS = (SQUAD, DROP)
