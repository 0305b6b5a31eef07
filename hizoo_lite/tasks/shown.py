"""Examples and what a model answers, as people read them: without a tokenizer."""

from __future__ import annotations

from hizoo_lite.batch import Example
from hizoo_lite.tasks.metrics import Prediction
from hizoo_lite.tasks.task import Task, part_of
from hizoo_lite.tasks.templates import render

#: Characters of a prompt that are kept: its beginning and its end.
MOST = 400


def prompt(task: Task, example: Example) -> str:
    """What the model is asked, in plain text; the middle of a long one is left out."""
    own = task.parts[part_of(example)]
    if own.chat:
        turns = example.fields["messages"][:-1]
        text = "\n".join(f"{turn.role}: {turn.content}" for turn in turns)
    else:
        text = render(own.causal or str(own.text), example.fields)
    return text if len(text) <= MOST else f"{text[: MOST // 2]} … {text[-MOST // 2 :]}"


def gold(example: Example) -> str:
    """The right answer."""
    return _answer(example, example.gold)


def answer(task: Task, example: Example, prediction: Prediction) -> str:
    """What was predicted."""
    own = task.parts[part_of(example)]
    if isinstance(prediction, str):
        return own.completed(prediction)
    return _answer(example, prediction)


def _answer(example: Example, number: int) -> str:
    return example.answers[number].strip() if 0 <= number < len(example.answers) else str(number)
