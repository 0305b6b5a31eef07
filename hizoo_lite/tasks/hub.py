"""Reading a task's data from the Hugging Face hub, through the optional `datasets` library."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from hizoo_lite.errors import UserError
from hizoo_lite.tasks.files import Row, Split


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
    """The error where `datasets` is missing."""
    return UserError(
        f"task {task}: no data folder was given and the `datasets` library is not installed; "
        "give --data, or run: pip install datasets"
    )


def rows(source: HubSource, split: Split, task: str) -> Iterator[Row]:
    """The rows of a split.

    Raises UserError if `datasets` is missing, the hub is out of reach, or it has no such split.
    """
    wanted = source.split(split)
    if wanted is None:
        raise UserError(f"task {task}: the hub's {source.path} has no labelled {split} split")
    try:
        import datasets
    except ImportError as error:
        raise no_library(task) from error
    try:
        table = datasets.load_dataset(source.path, source.name, split=wanted)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"task {task}: could not read {source.path} from the hub ({type(error).__name__}: {error}); "
            "check the network, or give --data with local files"
        ) from error
    return (Row(f"{source.path}[{wanted}]:{number}", record) for number, record in enumerate(table))
