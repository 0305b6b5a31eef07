"""A user's own task: a small TOML file over JSONL, CSV or TSV data.

    name = "demo-sentiment"
    kind = "choice"                 # "choice", "completion", "lm", "chat" or "tokens"
    prompt = "{sentence} It was"    # the fields are the data's columns; not for "chat" and "tokens"
    label_field = "label"           # choice: the column that holds the label
    metric = "accuracy"             # choice: accuracy, f1 (macro); completion: f1, exact_match
    cut = "sentence"                # the field shortened in long prompts; by default the prompt's only field

    [answers]                       # choice: label -> the text that continues the prompt
    negative = " terrible"
    positive = " great"

Optional: `answer` (completion: the template of the text to write), `masked_prompt` (with `{mask}`),
`classifier_text` (by default the prompt's only field) and `classifier_text_pair`. `cut = ""` cuts nothing:
what is too long is left out. Every problem of the file is reported at once; unknown keys are problems.

A column whose name is no field's is named by a key: `text_field` is the column of `{text}`, `prompt_field`
and `completion_field` those of `{prompt}` and `{completion}`, as they are with their outer white space. In
"chat" such keys say which columns a conversation is in (`conversations.FIELDS`). "tokens" are rows that are
tokenized already (`tokenized.py`); `answers` are then the names of a classifier's classes, in their order.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hizoo_lite.batch import Example
from hizoo_lite.errors import UserError
from hizoo_lite.files import parse_toml
from hizoo_lite.tasks import metrics, text
from hizoo_lite.tasks.conversations import FIELDS, Conversations
from hizoo_lite.tasks.files import Row
from hizoo_lite.tasks.metrics import Scorer
from hizoo_lite.tasks.task import Task
from hizoo_lite.tasks.templates import fields_of, render
from hizoo_lite.tasks.tokenized import tokenized

_METRICS: dict[str, dict[str, Scorer]] = {
    "choice": {"accuracy": metrics.accuracy, "f1": metrics.macro_f1},
    "completion": {"f1": metrics.squad_f1, "exact_match": metrics.squad_exact},
    "lm": {},
    "chat": {},
    "tokens": {},
}
_REQUIRED = {
    "choice": ("prompt", "answers", "label_field"),
    "completion": ("prompt", "answer"),
    "lm": ("prompt",),
    "chat": (),
    "tokens": (),
}
_ALLOWED = {
    "choice": (
        *_REQUIRED["choice"],
        "metric",
        "cut",
        "masked_prompt",
        "classifier_text",
        "classifier_text_pair",
        "text_field",
    ),
    "completion": (*_REQUIRED["completion"], "metric", "cut", "prompt_field", "completion_field"),
    "lm": (*_REQUIRED["lm"], "cut", "text_field"),
    "chat": FIELDS,
    "tokens": ("answers",),
}
#: The key of a file that has several tasks.
SEVERAL = "tasks"
#: The metric of a completion of which nothing is written, and its loss alone is looked at.
LOSS = "loss"
_TEMPLATES = ("prompt", "answer", "masked_prompt", "classifier_text", "classifier_text_pair")


def load(path: Path) -> list[Task]:
    """The task of a TOML file, or its several. UserError lists every problem of the file."""
    try:
        keys = parse_toml(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise UserError(f"task: cannot read {path} ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{path}: not valid TOML: {error}") from error
    return from_keys(keys, str(path))


def from_keys(keys: Mapping[str, Any], where: str = "task") -> list[Task]:
    """The task that the keys of such a file make; with `SEVERAL` alone, a list of such keys, each of them.

    UserError, naming `where`, lists every problem.
    """
    each = keys.get(SEVERAL, [])
    if SEVERAL in keys:
        if set(keys) != {SEVERAL} or not isinstance(each, list) or not each:
            raise UserError(f"{where}: {SEVERAL}: allowed alone, as [[{SEVERAL}]], a task's keys each")
        if any(not isinstance(one, Mapping) or SEVERAL in one for one in each):
            raise UserError(f"{where}: {SEVERAL}: allowed: the keys of a task each")
        found = [from_keys(one, f"{where}: task {number}") for number, one in enumerate(each, 1)]
        return [task for [task] in found]
    problems = _problems(keys)
    if problems:
        raise UserError(f"{where}: " + "; ".join(problems))
    return [_task(keys)]


def from_function(function: Callable[[Mapping[str, Any]], Any]) -> Task:
    """The task of a function from a row to (prompt, completion): what is trained is the completion."""
    name = getattr(function, "__name__", type(function).__name__)
    return Task(
        name=name,
        kind="completion",
        build=_Pairs(function),
        scorers=_METRICS["completion"],
        causal="{prompt}",
        cut="prompt",
        max_new_tokens=64,
        dev_from="dev",
        test_from="test",
    )


def _problems(keys: Mapping[str, Any]) -> list[str]:
    kind = keys.get("kind")
    if not isinstance(kind, str) or kind not in _ALLOWED:
        return [f"kind: got {kind!r}; allowed: {', '.join(_ALLOWED)}"]
    allowed = ("name", "kind", *_ALLOWED[kind])
    found = [
        f"{key}: unknown key for kind {kind!r}; allowed: {', '.join(allowed)}"
        for key in keys
        if key not in allowed
    ]
    found += [f"{key}: missing" for key in ("name", *_REQUIRED[kind]) if key not in keys]
    found += [
        f"{key}: expected a non-empty text, got {keys[key]!r}"
        for key in allowed
        if key != "answers"
        and key in keys
        and not (isinstance(keys[key], str) and (keys[key] or key == "cut"))
    ]
    if found:
        return found
    return (
        _template_problems(keys)
        + _choice_problems(keys)
        + _metric_problems(keys)
        + _conversation_problems(keys)
    )


def _template_problems(keys: Mapping[str, Any]) -> list[str]:
    found = []
    for key in _TEMPLATES:
        try:
            names = fields_of(keys.get(key, ""))
        except ValueError as error:
            found.append(f"{key}: {error}")
            continue
        if key == "masked_prompt" and key in keys and keys[key].count("{mask}") != 1:
            found.append(f"{key}: expected {{mask}} once, got {keys[key]!r}")
        if key == "prompt" and key in keys and not names:
            found.append(f"{key}: no {{field}} in {keys[key]!r}")
        if key == "prompt" and keys.get("cut", "") and keys["cut"] not in names:
            found.append(f"cut: got {keys['cut']!r}; allowed: the fields of the prompt ({', '.join(names)})")
        if key == "prompt" and keys.get(key, "").endswith(" ") and keys["kind"] != "lm":
            found.append(f"{key}: ends in a space; put it at the start of the answers instead")
    return found


def _choice_problems(keys: Mapping[str, Any]) -> list[str]:
    if "answers" not in keys:
        return []
    answers = keys["answers"]
    if not isinstance(answers, dict) or len(answers) < 2:
        return [f"answers: expected a table of at least two labels, got {answers!r}"]
    if not all(isinstance(label, str) for label in answers):
        return [f"answers: expected labels that are texts, as in a TOML file, got {list(answers)!r:.80}"]
    bad = [label for label, word in answers.items() if not (isinstance(word, str) and word.strip())]
    if bad:
        return [f"answers.{label}: expected a non-empty text, got {answers[label]!r}" for label in bad]
    if len(set(answers.values())) < len(answers):
        return ["answers: two labels have the same text"]
    if len({label.lower() for label in answers}) < len(answers):
        return ["answers: two labels differ in upper and lower case only"]
    return []


def _metric_problems(keys: Mapping[str, Any]) -> list[str]:
    allowed = [*_METRICS[keys["kind"]], *([LOSS] if keys["kind"] == "completion" else [])]
    if "metric" in keys and keys["metric"] not in allowed:
        return [f"metric: got {keys['metric']!r}; allowed: {', '.join(allowed)}"]
    return []


def _conversation_problems(keys: Mapping[str, Any]) -> list[str]:
    """Columns of a conversation that are named in part, or twice over."""
    pairs = (("instruction_field", "output_field"), ("prompt_field", "completion_field"))
    found = [
        f"{one}: missing, beside {other}"
        for pair in pairs
        for one, other in (pair, pair[::-1])
        if other in keys and one not in keys
    ]
    ways = [name for name in ("output_field", "completion_field", "messages_field") if name in keys]
    if keys["kind"] == "chat" and len(ways) > 1:
        found.append(f"{ways[1]}: not allowed beside {ways[0]}")
    return found


def _task(keys: Mapping[str, Any]) -> Task:
    """The task of checked keys. Data of its own: dev and test come from its own files if it has them."""
    kind = keys["kind"]
    if kind == "tokens":
        return tokenized(keys["name"], keys.get("answers", {}))
    if kind == "chat":
        turns = Conversations(keys)
        return replace(text.CHAT, name=keys["name"], build=turns, columns=turns.columns)
    fields = fields_of(keys["prompt"])
    only = fields[0] if len(fields) == 1 else ""
    scorers = _METRICS[kind]
    main = keys.get("metric", next(iter(scorers), ""))
    build = _Build(keys)
    return Task(
        name=keys["name"],
        kind=kind,
        build=build,
        scorers={main: scorers[main]} if main in scorers else {},
        causal=keys["prompt"],
        masked=keys.get("masked_prompt"),
        text=keys.get("classifier_text", f"{{{only}}}" if only and kind == "choice" else None),
        text_pair=keys.get("classifier_text_pair"),
        num_labels=len(keys["answers"]) if kind == "choice" else None,
        labels=tuple(keys["answers"]) if kind == "choice" else (),
        cut=keys.get("cut", only),
        stop="\n" if keys.get("answer", "").endswith("\n") else None,
        max_new_tokens={"choice": 0, "completion": 64, "lm": 128}[kind],
        text_reader=text.pieces if kind == "lm" and build.columns == ("text",) else None,
        columns=build.columns,
        dev_from="dev",
        test_from="test",
    )


class _Pairs:
    """The example of a row by a function that gives a prompt and its completion."""

    def __init__(self, function: Callable[[Mapping[str, Any]], Any]) -> None:
        self.function = function

    def __call__(self, row: Row) -> Iterator[Example]:
        try:
            prompt, answer = self.function(copy.deepcopy(row.values))  # the run folder has the row as it was
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise UserError(
                f"{row.where}: task {getattr(self.function, '__name__', 'function')}: "
                f"{type(error).__name__}: {error}; wanted: a function from a row to (prompt, completion)"
            ) from error
        if not isinstance(prompt, str) or not isinstance(answer, str) or not answer.strip():
            raise UserError(f"{row.where}: got {(prompt, answer)!r:.80}, wanted: (prompt, completion), texts")
        row.check_unicode("prompt", prompt)
        row.check_unicode("completion", answer)
        yield Example({"prompt": prompt}, (answer,), 0, (answer.strip(),))


class _Build:
    """The examples of a row: the fields that the templates name, and the label or the answer."""

    def __init__(self, keys: Mapping[str, Any]) -> None:
        self.kind = keys["kind"]
        self.label_field = keys.get("label_field", "")
        self.answers: Mapping[str, str] = keys.get("answers", {})
        self.answer = keys.get("answer", "")
        names = [name for key in _TEMPLATES for name in fields_of(keys.get(key, ""))]
        self.fields = [name for name in dict.fromkeys(names) if name != "mask"]
        self.column_of = {name: keys.get(f"{name}_field", name) for name in self.fields}
        self.as_it_is = "completion_field" in keys
        self.says_which = "text_field" in keys

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that are read."""
        return (*self.column_of.values(), *filter(None, [self.label_field]))

    def __call__(self, row: Row) -> Iterator[Example]:
        read = row.whole if self.as_it_is else row.words
        fields = {name: read(column) for name, column in self.column_of.items()}
        if self.says_which and not any(fields.values()):
            raise UserError(f"{row.where}: the text is empty")
        if self.kind == "choice":
            table = {label.lower(): index for index, label in enumerate(self.answers)}
            yield Example(fields, tuple(self.answers.values()), row.label(self.label_field, table))
        elif self.kind == "completion":
            answer = render(self.answer, fields)
            if not answer.strip():
                raise UserError(f"{row.where}: the answer is empty")
            yield Example(fields, (answer,), 0, (answer.strip(),))
        else:
            yield Example(fields, ("",), 0)
