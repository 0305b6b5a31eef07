"""Data that is recognised: from its columns to the keys of a task's file (`custom.py`), which say what it is.

A form is what people call a way to write down examples. The first rows decide, but for the labels of a
classification, which are those of the whole train part. The order of `FORMS` is the order of recognition.
"""

from __future__ import annotations

import math
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from hizoo_lite.errors import UserError
from hizoo_lite.files import is_unicode
from hizoo_lite.tasks import files, hub, own, tables, text
from hizoo_lite.tasks.conversations import FIELDS
from hizoo_lite.tasks.custom import LOSS
from hizoo_lite.tasks.files import Row, Split
from hizoo_lite.tasks.records import Records
from hizoo_lite.units import counted

#: What stands for: recognise it.
AUTO = "auto"
_ROWS = 200  # that are looked at
_MOST_LABELS = 200
_MOST_CHARACTERS = 60  # of a label
_FEW_LABELS = 10  # that may each be there once or twice
_CHAT = "chat template of the model, loss on "
#: Headings that say no more than that there are labels.
_NO_CUE = {"label", "labels", "class", "target", "category_id", "y"}

Keys = dict[str, Any]


class Understood(NamedTuple):
    """What data was found to be."""

    form: str
    keys: Keys  # of a task's file
    says: str  # how it is learnt, in a few words
    columns: tuple[str, ...]
    unused: tuple[str, ...]  # columns that nothing reads
    how_read: tuple[str, ...]  # what is not usual about its files

    def lines(self, count: int, *, of_objective: bool = False) -> list[str]:
        """What is told of it.

        count: how many examples there are. of_objective: an objective is given the columns that are not used.
        """
        found = [f"{self.form}: {counted(count, 'example')}, {self.says}", *self.how_read]
        hint = " (--label-field names one that holds labels)" if self.keys.get("kind") == "lm" else ""
        what = "columns that only the objective is given" if of_objective else "columns that are not used"
        return found + [f"{what}: {', '.join(self.unused)}{hint}"] * bool(self.unused)


@dataclass
class Sample:
    """The first rows of data, and what was said of its columns."""

    rows: Sequence[Row]
    everything: Callable[[], Iterator[Row]]  # all rows of the train part
    text_field: str | None = None
    label_field: str | None = None
    forced: bool = False  # the form was named
    columns: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.columns = tuple(dict.fromkeys(chain.from_iterable(row.values for row in self.rows)))

    def find(self, names: Sequence[str], kind: type | tuple[type, ...] = str) -> str | None:
        """The first of these columns, in upper or lower case, that mostly has values of this kind."""
        lowered = {column.lower(): column for column in reversed(self.columns)}
        present = (lowered[name] for name in names if name in lowered)
        return next((column for column in present if self.is_of(column, kind)), None)

    def is_of(self, column: str, kind: type | tuple[type, ...]) -> bool:
        """Whether at least half of the rows have a value of this kind there."""
        return 2 * sum(isinstance(row.values.get(column), kind) for row in self.rows) >= len(self.rows) > 0

    def values(self, column: str) -> list[str]:
        """Those of a column in the first rows, as texts."""
        return [str(row.values[column]) for row in self.rows if row.values.get(column) not in (None, "")]


@dataclass(frozen=True)
class Form:
    """One way to write down examples. keys: of a task's file, None if the sample is something else."""

    wanted: str
    says: str
    keys: Callable[[Sample], Keys | None]


def _items(sample: Sample, entry: str) -> str | None:
    """The column with lists of objects that have this entry."""
    column = sample.find(own.CONVERSATION, list)
    lists = (row.values.get(column) for row in sample.rows) if column else ()
    first = next((items[0] for items in lists if isinstance(items, list) and items), None)
    return column if isinstance(first, Mapping) and entry in first else None


def _conversation(entry: str) -> Callable[[Sample], Keys | None]:
    def keys(sample: Sample) -> Keys | None:
        column = _items(sample, entry)
        if column is None:
            return None
        more = {"system_field": sample.find(("system",)), "tools_field": sample.find(("tools",), (str, list))}
        return {"kind": "chat", "messages_field": column} | {k: v for k, v in more.items() if v}

    return keys


def _completion(sample: Sample) -> Keys | None:
    prompt = sample.text_field or sample.find(("prompt",), (str, list))
    completion = sample.label_field or sample.find(("completion",), (str, list))
    if prompt is None or completion is None:
        return None
    fields = {"prompt_field": prompt, "completion_field": completion}
    if sample.is_of(prompt, list):
        tools = sample.find(("tools",), (str, list))
        return {"kind": "chat", **fields} | ({"tools_field": tools} if tools else {})
    templates = {"prompt": "{prompt}", "answer": "{completion}", "metric": LOSS, "cut": ""}
    return {"kind": "completion", **templates, **fields}


def _alpaca(sample: Sample) -> Keys | None:
    output = sample.label_field or sample.find(own.OUTPUT)
    others = [name for name in own.INSTRUCTION if name != (output or "").lower()]
    instruction = sample.text_field or sample.find(others)
    if output is None or instruction is None:
        return None
    if not sample.forced and output.lower() in own.LABEL and _repeat(sample, output):
        return None  # labels
    keys = {"kind": "chat", "instruction_field": instruction, "output_field": output}
    given = sample.find([name for name in own.INPUT if name not in (instruction.lower(), output.lower())])
    more = {"input_field": given, "system_field": sample.find(("system",))}
    return keys | {name: column for name, column in more.items() if column}


def _classification(sample: Sample) -> Keys | None:
    label = sample.label_field or _label_column(sample)
    if label is None or label not in sample.columns:
        return None
    column = sample.text_field or _text_column(sample, label)
    if column is None:
        return None
    labels = _labels(sample, label)
    cue = label.replace("_", " ").strip()
    cue = cue.capitalize() if cue.isupper() else cue[:1].upper() + cue[1:]
    is_cue = label.lower() not in _NO_CUE and re.fullmatch(r"[^\W\d_][\w -]*", label)
    cue = cue if is_cue and not tables.COLUMN.fullmatch(label) else "Label"
    return {
        "kind": "choice",
        "prompt": f"{{text}}\n{cue}:",
        "masked_prompt": f"{{text}} {cue}: {{mask}}.",
        "text_field": column,
        "label_field": label,
        "answers": {name: " " + re.sub(r"[\s_]+", " ", name) for name in labels},
    }


def _label_column(sample: Sample) -> str | None:
    """By its name; if the form is named or there are two columns, by few values that come again."""
    scalar = (str, int, float)
    named = sample.find([name for name in own.LABEL if name != (sample.text_field or "").lower()], scalar)
    if named is not None and (sample.forced or _repeat(sample, named)):
        return named
    if not (sample.forced or len(sample.columns) == 2):
        return None
    others = [column for column in sample.columns if column != sample.text_field]
    found = [
        column
        for column in others
        if sample.is_of(column, scalar)
        and _repeat(sample, column)
        and len(set(sample.values(column))) < len(sample.values(column))
    ]
    if len(found) > 1:
        raise UserError(
            f"data: {' and '.join(map(repr, found))} may both be the labels; say which: --label-field"
        )
    return found[0] if found else None


def _repeat(sample: Sample, column: str) -> bool:
    """Whether a column has few values, each of a word or a few."""
    values = [value.lower() for value in sample.values(column)]
    return (
        len(set(values)) <= max(2, len(values) // 2) and max(map(len, values), default=0) <= _MOST_CHARACTERS
    )


def _are_sentences(sample: Sample, column: str) -> bool:
    """Whether most values are too long for names of classes, though they repeat: answers to questions."""
    values = set(sample.values(column))
    return 2 * sum(len(value) > _MOST_CHARACTERS / 2 for value in values) > len(values)


def _text_column(sample: Sample, label: str) -> str | None:
    """By its name, else that of the longest texts."""
    named = sample.find([name for name in own.TEXT if name != label.lower()])
    if named is not None:
        return named
    others = [column for column in sample.columns if column != label and sample.is_of(column, str)]
    return max(others, key=lambda column: sum(map(len, sample.values(column))), default=None)


def _labels(sample: Sample, column: str) -> list[str]:
    """The labels of the whole train part; those that differ in upper and lower case only are one."""
    counts: Counter[str] = Counter()
    for row in sample.everything():
        found = row.values.get(column)
        is_number = isinstance(found, int) or (isinstance(found, float) and math.isfinite(found))
        is_text = isinstance(found, str) and found.strip() != "" and is_unicode(found)
        if is_number or is_text:
            counts[str(found).strip()] += 1
        if len(counts) > 2 * _MOST_LABELS:
            break
    spelled: dict[str, str] = {}
    for name, _ in counts.most_common():
        spelled.setdefault(name.lower(), name)
    labels = list(spelled.values())
    are_sentences = len(labels) == counts.total() and max(map(len, labels), default=0) > _MOST_CHARACTERS / 2
    if are_sentences or (len(labels) > _FEW_LABELS and 2 * len(labels) > counts.total()):
        raise UserError(
            f"data: column {column!r} has {len(labels)} different values in {counts.total()} rows, which are "
            f"no classes; answers that are texts: --task alpaca --label-field {shlex.quote(column)}, and "
            "--text-field for the questions"
        )
    if not 2 <= len(labels) <= _MOST_LABELS:
        several = f"more than {_MOST_LABELS}" if labels[2:] else str(len(labels))
        raise UserError(
            f"data: column {column!r} has {several} different labels; allowed: 2 to {_MOST_LABELS}, or "
            "another column: --label-field"
        )
    return sorted(labels, key=_in_order)


def _in_order(label: str) -> tuple[float, str]:
    try:
        return float(label), label
    except ValueError:
        return float("inf"), label


def _text(sample: Sample) -> Keys | None:
    column = sample.text_field or sample.find(own.TEXT)
    if column is None and len(sample.columns) == 1 and sample.is_of(sample.columns[0], str):
        column = sample.columns[0]
    if column is None or column not in sample.columns:
        return None
    return {"kind": "lm", "prompt": "{text}"} | ({"text_field": column} if column != "text" else {})


FORMS: dict[str, Form] = {
    "messages": Form(
        "messages, a list of role and content", f"{_CHAT}the assistant's turns", _conversation("role")
    ),
    "sharegpt": Form(
        "conversations, a list of from and value", f"{_CHAT}the assistant's turns", _conversation("from")
    ),
    "completion": Form(
        "prompt and completion (--text-field, --label-field)",
        "texts as they are, loss on completions",
        _completion,
    ),
    "alpaca": Form(
        "instruction, input (optional) and output (--text-field, --label-field)", f"{_CHAT}outputs", _alpaca
    ),
    "classification": Form("a text and a label (--text-field, --label-field)", "", _classification),
    "text": Form("text", "loss on every token", _text),
}


#: The forms whose columns may be named.
WITH_FIELDS = ("completion", "alpaca", "classification", "text")


def is_form(name: str) -> bool:
    """Whether this is no task by itself: it is made of the data."""
    return name == AUTO or name in FORMS


def recognise(
    data: Path | str | Records,
    form: str = AUTO,
    text_field: str | None = None,
    label_field: str | None = None,
) -> Understood:
    """What data is.

    Args:
        data: as for `Task.load`.
        form: one of `FORMS`, or `AUTO`.
        text_field, label_field: the columns of a classification, of prompts and completions or of
            instructions and outputs, if their names do not say it.

    Raises UserError, with the columns that there are, if it is nothing that is known.
    """
    wants_text = form in (AUTO, "text") and label_field is None
    part, how_read = _source(data, wants_text)
    sample = Sample(list(islice(part(), _ROWS)), part, text_field, label_field, form != AUTO)
    if not sample.rows:
        raise UserError(f"data: {_called(data)} holds no examples")
    for name in filter(None, (text_field, label_field)):
        if name not in sample.columns:
            raise UserError(f"data: no column {name!r}; the columns are: {', '.join(sample.columns)}")
    names = [form] if form != AUTO else list(FORMS)
    if form == AUTO and (label_field or text_field):
        names = ["classification"] if label_field else ["classification", "text"]
    _check_read(form, text_field, label_field)
    for name in names:
        keys = FORMS[name].keys(sample)
        if keys is not None:
            used = {value for key, value in keys.items() if key in (*FIELDS, "text_field", "label_field")}
            used |= {"text"} if keys["kind"] == "lm" and "text_field" not in keys else set()
            columns = sample.columns
            unused = tuple(column for column in columns if column not in used)
            return Understood(name, {"name": name, **keys}, _says(name, keys), columns, unused, how_read)
    wanted = "; ".join(f"{name}: {FORMS[name].wanted}" for name in names)
    raise UserError(
        f"data: {_called(data)}: the columns {', '.join(sample.columns)} are not recognised; allowed: "
        f"{wanted}; or --task FILE.toml, which says what they are{_guess(sample)}"
    )


def _guess(sample: Sample) -> str:
    """The flags that may say what unknown columns are: those of labels, or of two columns of texts."""
    texts = [column for column in sample.columns if sample.is_of(column, str)]
    labels = [column for column in texts if len(set(sample.values(column))) > 1 and _repeat(sample, column)]
    if sample.forced or sample.text_field or sample.label_field or len(texts) < 2:
        return ""
    answers = [column for column in labels if _are_sentences(sample, column)]
    if len(labels) == 1 and not answers:
        return f". Perhaps: --label-field {shlex.quote(labels[0])}"
    if len(texts) == 2 and labels == answers[:1]:  # the one whose texts repeat answers the other
        first, second = map(shlex.quote, sorted(texts, key=labels.__contains__))
        return f". Perhaps: --task alpaca --text-field {first} --label-field {second}"
    return ""


def _check_read(form: str, text_field: str | None, label_field: str | None) -> None:
    """UserError for a column that is named to a form that does not read it."""
    readers = {
        "--text-field": (text_field, WITH_FIELDS),
        "--label-field": (label_field, WITH_FIELDS[:-1]),
    }
    for flag, (column, forms) in readers.items():
        if column is not None and form not in (AUTO, *forms):
            raise UserError(f"{flag}: got {column!r}, allowed with --task {', '.join((AUTO, *forms))}")


def _says(name: str, keys: Keys) -> str:
    if name == "completion" and keys["kind"] == "chat":
        return f"{_CHAT}completions"
    if name != "classification":
        return FORMS[name].says
    names, count = list(keys["answers"]), len(keys["answers"])
    between = "; " if any("," in name for name in names) else ", "
    listed = between.join([*names[:12], *["..."] * (count > 12)])
    return f"text in {keys['text_field']!r}, {count} labels in {keys['label_field']!r} ({listed})"


def _source(
    data: Path | str | Records, wants_text: bool
) -> tuple[Callable[[], Iterator[Row]], tuple[str, ...]]:
    """The rows of the train part or, if there is none, of another; what is not usual about its files."""
    splits: tuple[Split, ...] = ("train", "dev", "test")
    if isinstance(data, Records):
        return partial(data.rows, next(filter(data.has, splits), splits[0])), ()
    source = own.on_hub(data)
    if source is not None:
        return partial(hub.rows, source, "train", AUTO, named=True), ()
    found = next(filter(None, (files.find_split(Path(data), split) for split in splits)), [])
    if not found:
        raise UserError(f"data: {data} has no data files; allowed: {', '.join(files.SUFFIXES)}")
    said = ((path.name, own.how_read(path)) for path in found)
    how_read = tuple(f"{name}: {words}" for name, words in said if words)
    if wants_text and found[0].suffix.lower() in own.TEXTS:
        return (lambda: text.pieces(found[0], tables.encoding_of(found[0]))), how_read
    return (lambda: chain.from_iterable(own.rows(path) for path in found)), how_read


def _called(data: Path | str | Records) -> str:
    return "the rows" if isinstance(data, Records) else str(data)
