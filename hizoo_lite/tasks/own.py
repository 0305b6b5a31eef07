"""A user's own data files as rows: what the published formats of `files.py` are, and what else people have.

JSON Lines may be called `.json`, tables may have any delimiter and encoding and no line of headings, parquet
and arrow are read through pyarrow. What is no such file and looks like one is a data set's name on the hub,
`org/name` or `org/name:split`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from hizoo_lite.files import parse_json
from hizoo_lite.tasks import columnar, files, hub, tables
from hizoo_lite.tasks.files import Row, Split
from hizoo_lite.tasks.hub import HubSource

#: Files that are plain text, if the task is of such.
TEXTS = (".txt", ".label")
COLUMNAR = columnar.SUFFIXES
JSON = (".json", ".jsonl", ".ndjson")
_ON_HUB = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?")

#: Columns that say what they are: of a table's headings they are usual ones, see `forms.py`.
TEXT = (
    *("text", "sentence", "review", "content", "comment", "message", "body", "document", "tweet", "title"),
    *("description", "utterance", "query", "question"),
)
LABEL = (
    *("label", "labels", "class", "category", "target", "sentiment", "intent", "topic", "rating", "stars"),
    *("verdict", "team", "label_text", "tag", "type"),
)
CONVERSATION = ("messages", "conversations", "conversation", "dialog", "dialogue")
INSTRUCTION = ("instruction", "question", "query", "prompt", "input", "source")
INPUT = ("input", "context")
OUTPUT = ("output", "response", "answer", "completion", "target", "summary")
USUAL = frozenset({*TEXT, *LABEL, *CONVERSATION, *INSTRUCTION, *INPUT, *OUTPUT})


def on_hub(data: Path | str) -> HubSource | None:
    """The data set that `data` names, if no file or folder is called so. UserError if it cannot be read."""
    text = Path(data).as_posix()
    found = _ON_HUB.fullmatch(text)
    if found is None or Path(data).exists() or Path(text).suffix.lower() in files.SUFFIXES:
        return None
    return hub.find(found[1], found[2])


def has(data: Path | str, split: Split) -> bool:
    """Whether there is a file for this split; a single one is train only."""
    source = on_hub(data)
    if source is not None:
        return source.split(split) is not None
    path = Path(data)
    return split == "train" if path.is_file() else bool(files.find_split(path, split))


def rows(path: Path, names: Sequence[str] = ()) -> Iterator[Row]:
    """The records of a file, in order. names: the columns that a task reads; none: it is not known yet."""
    suffix = path.suffix.lower()
    if suffix in COLUMNAR:
        return columnar.rows(path)
    if suffix in JSON:
        encoding = tables.encoding_of(path)
        read = files.json_lines if _is_lines(path, encoding) else files.json_document
        return read(path, encoding)
    if suffix in files.SUFFIXES:
        return tables.rows(path, layout(path, names))
    return files.rows(path)  # which says what is allowed


def layout(path: Path, names: Sequence[str] = ()) -> tables.Layout:
    """How the file of a table is read."""
    return tables.sniff(path, names or USUAL, known=bool(names))


def read_text(path: Path, reader: Callable[..., Iterator[Row]], *, detect: bool) -> Iterator[Row]:
    """A text file by a task's own reader; detect: it takes an encoding, which is found."""
    return reader(path, tables.encoding_of(path)) if detect else reader(path)


def how_read(path: Path) -> str:
    """What is not usual about the way a file is read."""
    if path.suffix.lower() in (".csv", ".tsv"):
        return str(layout(path))
    if path.suffix.lower() in (*JSON, *TEXTS):
        encoding = tables.encoding_of(path)
        return "" if encoding.startswith("utf-8") else f"read as {encoding}"
    return ""


def _is_lines(path: Path, encoding: str) -> bool:
    """Whether every line is an object: the first is, and it is not the only one of a .json file."""
    with path.open("rb") as file:
        if (
            path.suffix.lower() == ".json"
            and file.read(1 << 16).decode(encoding, "replace").lstrip("\ufeff \t\r\n")[:1] == "["
        ):
            return False  # a document, whatever the length of its lines
    filled = (text for _, text in files.lines(path, encoding) if text.strip())
    first = next(filled, "")
    if path.suffix.lower() != ".json":
        return not first.lstrip().startswith("[")
    try:
        return isinstance(parse_json(first), dict) and next(filled, None) is not None
    except ValueError:
        return False
