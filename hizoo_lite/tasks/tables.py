"""Tables as people have them: which encoding, which delimiter, whether there is a line of headings.

The first lines decide, but for the encoding, which a single byte at the end may tell. Rules, not
`csv.Sniffer`: that takes letters for delimiters if cells are sentences.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Collection, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from hizoo_lite.errors import UserError
from hizoo_lite.tasks import files
from hizoo_lite.tasks.files import Row

DELIMITERS = (",", ";", "\t", "|")
_NAMED = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}
_LINES = 200  # that are looked at
_CHUNK = 1 << 20
_BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
#: Bytes that cp1252 has no character for.
_NOT_CP1252 = re.compile(rb"[\x81\x8d\x8f\x90\x9d]")
_NUMBER = re.compile(r"[-+]?(\d+([.,]\d*)?|[.,]\d+)([eE][-+]?\d+)?%?")
#: What a column of a table without headings is called.
COLUMN = re.compile(r"column\d+")
_MOST_NAME = 40  # characters of a heading
_MOST_LABELS = 20


class Layout(NamedTuple):
    """How a table's file is to be read."""

    encoding: str
    delimiter: str
    quoted: bool  # cells may be in quotes
    columns: tuple[str, ...] | None  # of a table without a line of headings

    def __str__(self) -> str:
        """What is not usual about it."""
        parts = [] if self.encoding.startswith("utf-8") else [f"read as {self.encoding}"]
        parts += [] if self.delimiter in ",\t" else [f"cells end at a {_NAMED[self.delimiter]}"]
        parts += (
            [] if self.columns is None else [f"no line of headings, columns are {', '.join(self.columns)}"]
        )
        return "; ".join(parts)


def encoding_of(path: Path) -> str:
    """utf-8, utf-8-sig, utf-16, utf-32 by their marks or zero bytes; what is no UTF-8: cp1252, latin-1."""
    decoder, one_byte = codecs.getincrementaldecoder("utf-8")(), False
    undefined = False
    with path.open("rb") as file:
        chunk = file.read(_CHUNK)
        for mark, encoding in _BOMS:
            if chunk.startswith(mark):
                return encoding
        if (wide := _without_mark(chunk)) is not None:
            return wide
        while chunk:
            undefined = undefined or _NOT_CP1252.search(chunk) is not None
            try:
                decoder.decode(chunk)
            except UnicodeDecodeError:
                one_byte = True
                decoder.reset()
            chunk = file.read(_CHUNK)
    try:
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        one_byte = True
    if one_byte:
        return "latin-1" if undefined else "cp1252"
    return "utf-8"


def _without_mark(chunk: bytes) -> str | None:
    """UTF-16 by where zero bytes are; None for what has few of them."""
    head = chunk[: 2 * (len(chunk[:4096]) // 2)][:4096]
    zeros = [head[side::2].count(0) for side in (0, 1)]
    half = len(head) // 2
    if not half or max(zeros) < half / 2 or min(zeros) > half / 20:
        return None
    return "utf-16-le" if zeros[1] > zeros[0] else "utf-16-be"


def sniff(path: Path, names: Collection[str], known: bool) -> Layout:
    """The layout of a table.

    Args:
        path: a .csv, .tsv or .txt file.
        names: columns that may be there.
        known: they are those of a task: the first line is headings unless they are `column1` and so on. If
            not they are usual ones, and what the lines look like counts as well.
    """
    encoding = encoding_of(path)
    lines = [text for _, text in islice(files.whole_lines(path, encoding), _LINES)]
    delimiter, quoted = _cells(path, lines)
    records = _records(path, lines, delimiter, quoted)
    first = [cell.strip() for cell in records[0]] if records else []
    if known:
        has_headings = bool(set(first) & set(names)) or not all(map(COLUMN.fullmatch, names))
    else:
        has_headings = not records or _are_headings(first, records[1:], names)
    columns = None if has_headings else tuple(f"column{number + 1}" for number in range(len(first)))
    return Layout(encoding, delimiter, quoted, columns)


def rows(path: Path, layout: Layout) -> Iterator[Row]:
    """The rows of a table. UserError naming file and line for a row with other columns than the first."""
    lines = files.whole_lines(path, layout.encoding)
    if layout.quoted:
        records = files.quoted_cells(path, lines, layout.delimiter)
    else:
        records = ((n, t.rstrip("\r\n").split(layout.delimiter)) for n, t in lines if t.strip())
    return files.table(path, records, lambda first: layout.columns)


def _cells(path: Path, lines: Sequence[str]) -> tuple[str, bool]:
    """The delimiter, and whether cells may be in quotes: what divides the lines most evenly."""
    if path.suffix.lower() != ".csv":
        return "\t", not _even(_records(path, lines, "\t", False)) or _is_quoted(lines)
    found = [(delimiter, _records(path, lines, delimiter, True)) for delimiter in DELIMITERS]
    divided = [(delimiter, records) for delimiter, records in found if records and len(records[0]) > 1]
    even = [delimiter for delimiter, records in divided if _even(records)]
    return (even or [delimiter for delimiter, _ in divided] or [","])[0], True


def _records(path: Path, lines: Sequence[str], delimiter: str, quoted: bool) -> list[list[str]]:
    """The records of the first lines; the last one may not be whole. None for what is not valid."""
    if not quoted:
        return [text.rstrip("\r\n").split(delimiter) for text in lines if text.strip()]
    found = []
    try:
        for _, cells in files.quoted_cells(path, enumerate(lines), delimiter):
            found.append(cells)
    except UserError:  # told with its line when the file is read
        return found
    return found


def _even(records: Sequence[Sequence[str]]) -> bool:
    return len({len(cells) for cells in records}) == 1


def _is_quoted(lines: Sequence[str]) -> bool:
    """Whether cells are in quotes that are no part of the text: every quote at a cell's start has its end."""
    cells = [cell for text in lines for cell in text.rstrip("\r\n").split("\t") if cell.startswith('"')]
    whole = [cell for cell in cells if len(cell) > 1 and cell.endswith('"')]
    return len(whole) == len(cells) and any('""' in cell[1:-1] for cell in cells)


def _are_headings(first: Sequence[str], rest: Sequence[Sequence[str]], names: Collection[str]) -> bool:
    """Whether the first record names the columns."""
    lowered = [cell.lower() for cell in first]
    columns = [[cells[index].strip() for cells in rest if len(cells) > index] for index in range(len(first))]
    if any(cell and cell in below for cell, below in zip(first, columns, strict=True)):
        return False  # it is a label, or a text that is there twice
    if set(lowered) & set(names):
        return True
    filled = [cell for cell in first if cell]
    if any(_NUMBER.fullmatch(cell) for cell in filled) or len(set(lowered)) < len(lowered):
        return False
    if any(_is_of_values(below) for below in columns):
        return True
    return all(len(cell) <= _MOST_NAME and re.fullmatch(r"[^\W\d][\w .-]*", cell) for cell in filled)


def _is_of_values(below: Sequence[str]) -> bool:
    """Whether a column has numbers or labels, of which the first cell is known to be none."""
    is_labels = 1 < len(set(below)) <= min(_MOST_LABELS, max(2, len(below) // 2))
    return is_labels or (bool(below) and all(map(_NUMBER.fullmatch, below)))
