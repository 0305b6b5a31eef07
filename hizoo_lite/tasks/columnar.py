"""Parquet and arrow files as rows, through pyarrow if it is installed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from hizoo_lite.errors import UserError
from hizoo_lite.tasks.files import Row

SUFFIXES = (".parquet", ".arrow", ".feather")
_ROWS = 1024  # that are in memory at once


def rows(path: Path) -> Iterator[Row]:
    """The rows of a file with one of `SUFFIXES`. UserError if pyarrow is missing or the file is damaged."""
    try:
        import pyarrow
    except ImportError as error:
        raise UserError(
            f"{path}: pyarrow reads such files and is not installed; run: pip install 'hizoo-lite[parquet]', "
            "or save the data as JSON Lines"
        ) from error
    number = 0
    try:
        for batch in _batches(path):
            for record in batch.to_pylist():
                yield Row(f"{path}: row {number}", record)
                number += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: row {number}: cannot be read: {error}") from error


def _batches(path: Path) -> Iterable[Any]:
    """Of a parquet file, an arrow file (feather too) or an arrow stream, as `datasets` writes them."""
    if path.suffix.lower() == ".parquet":
        from pyarrow import parquet

        yield from parquet.ParquetFile(path).iter_batches(batch_size=_ROWS)
        return
    from pyarrow import ArrowInvalid, ipc, memory_map

    with memory_map(str(path)) as source:
        try:
            reader = ipc.open_file(source)
            batches: Iterable[Any] = (reader.get_batch(index) for index in range(reader.num_record_batches))
        except ArrowInvalid:
            source.seek(0)
            batches = ipc.open_stream(source)
        for batch in batches:
            yield from (batch.slice(first, _ROWS) for first in range(0, batch.num_rows, _ROWS))
