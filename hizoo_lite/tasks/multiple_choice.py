"""Tasks whose answers differ from example to example: COPA and ReCoRD. Causal models only.

Prompts: MeZO (2305.17333, Appendix E.2). COPA joins premise and choice by "because" or "so"; ReCoRD
continues the passage's highlights with the query in which an entity takes the placeholder's place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hizoo_lite.batch import Example
from hizoo_lite.errors import UserError
from hizoo_lite.tasks import metrics
from hizoo_lite.tasks.classification import numbered
from hizoo_lite.tasks.files import Row
from hizoo_lite.tasks.hub import HubSource
from hizoo_lite.tasks.task import Task

_CONJUNCTIONS = {"cause": "because", "effect": "so"}
_PLACEHOLDER = "@placeholder"


def _copa(row: Row) -> Iterator[Example]:
    question = row.text("question")
    if question not in _CONJUNCTIONS:
        raise UserError(f"{row.where}: field 'question': got {question!r}; allowed: cause, effect")
    fields = {"premise": row.text("premise").removesuffix("."), "conjunction": _CONJUNCTIONS[question]}
    choices = tuple(" " + _uncapitalised(row.text(name)) for name in ("choice1", "choice2"))
    yield Example(fields, choices, row.label("label", numbered("choice1", "choice2")))


def _uncapitalised(choice: str) -> str:
    """The first word in lower case, unless it is the pronoun I."""
    first, space, rest = choice.partition(" ")
    return choice if first == "I" else first.lower() + space + rest


def _record(row: Row) -> Iterator[Example]:
    if "qas" not in row.values:  # the hub's rows are flat: passage, query, entities, answers
        yield from _query(row, row.text("passage"), row.texts("entities"), row.texts("answers"))
        return
    passage = row.record("passage")
    text = str(passage.value("text"))  # not stripped: the entities are positions in it
    entities = [text[span.number("start") : span.number("end") + 1] for span in passage.records("entities")]
    for question in row.records("qas"):
        answers = [answer.text("text") for answer in question.records("answers")]
        yield from _query(question, text, entities, answers)


def _query(row: Row, passage: str, entities: Sequence[str], answers: Sequence[str]) -> Iterator[Example]:
    query = row.text("query")
    if _PLACEHOLDER not in query:
        raise UserError(f"{row.where}: field 'query': no {_PLACEHOLDER} in {query[:60]!r}")
    candidates = tuple(dict.fromkeys(entities))
    gold = next((index for index, entity in enumerate(candidates) if entity in answers), None)
    if gold is None:
        raise UserError(f"{row.where}: field 'answers': none of {list(answers)!r:.80} is among the entities")
    fields = {
        "passage": passage.replace("@highlight\n", "- ").strip(),
        "query": query,
        "entities": candidates,
    }
    continuations = tuple(" " + query.replace(_PLACEHOLDER, entity) for entity in candidates)
    yield Example(fields, continuations, gold, tuple(answers), group=f"{row.where}: {query}")


COPA = Task(
    name="copa",
    kind="choice",
    build=_copa,
    scorers={"accuracy": metrics.accuracy},
    causal="{premise} {conjunction}",
    cut="premise",
    hub=HubSource("aps/super_glue", "copa"),
)

RECORD = Task(
    name="record",
    kind="choice",
    build=_record,
    scorers={"f1": metrics.record_f1, "exact_match": metrics.record_exact},
    causal="{passage}\n-",
    cut="passage",
    cut_side="start",  # the highlights, which the query continues, are at the end
    hub=HubSource("aps/super_glue", "record"),
)

TASKS = (COPA, RECORD)
