"""Language modelling on plain text (`lm`) and chat-style tuning (`chat`). Causal models only.

`lm`: the loss is on every token up to the encoder's max_length; what is beyond it is not used. A `.txt` file
is cut at line ends into pieces of at most 2 000 characters (a longer line is a piece of its own), each one
example; in tables and JSON Lines the field `text` is one.

`chat`: the loss is on the assistant's turns only. JSON Lines with `messages` (see `conversations.py`), or
with `prompt` and `completion` for one exchange.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from hizoo_lite.batch import Example
from hizoo_lite.tasks import files
from hizoo_lite.tasks.conversations import Conversations
from hizoo_lite.tasks.files import Row
from hizoo_lite.tasks.task import Task

PIECE_CHARACTERS = 2000


def pieces(path: Path, encoding: str = "utf-8") -> Iterator[Row]:
    """The pieces of a text file, each with the line it starts at."""
    held: list[str] = []
    size, first = 0, 1
    for number, line in files.lines(path, encoding):
        if held and size + len(line) + 1 > PIECE_CHARACTERS:
            yield Row(f"{path}:{first}", {"text": "\n".join(held)})
            held, size = [], 0
        if not held:
            if not line.strip():
                continue
            first = number
        held.append(line)
        size += len(line) + 1
    if held:
        yield Row(f"{path}:{first}", {"text": "\n".join(held)})


def _lm(row: Row) -> Iterator[Example]:
    text = row.text("text")
    if text:
        yield Example({"text": text}, (text,), 0)


LM = Task(
    name="lm",
    kind="lm",
    build=_lm,
    causal="{text}",
    cut="text",
    text_reader=pieces,
    max_new_tokens=128,
    dev_from="dev",
    test_from="test",
)

CHAT = Task(
    name="chat",
    kind="lm",
    build=Conversations({}),
    chat=True,
    max_new_tokens=256,
    dev_from="dev",
    test_from="test",
)

TASKS = (LM, CHAT)
