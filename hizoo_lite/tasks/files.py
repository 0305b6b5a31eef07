"""Reading data files as streams of rows, each of which knows its file and line.

Formats by extension: `.tsv` (GLUE: no quoting, one header line), `.csv` (quoted, one header line),
`.jsonl`, `.json` (a list, `{"data": [...]}` as in SQuAD, or a mapping of records as in DROP), and
`.txt` / `.label` (read as `.tsv` unless the task has a reader of its own). Text is UTF-8, a byte order
mark is tolerated. A line above 10 MiB or with a zero byte is refused: that file is not text. A user's own
files may have other forms of these (`own.py`).
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hizoo_lite.errors import UserError
from hizoo_lite.files import is_unicode, parse_json

Split = Literal["train", "dev", "test"]

MAX_LINE_BYTES = 10 * 2**20
SUFFIXES = (".tsv", ".jsonl", ".json", ".csv", ".txt", ".label", ".ndjson", ".parquet", ".arrow", ".feather")

SPLIT_WORDS: dict[Split, tuple[str, ...]] = {
    "train": ("train", "training"),
    "dev": ("dev", "val", "valid", "validation", "eval", "evaluation"),
    "test": ("test", "testing"),
}
_SPECIAL_STEMS = {"trec_10": "test"}  # TREC's own name of its 500 test questions
_NOT_DATA = {
    *("readme", "license", "licence", "licenses"),
    *("dataset_info", "dataset_infos", "dataset_dict", "state"),  # of the `datasets` library
    *("config", "generation_config", "adapter_config", "model.safetensors.index"),  # of a model beside it
    *("tokenizer", "tokenizer_config", "special_tokens_map", "added_tokens", "vocab", "merges"),
}


@dataclass(frozen=True)
class Row:
    """One record of a data file. `where` is `file:line`, for messages."""

    where: str
    values: Mapping[str, Any]

    def value(self, *names: str) -> Any:
        """The first of these fields that is present. UserError naming file, line and columns if none is."""
        for name in names:
            if self.values.get(name) is not None:
                self.check_unicode(name, self.values[name])
                return self.values[name]
        columns = ", ".join(map(str, self.values)) or "none"
        wanted = " or ".join(repr(name) for name in names)
        raise UserError(f"{self.where}: field {wanted} is missing; the fields here are: {columns}")

    def check_unicode(self, name: str, found: Any) -> None:
        """UserError if a text, or one of a list, holds half of a surrogate pair; no tokenizer takes it."""
        for text in found if isinstance(found, list) else (found,):
            if isinstance(text, str) and not is_unicode(text):
                raise UserError(
                    f"{self.where}: field {name!r}: {text!r:.80} has half of a surrogate pair (a character "
                    "cut in two, such as an emoji); mend the text or leave it out"
                )

    def words(self, name: str) -> str:
        """A field as it stands in a prompt: a text, number or truth value, without outer white space."""
        found = self.value(name)
        finite = isinstance(found, float) and math.isfinite(found)
        if not (isinstance(found, str | int) or finite):
            raise UserError(
                f"{self.where}: field {name!r}: expected a text, a finite number or a truth value, "
                f"got {found!r:.80}"
            )
        return str(found).strip()

    def whole(self, name: str) -> str:
        """A field that is a text, with its outer white space."""
        self.text(name)
        return str(self.values[name])

    def text(self, *names: str) -> str:
        """The first of these fields that is present, which must be a text, without outer white space."""
        found = self.value(*names)
        if not isinstance(found, str):
            raise UserError(f"{self.where}: field {names[0]!r}: expected a text, got {found!r:.80}")
        return found.strip()

    def texts(self, *names: str) -> list[str]:
        """A field that is a list of texts."""
        found = self.value(*names)
        if not isinstance(found, list) or not all(isinstance(item, str) for item in found):
            raise UserError(f"{self.where}: field {names[0]!r}: expected a list of texts, got {found!r:.80}")
        return found

    def number(self, name: str) -> int:
        """A field that is a whole number."""
        found = self.value(name)
        if not isinstance(found, int):
            raise UserError(f"{self.where}: field {name!r}: expected a whole number, got {found!r:.80}")
        return found

    def records(self, *names: str) -> list[Row]:
        """A field that is a list of objects, as rows."""
        found = self.value(*names)
        if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
            raise UserError(
                f"{self.where}: field {names[0]!r}: expected a list of objects, got {found!r:.80}"
            )
        return [Row(self.where, item) for item in found]

    def record(self, *names: str) -> Row:
        """A field that is an object, as a row."""
        found = self.value(*names)
        if not isinstance(found, dict):
            raise UserError(f"{self.where}: field {names[0]!r}: expected an object, got {found!r:.80}")
        return Row(self.where, found)

    def label(self, column: str, table: Mapping[str, int]) -> int:
        """The index of this row's label: texts, numbers and booleans are looked up as lower-case text."""
        found = self.value(column)
        key = str(found).strip().lower()
        if not key:
            raise UserError(f"{self.where}: field {column!r}: it is empty, no label")
        if key not in table:
            allowed = ", ".join(dict.fromkeys(table))
            raise UserError(f"{self.where}: field {column!r}: unknown label {found!r}; allowed: {allowed}")
        return table[key]


def lines(path: Path, encoding: str = "utf-8") -> Iterator[tuple[int, str]]:
    """(line number from 1, text without its line end) for every line of a text file."""
    return ((number, text.rstrip("\r\n")) for number, text in whole_lines(path, encoding))


def whole_lines(path: Path, encoding: str = "utf-8") -> Iterator[tuple[int, str]]:
    """The same, with line ends as they are: inside of a quoted cell they are text."""
    if encoding.startswith(("utf-16", "utf-32")):
        yield from _wide_lines(path, encoding)
        return
    with path.open("rb") as file:
        number = 0
        while raw := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(raw) > MAX_LINE_BYTES:
                raise UserError(f"{path}:{number}: the line is longer than {MAX_LINE_BYTES} bytes")
            if b"\0" in raw:
                raise UserError(f"{path}:{number}: not a text file (it has a zero byte)")
            try:
                text = raw.decode(encoding)
            except UnicodeDecodeError as error:
                raise UserError(f"{path}:{number}: not {encoding} text ({error.reason})") from error
            if number == 1:
                text = text.removeprefix("\ufeff")
            yield number, text


def _wide_lines(path: Path, encoding: str) -> Iterator[tuple[int, str]]:
    """The lines of a text whose line ends have several bytes."""
    number = 0
    try:
        with path.open(encoding=encoding, newline="\n") as file:
            while text := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(text) > MAX_LINE_BYTES:
                    raise UserError(f"{path}:{number}: the line is longer than {MAX_LINE_BYTES} characters")
                yield number, text.removeprefix("\ufeff") if number == 1 else text
    except UnicodeError as error:
        raise UserError(f"{path}:{number + 1}: not {encoding} text ({error})") from error


def rows(path: Path, headerless: tuple[str, ...] = ()) -> Iterator[Row]:
    """The records of a file, in order.

    Args:
        path: a file with one of the extensions in `SUFFIXES`.
        headerless: the columns of a table that has no header line (LM-BFF's csv files); used when the
            first line names none of them.
    """
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        return json_lines(path)
    if suffix == ".json":
        return json_document(path)
    if suffix in (".csv", ".tsv", ".txt", ".label"):
        return _table(path, headerless)
    raise UserError(f"{path}: unknown extension {suffix!r}; allowed: {', '.join(SUFFIXES)}")


def json_lines(path: Path, encoding: str = "utf-8") -> Iterator[Row]:
    """An object a line."""
    for number, text in lines(path, encoding):
        if not text.strip():
            continue
        try:
            record = parse_json(text, object_pairs_hook=_once)
        except ValueError as error:
            raise UserError(f"{path}:{number}: not valid JSON: {_reason(error)}") from error
        if not isinstance(record, dict):
            raise UserError(f"{path}:{number}: expected a JSON object, got {text[:60]!r}")
        yield Row(f"{path}:{number}", record)


def json_document(path: Path, encoding: str = "utf-8-sig") -> Iterator[Row]:
    """SQuAD's {"data": [...]}, a plain list, or DROP's mapping from an id to a record."""
    try:
        document = parse_json(path.read_bytes().decode(encoding), object_pairs_hook=_once)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not {encoding.removesuffix('-sig')} text ({error.reason})") from error
    except ValueError as error:
        line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise UserError(f"{path}{line}: not valid JSON: {_reason(error)}") from error
    if isinstance(document, dict) and isinstance(document.get("data"), list):
        document = document["data"]
    named = (
        document.items() if isinstance(document, dict) else enumerate(document if _is_list(document) else ())
    )
    count = 0
    for key, record in named:
        if not isinstance(record, dict):
            raise UserError(f"{path}: entry {key!r}: expected a JSON object, got {record!r:.60}")
        count += 1
        yield Row(f"{path}: entry {key!r}", record)
    if not count and not _is_list(document):
        raise UserError(f"{path}: expected a list or an object of records, got {document!r:.60}")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. ValueError if a key is there twice: Python would take the last one in silence."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"the key {_twice(key for key, _ in pairs)!r} is there twice in one object")
    return found


def _twice(names: Iterable[str]) -> str | None:
    """The first name that is there a second time; columns without a name count for nothing."""
    counts = Counter(name for name in names if name)
    return next((name for name, count in counts.items() if count > 1), None)


def _reason(error: ValueError) -> str:
    return f"{error.msg} (column {error.colno})" if isinstance(error, json.JSONDecodeError) else str(error)


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _table(path: Path, headerless: tuple[str, ...]) -> Iterator[Row]:
    def columns(names: tuple[str, ...]) -> tuple[str, ...] | None:
        return headerless if headerless and not set(names) & set(headerless) else None

    return table(path, _cells(path), columns)


def table(
    path: Path,
    records: Iterable[tuple[int, list[str]]],
    headerless: Callable[[tuple[str, ...]], tuple[str, ...] | None],
) -> Iterator[Row]:
    """The rows of a table's records. headerless: the columns, given the first record; None: it is they."""
    columns: tuple[str, ...] = ()
    for number, cells in records:
        if not columns:
            names = tuple(cell.strip() for cell in cells)
            known = headerless(names)
            columns = names if known is None else known
            if known is None:
                if twice := _twice(columns):
                    raise UserError(f"{path}:{number}: two columns are called {twice!r}; rename one")
                continue
        if len(cells) != len(columns):
            raise UserError(
                f"{path}:{number}: {len(cells)} columns, expected {len(columns)} ({', '.join(columns)})"
            )
        yield Row(f"{path}:{number}", dict(zip(columns, cells, strict=True)))


def _cells(path: Path) -> Iterator[tuple[int, list[str]]]:
    if path.suffix.lower() != ".csv":
        for number, text in lines(path):
            if text.strip():
                yield number, text.split("\t")
        return
    yield from quoted_cells(path, whole_lines(path), ",")


def quoted_cells(
    path: Path, texts: Iterable[tuple[int, str]], delimiter: str
) -> Iterator[tuple[int, list[str]]]:
    """The records of a table whose cells may be in quotes, each with its last line."""
    reader = csv.reader((text for _, text in texts), strict=True, delimiter=delimiter)
    try:
        while (cells := _next_cells(reader)) is not None:
            if cells:
                yield reader.line_num, cells
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: not valid CSV: {error}") from error


def _next_cells(reader: Iterator[list[str]]) -> list[str] | None:
    """The next record, None at the end. The library's limit of a cell, one for the process, is put back."""
    before = csv.field_size_limit(MAX_LINE_BYTES)
    try:
        return next(reader, None)
    finally:
        csv.field_size_limit(before)


def find_split(data: Path, split: Split) -> list[Path]:
    """The files of a split, none if the folder has none: one, or the numbered parts of one.

    A file stands for every split. In a folder the split's word must be part of the name (`train.tsv`,
    `orig_dev.tsv`, `valid.jsonl`, `dev_matched.tsv`, `train-v1.1.json`) or a subfolder's (`test/`); plain
    names come first, then `orig_*`, then MNLI's `*_matched`. The only data file of a folder is the train
    split whatever its name.
    """
    if data.is_file():
        return [data]
    if not data.is_dir():
        raise UserError(f"data: no such file or folder: {data}")
    files = _data_files(data)
    ranked = sorted((rank, path) for path in files if (rank := _rank(path.stem.lower(), split)) is not None)
    best = [path for rank, path in ranked if rank == ranked[0][0]]
    if len({_without_number(path) for path in best}) > 1:
        listed = ", ".join(path.name for path in best)
        raise UserError(f"data: {data} has several {split} files ({listed}); keep one, or give the file")
    if best:
        return best
    only = split == "train" and len({_without_number(path) for path in files}) == 1
    if only and _split_of(files[0]) is None:
        return files
    return _in_subfolder(data, split)


def _in_subfolder(data: Path, split: Split) -> list[Path]:
    """The data files of a folder named as the split, or of the split in a folder called data."""
    named = sorted(
        path for path in data.iterdir() if path.is_dir() and path.name.lower() in SPLIT_WORDS[split]
    )
    if named:
        return _data_files(named[0])
    return find_split(data / "data", split) if (data / "data").is_dir() else []


def _without_number(path: Path) -> str:
    """A name without the number of one of several parts: train-00000-of-00002.parquet."""
    return re.sub(r"[-_.]?\d+(-of-\d+)$", "", path.stem) + path.suffix


def nameless(data: Path) -> list[str]:
    """The names of a folder's files that are taken for no split, beside others of their format that are."""
    files = _data_files(data) if data.is_dir() else []
    taken = {path.suffix.lower() for path in files if _split_of(path) is not None}
    return [path.name for path in files if _split_of(path) is None and path.suffix.lower() in taken]


def _data_files(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in SUFFIXES and path.is_file() and path.stem.lower() not in _NOT_DATA
    )


def _rank(stem: str, split: Split) -> int | None:
    """How well a file name fits a split (0 is best), or None if it does not."""
    words = SPLIT_WORDS[split]
    if stem in words or _SPECIAL_STEMS.get(stem) == split:
        return 0
    if stem in {f"orig_{word}" for word in words}:
        return 1
    if stem in {f"{word}_matched" for word in words}:
        return 2
    return 3 if set(re.split(r"[._\-]", stem)) & set(words) else None


def _split_of(path: Path) -> Split | None:
    splits: tuple[Split, ...] = ("train", "dev", "test")
    return next((split for split in splits if _rank(path.stem.lower(), split) is not None), None)
