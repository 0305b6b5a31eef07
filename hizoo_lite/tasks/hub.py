"""Reading data sets from the Hugging Face hub, through the optional `datasets` library."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

from hizoo_lite.errors import UserError
from hizoo_lite.tasks.files import SPLIT_WORDS, Row, Split


class HubSource(NamedTuple):
    """Where a data set is on the hub, and what it calls its splits (None: it has no such labelled split)."""

    path: str
    name: str | None = None
    train: str = "train"
    dev: str | None = "validation"
    test: str | None = None

    def split(self, split: Split) -> str | None:
        """The hub's name of a split."""
        return {"train": self.train, "dev": self.dev, "test": self.test}[split]


def no_library(task: str) -> UserError:
    """The error of a published task without data if `datasets` is missing."""
    return _no_library(_no_data(task))


def _no_data(task: str) -> str:
    return f"task {task}: no data folder was given and the `datasets` library is not installed"


def _of_user(path: str) -> tuple[str, str]:
    """What a user's data set is called in messages, and what is said without the library."""
    missing = "and the `datasets` library, which reads the hub, is not installed"
    return f"data: no file here is called {path}: {path}", f"data: {path} is no file here, {missing}"


def _no_library(missing: str) -> UserError:
    return UserError(f"{missing}; give --data, or run: pip install datasets (the extra hizoo-lite[hub])")


def rows(source: HubSource, split: Split, task: str, *, named: bool = False) -> Iterator[Row]:
    """The rows of a split. named: labels are their names, if the data set has names for its numbers.

    Raises UserError if `datasets` is missing, the hub is out of reach, or it has no such split.
    """
    wanted = source.split(split)
    if wanted is None:
        raise UserError(f"task {task}: the hub's {source.path} has no labelled {split} split")
    told = _of_user(source.path) if named else (f"task {task}: {source.path}", _no_data(task))
    table = _asked(*told, "load_dataset", source.path, source.name, split=wanted)
    features = (getattr(table, "features", None) or {}) if named else {}
    names = {column: of.names for column, of in features.items() if hasattr(of, "names")}
    return (
        Row(f"{source.path}[{wanted}]:{number}", _with_names(record, names))
        for number, record in enumerate(table)
    )


def _with_names(record: Mapping[str, Any], names: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    known = {column: record.get(column) for column in names}
    found = {c: names[c][label] for c, label in known.items() if isinstance(label, int) and label >= 0}
    return {**record, **found}


@cache
def find(path: str, split: str | None) -> HubSource:
    """A user's data set by its name; split: the only one that is read. UserError as for `rows`."""
    if split is not None:
        return HubSource(path, None, split, None)
    names = _asked(*_of_user(path), "get_dataset_split_names", path)
    train, dev, test = (
        next((name for name in names if name.lower() in words), None) for words in SPLIT_WORDS.values()
    )
    train = train or (names[0] if len(names) == 1 else None)
    if train is None:
        raise UserError(f"data: the hub's {path} has the splits {', '.join(names)}; say which: {path}:NAME")
    return HubSource(path, None, train, dev, test)


def _asked(name: str, missing: str, function: str, *arguments: Any, **options: Any) -> Any:
    """What a function of `datasets` gives. UserError if it is not there, or cannot."""
    try:
        import datasets
    except ImportError as error:
        raise _no_library(missing) from error
    try:
        return getattr(datasets, function)(*arguments, **options)
    except (OSError, ValueError, RuntimeError) as error:
        what = ": could not read ".join(name.rsplit(": ", 1))
        raise UserError(
            f"{what} from the hub ({type(error).__name__}: {error}); "
            "check the network, or give --data with local files"
        ) from error
