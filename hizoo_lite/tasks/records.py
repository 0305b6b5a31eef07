"""Data that is in memory: a list of dicts, a `datasets.Dataset`, a pandas DataFrame, any iterable of rows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hizoo_lite.errors import UserError
from hizoo_lite.files import is_unicode, write_text
from hizoo_lite.tasks.files import SPLIT_WORDS, Row, Split

_ALLOWED = "rows (dicts of column name -> value), or rows by the name of their part (train, dev, test)"


class Records:
    """Rows in memory, by part, as they would be read from a JSONL file: what is written is what was used.

    Example:
        >>> data = Records([{"text": "good", "label": 1}])
        >>> data.has("train"), data.has("test")
        (True, False)
    """

    def __init__(self, data: Any) -> None:
        """Read the rows.

        Args:
            data: rows (dicts, a `datasets.Dataset`, a DataFrame), which are the train part; or a mapping of
                parts (a `datasets.DatasetDict`) to rows.

        Raises:
            UserError: naming the row, for what is no row or what JSON cannot hold.
        """
        parts = data if isinstance(data, Mapping) else {"train": data}
        self._rows: dict[Split, list[dict[str, Any]]] = {}
        for name, rows in parts.items():
            split = next((split for split, words in SPLIT_WORDS.items() if name in words), None)
            if split is None or split in self._rows:
                raise UserError(f"data: got a part called {name!r}, allowed: {_ALLOWED}")
            self._rows[split] = list(_read(rows, str(name)))

    def has(self, split: Split) -> bool:
        """Whether there is the part `split`."""
        return split in self._rows

    def rows(self, split: Split) -> Iterator[Row]:
        """The rows of the part `split`, in order. UserError if there is no such part."""
        if split not in self._rows:
            raise UserError(f"data: has no {split} part; the parts here are: {', '.join(self._rows)}")
        return (Row(f"data, {split} row {number}", row) for number, row in enumerate(self._rows[split]))

    def write(self, folder: Path) -> None:
        """Write a JSONL file for each part into `folder`."""
        folder.mkdir(exist_ok=True)
        for split, rows in self._rows.items():
            write_text(folder / f"{split}.jsonl", "".join(_line(row) + "\n" for row in rows))


def _read(rows: Any, part: str) -> Iterator[dict[str, Any]]:
    if hasattr(rows, "to_dict") and hasattr(rows, "columns"):  # a DataFrame
        rows = rows.to_dict(orient="records")
    if isinstance(rows, str | bytes) or not isinstance(rows, Iterable):
        raise UserError(f"data: got {rows!r:.80}, allowed: a file or folder, {_ALLOWED}")
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise UserError(f"data, {part} row {number}: got {row!r:.80}, allowed: {_ALLOWED}")
        try:
            yield json.loads(json.dumps(dict(row), default=_plain))
        except (TypeError, ValueError, RecursionError) as error:
            raise UserError(f"data, {part} row {number}: {error}") from error


def _line(row: Mapping[str, Any]) -> str:
    """As JSON; with escapes if a text has half of a surrogate pair, which UTF-8 has not."""
    text = json.dumps(row, ensure_ascii=False)
    return text if is_unicode(text) else json.dumps(row)


def _plain(value: Any) -> Any:
    """A numpy scalar or array as Python's own."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"a {type(value).__name__} cannot be put into a JSONL file: {value!r:.80}")
