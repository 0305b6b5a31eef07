"""The model card of an export (README.md as the Hub shows it), and how to prompt what was tuned.

Of a prompt the card has the template of the run's task and an example that is made up here: never one of the
data, which may be private. If the task is not to be found any more (a function, a file that is gone),
nothing is said of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hizoo_lite.base import ModelKind
from hizoo_lite.batch import Example
from hizoo_lite.errors import UserError
from hizoo_lite.files import parse_yaml
from hizoo_lite.report import verdict
from hizoo_lite.report.record import read_run
from hizoo_lite.tasks import Task
from hizoo_lite.tasks.files import Row
from hizoo_lite.tasks.templates import fields_of, render
from hizoo_lite.train import provenance
from hizoo_lite.train.folder import RunFolder
from hizoo_lite.units import format_bytes

FILE = "README.md"

#: What the Hub calls what a model does.
_PIPELINES: dict[ModelKind, str] = {
    "causal": "text-generation",
    "masked": "fill-mask",
    "classifier": "text-classification",
}
#: What transformers loads a model of each kind by.
CLASSES: dict[ModelKind, str] = {
    "causal": "AutoModelForCausalLM",
    "classifier": "AutoModelForSequenceClassification",
    "masked": "AutoModelForMaskedLM",
}
#: A model's name on the Hub.
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")

#: Entries of summary.json that the card shows, by what they are called there.
_FIGURES = {
    "tuned on": "task",
    "loss before": "loss_before",
    "loss after": "loss_after",
    "test examples": "test_examples",
    "steps": "steps",
    "forward passes": "forward_passes",
    "estimator": "estimator",
    "curvature": "curvature",
    "base stored as": "bits",
    "trainable parameters": "trainable_parameters",
    "peak memory of the run": "measured_peak_bytes",
    "peak memory of inference": "inference_peak_bytes",
    "seed": "seed",
}
_MADE_UP = "A short text of your own."
#: How a causal model that was tuned to tell answers apart is asked, by what "Load it" has loaded.
_ASK = '''## Ask it

It was tuned to tell these answers apart, not to write one: the answer is the likeliest of them after the
prompt, by the mean over its tokens.

```python
prompt, answers = {prompt!r}, {answers!r}


def likelihood(answer):
    """The mean log-probability of the answer's tokens."""
    ids = tokenizer(prompt + answer, return_tensors="pt").input_ids.to(model.device)
    begin = tokenizer(prompt, return_tensors="pt").input_ids.shape[1]
    logits = model(ids).logits[0, begin - 1 : -1].float().log_softmax(-1)
    return logits.gather(-1, ids[0, begin:, None]).mean().item()


print(max(answers, key=likelihood))
```
'''


class Prompting(NamedTuple):
    """How a task puts its examples to a model."""

    template: str
    example: str  # the template with a made-up text
    answers: tuple[str, ...]  # what continues it, or the labels; empty if a text is written
    note: str  # what a template alone does not say


def prompting(run: Path | str, kind: ModelKind) -> list[Prompting]:
    """That of each task of a run; none if there is no run, or its task is not here."""
    saved = provenance.saved_task(run)
    parts = () if saved is None else saved[1].parts
    return [found for part in parts if (found := _prompting(part, kind)) is not None]


def prompt_line(run: Path | str, kind: ModelKind) -> str:
    """The first task's, in a line for the console; "" for none."""
    found = prompting(run, kind)
    if not found:
        return ""
    first = found[0]
    answers = f" -> the likeliest of {', '.join(map(repr, first.answers))}" if first.answers else ""
    return f"prompt it as it was tuned: {first.example!r}{answers}{first.note and f' ({first.note})'}"


def _prompting(task: Task, kind: ModelKind) -> Prompting | None:
    if task.chat:
        note = (
            "turns in the tokenizer's chat template; without one, lines that begin with User: and Assistant:"
        )
        return Prompting("", f"user: {_MADE_UP}", (), note)
    template = {"causal": task.causal, "masked": task.masked, "classifier": task.text}[kind]
    if not template or task.kind == "lm":
        return None
    pair = task.text_pair if kind == "classifier" else None
    fields = [name for name in fields_of(template + (pair or "")) if name != "mask"]
    example = _example(task, fields)
    values = {name: _made_up(name, fields) for name in fields} if example is None else example.fields
    shown = [render(text, {**values, "mask": "{mask}"}) for text in (template, pair) if text]
    answers = () if example is None or task.kind != "choice" else tuple(example.answers)
    if kind == "classifier":
        answers = task.labels or answers
    elif kind == "masked":
        answers = tuple(answer.strip() for answer in answers)
    notes = {
        "causal": "",
        "masked": "{mask} is the tokenizer's mask token",
        "classifier": "the tokenizer's text and text pair" if pair else "",
    }
    joined = template if pair is None else f"{template} / {pair}"
    return Prompting(joined, " / ".join(shown), answers, notes[kind])


def _made_up(name: str, fields: Sequence[str]) -> str:
    return _MADE_UP if len(fields) == 1 else f"<{name}>"


def _example(task: Task, fields: Sequence[str]) -> Example | None:
    """What the task makes of a made-up row; None if it wants other columns than its template's."""
    texts = {name: _made_up(name, fields) for name in (*task.columns, *fields)}
    for column in (*task.columns, "label"):  # one of them has the labels
        row = Row("card", texts | {column: task.labels[0] if task.labels else "0"})
        try:
            found = list(task.build(row))
        except (UserError, KeyError, ValueError, TypeError):
            continue
        if found and all(found[0].fields.get(name) == texts[name] for name in fields):
            return found[0]
    return None


def write(
    run: Path | str,
    *,
    title: str,
    about: str,
    base: str,
    base_folder: Path,
    kind: ModelKind,
    library: str,
    tags: str,
    how: str,
) -> str:
    """README.md. Without a run: what the export itself says.

    base: folder or Hub id; base_folder: where it is, whose licence is the card's. tags: divided by
    commas. how: Markdown that says how to load or start it.
    """
    parts = [
        _front_matter(base, base_folder, kind, library, tags),
        f"# {title}\n",
        f"{about}\n",
        _in_words(run),
        _figures(RunFolder(run).read_summary()),
        *map(_section, prompting(run, kind)),
        "## Load it\n",
        how,
        _asking(run, kind) if library in ("peft", "transformers") else "",
    ]
    return "\n".join(part for part in parts if part)


def _asking(run: Path | str, kind: ModelKind) -> str:
    """How to have an answer of the first task's; nothing if the model writes its answers."""
    settings, found = provenance.saved_config(run), prompting(run, kind)
    ranks = kind == "causal" and settings is not None and settings.loss != "answer"
    if not ranks or not found or not found[0].answers:
        return ""
    return _ASK.format(prompt=found[0].example, answers=list(found[0].answers))


def _front_matter(base: str, folder: Path, kind: ModelKind, library: str, tags: str) -> str:
    """What the Hub reads. It takes no folder for a base; a licence only if the base names one."""
    about = [f"base_model: {json.dumps(base)}"] if HUB_ID.fullmatch(base) else []
    found = licence(folder)
    about += [f"license: {json.dumps(found)}"] if found else []
    about += [f"library_name: {library}", f"pipeline_tag: {_PIPELINES[kind]}"]
    return "\n".join(["---", *about, f"tags: [{tags}]", "---", ""])


def licence(folder: Path) -> str | None:
    """What a model's own card says its licence is; None if it has no card, or says nothing."""
    path = folder / FILE
    if not path.is_file():
        return None
    text = path.read_text(encoding="utf-8", errors="replace")
    match = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
    try:
        found = parse_yaml(match[1]).get("license") if match else None
    except ValueError:
        return None
    return found if isinstance(found, str) else None


def _in_words(run: Path | str) -> str:
    """What came of the run on examples that were held out, with its error bar."""
    if provenance.saved_config(run) is None:
        return ""
    said = verdict.of_run(read_run(run))
    return "" if said is None else f"{said.says}\n"


def _figures(summary: Mapping[str, Any]) -> str:
    """A table of what is known; nothing if nothing is."""
    shown = dict(_FIGURES)
    metric = summary.get("metric")
    if metric not in (None, "loss"):
        shown |= {f"{metric} before": "metric_before", f"{metric} after": "metric_after"}
    rows = [(name, summary[key]) for name, key in shown.items() if summary.get(key) is not None]
    if not rows:
        return ""
    lines = [f"| {name} | {_number(name, value)} |" for name, value in rows]
    return "\n".join(["| | |", "|---|---|", *lines, ""])


def _number(name: str, value: Any) -> str:
    if name.startswith("peak memory"):
        return format_bytes(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _section(found: Prompting) -> str:
    lines = ["## Prompt it\n"]
    if found.template:
        lines.append(
            f"It was tuned on this template, without a chat template:\n\n{_fenced(found.template)}\n"
        )
    lines.append(f"For example:\n\n{_fenced(found.example)}\n")
    if found.answers:
        lines.append(
            f"Answers: {', '.join(f'`{json.dumps(a, ensure_ascii=False)}`' for a in found.answers)}.\n"
        )
    if found.note:
        lines.append(f"{found.note[0].upper()}{found.note[1:]}.\n")
    return "\n".join(lines)


def _fenced(text: str) -> str:
    """As it is, whatever backticks are in it."""
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall(r"`+", text)), 3)
    return f"{fence}text\n{text}\n{fence}"
