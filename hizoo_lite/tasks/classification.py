"""Sentence and sentence-pair classification: SST-2, SST-5, TREC, RTE, CB, SNLI, MNLI.

Prompts: masked ones from LM-BFF (2012.15723, Table 1), as MeZO uses them for RoBERTa (2305.17333, Appendix
E.2); causal ones from MeZO (Appendix E.2, OPT) for SST-2, RTE and CB. MeZO has no causal prompt for SST-5,
TREC, SNLI and MNLI: ours are SST-2's for SST-5, CB's for SNLI and MNLI, and one of our own for TREC. The
masked prompt of CB is that of the other entailment tasks.

Integer labels are the hub's: RTE 0 entailment, 1 not_entailment; CB 0 entailment, 1 contradiction,
2 neutral; SNLI and MNLI 0 entailment, 1 neutral, 2 contradiction; TREC 0-5 in its `coarse_label` only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from hizoo_lite.batch import Example
from hizoo_lite.errors import UserError
from hizoo_lite.tasks import files, metrics
from hizoo_lite.tasks.files import Row
from hizoo_lite.tasks.hub import HubSource
from hizoo_lite.tasks.task import Task

_TREC = ("abbr", "enty", "desc", "hum", "loc", "num")
_TREC_WORDS = (" Expression", " Entity", " Description", " Human", " Location", " Number")
_STARS = (" terrible", " bad", " okay", " good", " great")
_SENTIMENT = ("negative", "positive")
_GRADES = ("very negative", "negative", "neutral", "positive", "very positive")
_RTE = ("entailment", "not_entailment")
_CB = ("entailment", "contradiction", "neutral")
_NLI = ("entailment", "neutral", "contradiction")
_UNLABELLED = {"-", "-1"}
_SUPPOSE = 'Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or Maybe?\n'
_MASKED_PAIR = "{premise!o}? {mask}, {hypothesis!l}"


def numbered(*labels: str) -> dict[str, int]:
    """Label name -> index, and index as text -> index."""
    return {name: index for index, name in enumerate(labels)} | {str(i): i for i in range(len(labels))}


class _Sentence:
    """Builds the example of a row with one text and one label."""

    def __init__(self, labels: Mapping[str, int], words: Sequence[str]) -> None:
        self.labels, self.words = labels, tuple(words)

    def __call__(self, row: Row) -> Iterator[Example]:
        fields = {"text": row.text("sentence", "text")}
        yield Example(fields, self.words, row.label("label", self.labels))


class _Pair:
    """Builds the example of a row with a premise, a hypothesis and one label; drops SNLI's "-"."""

    def __init__(self, labels: Mapping[str, int], words: Sequence[str], drop: bool = False) -> None:
        self.labels, self.words, self.drop = labels, tuple(words), drop

    def __call__(self, row: Row) -> Iterator[Example]:
        column = "gold_label" if "gold_label" in row.values else "label"
        if self.drop and str(row.values.get(column)).strip() in _UNLABELLED:
            return
        fields = {
            "premise": row.text("premise", "sentence1"),
            "hypothesis": row.text("hypothesis", "sentence2"),
        }
        yield Example(fields, self.words, row.label(column, self.labels))


def _trec(row: Row) -> Iterator[Example]:
    if "coarse_label" in row.values:
        gold = row.label("coarse_label", numbered(*_TREC))
    else:
        gold = row.label("label", {name: index for index, name in enumerate(_TREC)})
    yield Example({"text": row.text("text", "question")}, _TREC_WORDS, gold)


def _trec_lines(path: Path) -> Iterator[Row]:
    """TREC's own files: `DESC:manner How did serfdom develop ?`, Latin-1."""
    for number, text in files.lines(path, encoding="latin-1"):
        if not text.strip():
            continue
        label, _, question = text.partition(" ")
        coarse, colon, _ = label.partition(":")
        if not colon or not question.strip():
            raise UserError(f"{path}:{number}: expected 'CLASS:sub-class question', got {text[:60]!r}")
        yield Row(f"{path}:{number}", {"label": coarse, "text": question})


def _sentiment_trees(path: Path) -> Iterator[Row]:
    """The Stanford treebank's files: one tree a line, `(3 (2 It) (4 (2 's) ...))`; the root is the label."""
    for number, text in files.lines(path):
        if not text.strip():
            continue
        root = re.match(r"\s*\(([0-4]) ", text)
        leaves = re.findall(r"\([0-4] ([^()\s]+)\)", text)
        if root is None or not leaves:
            raise UserError(f"{path}:{number}: expected a tree such as '(3 (2 It) ...)', got {text[:60]!r}")
        sentence = " ".join(leaves).replace("-LRB-", "(").replace("-RRB-", ")").replace("\\/", "/")
        yield Row(f"{path}:{number}", {"label": root[1], "sentence": sentence})


_ACCURACY = {"accuracy": metrics.accuracy}

SST2 = Task(
    name="sst2",
    kind="choice",
    build=_Sentence(numbered(*_SENTIMENT), (" terrible", " great")),
    scorers=_ACCURACY,
    causal="{text} It was",
    masked="{text} It was {mask}.",
    text="{text}",
    num_labels=2,
    labels=_SENTIMENT,
    cut="text",
    hub=HubSource("nyu-mll/glue", "sst2"),
)

SST5 = Task(
    name="sst5",
    kind="choice",
    build=_Sentence(numbered(*_GRADES), _STARS),
    scorers=_ACCURACY,
    causal="{text} It was",
    masked="{text} It was {mask}.",
    text="{text}",
    num_labels=5,
    labels=_GRADES,
    cut="text",
    headerless=("label", "text"),
    text_reader=_sentiment_trees,
    hub=HubSource("SetFit/sst5", None, test="test"),
    test_from="test",
)

TREC = Task(
    name="trec",
    kind="choice",
    build=_trec,
    scorers=_ACCURACY,
    causal="Question: {text}\nType:",
    masked="{mask}: {text}",
    text="{text}",
    num_labels=6,
    labels=_TREC,
    cut="text",
    text_reader=_trec_lines,
    hub=HubSource("CogComp/trec", None, dev=None, test="test"),
    test_from="test",
)

RTE = Task(
    name="rte",
    kind="choice",
    build=_Pair(numbered(*_RTE), ("Yes", "No")),
    scorers=_ACCURACY,
    causal='{premise}\nDoes this mean that "{hypothesis}" is true? Yes or No?\n',
    masked=_MASKED_PAIR,
    text="{premise}",
    text_pair="{hypothesis}",
    num_labels=2,
    labels=_RTE,
    cut="premise",
    hub=HubSource("aps/super_glue", "rte"),
)

CB = Task(
    name="cb",
    kind="choice",
    build=_Pair(numbered(*_CB), ("Yes", "No", "Maybe")),
    scorers={"accuracy": metrics.accuracy, "f1": metrics.macro_f1},
    causal=_SUPPOSE,
    masked=_MASKED_PAIR,
    text="{premise}",
    text_pair="{hypothesis}",
    num_labels=3,
    labels=_CB,
    cut="premise",
    hub=HubSource("aps/super_glue", "cb"),
)


def _three_way(name: str, source: HubSource) -> Task:
    """SNLI and MNLI, which differ in their files only."""
    return Task(
        name=name,
        kind="choice",
        build=_Pair(numbered(*_NLI), ("Yes", "Maybe", "No"), drop=True),
        scorers=_ACCURACY,
        causal=_SUPPOSE,
        masked=_MASKED_PAIR,
        text="{premise}",
        text_pair="{hypothesis}",
        num_labels=3,
        labels=_NLI,
        cut="premise",
        hub=source,
    )


SNLI = _three_way("snli", HubSource("stanfordnlp/snli", "plain_text", test="test"))
MNLI = _three_way("mnli", HubSource("nyu-mll/glue", "mnli", dev="validation_matched"))

TASKS = (SST2, SST5, TREC, RTE, CB, SNLI, MNLI)
