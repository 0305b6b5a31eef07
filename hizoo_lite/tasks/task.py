"""What a task is: where its examples come from, how they are put to a model, how predictions are scored."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple

from hizoo_lite.batch import Example, Metric
from hizoo_lite.errors import UserError
from hizoo_lite.tasks import files, hub, own
from hizoo_lite.tasks.files import Row, Split
from hizoo_lite.tasks.metrics import Prediction, Scorer
from hizoo_lite.tasks.records import Records

logger = logging.getLogger(__name__)

Kind = Literal["choice", "completion", "lm"]
#: The examples at some places of an endless stream of them.
Stream = Callable[[range], list[int]]

#: Rows that a first look is at.
_PEEKED = 20
#: The key in `Example.fields` under which an example's file and line is kept. No template can name it.
WHERE = "@where"
#: Likewise, of a run of several tasks: which of them an example is of, from 0.
TASK = "@task"
#: Likewise the whole row that an example was made of, for objectives that are given it.
ROW = "@row"
#: Entries that are no text of an example.
ABOUT = (WHERE, ROW)


def where(example: Example) -> str:
    """The file and line of an example, for messages."""
    return str(example.fields.get(WHERE, "example"))


def part_of(example: Example) -> int:
    """Which of a run's tasks an example is of."""
    return int(example.fields.get(TASK, 0))


class LeftOut(NamedTuple):
    """An example that is not used."""

    where: str  # file and line
    why: str


def check_mostly_good(name: str, bad: Sequence[LeftOut], count: int) -> None:
    """UserError, with the first ones, if over half of `count` examples are bad: the task is another."""
    if 2 * len(bad) > count:
        first = "\n  ".join(f"{where}: {why}" for where, why in bad[:3])
        raise UserError(f"{name}: {len(bad)} of {count} examples cannot be used; the first:\n  {first}")


@dataclass(frozen=True)
class Task:
    """A task: how data becomes examples, how they are put to a model, and how its answers are scored.

    A user's own task is mostly a `.toml` file or a function, see `get`. Templates are texts with a field of
    `Example.fields` in braces, such as "{question} Answer:".

    Attributes:
        name: as given to `tasks.get`.
        kind: "choice" picks one of `Example.answers`; "completion" writes a text; "lm" has no answer, only
            a loss (`metric` is then "loss" and `score` refuses).
        build: the examples of one row of a file or of the hub; none if the row is to be dropped.
        scorers: metric name -> function; the first is the task's main metric.
        causal: the prompt of a causal model. `Example.answers` continue it literally, with their own leading
            space; a prompt therefore never ends in a space.
        masked: the prompt of a masked model, with one `{mask}`; None if the task has none. The words at
            the mask are the answers without their outer white space.
        text: a classifier's input; None if the task does not fit a classifier.
        text_pair: its second part, if it has two.
        num_labels: how many classes; None if every example has its own answers.
        labels: their names in the data, in the order of `Example.gold`; none if they have none.
        cut: the field that is shortened if a prompt is longer than the limit; "" for none.
        cut_side: which end of that field goes.
        stop: a completion ends before this text; None: at the end-of-sequence token.
        max_new_tokens: how many tokens a completion may have.
        tokenized: the fields hold tokens and their labels, see `tokenized.py`.
        chat: the fields hold `messages`, put into text by the tokenizer's chat template.
        headerless: the columns of a table without a header line.
        text_reader: how to read `.txt` and `.label` files, if they are not tables.
        hub: the data set on the hub that is the task's own; None if it has none.
        dev_from: the official file that `make_splits` takes dev examples from.
        test_from: likewise for test.
        columns: those that are read, of a user's own task.
        keeps_rows: examples have their row, see `ROW`.
    """

    name: str
    kind: Kind
    build: Callable[[Row], Iterable[Example]]
    scorers: Mapping[str, Scorer] = field(default_factory=dict)
    causal: str = ""
    masked: str | None = None
    text: str | None = None
    text_pair: str | None = None
    num_labels: int | None = None
    labels: tuple[str, ...] = ()
    cut: str = ""
    cut_side: Literal["start", "end"] = "end"
    stop: str | None = None
    max_new_tokens: int = 0
    tokenized: bool = False
    chat: bool = False
    headerless: tuple[str, ...] = ()
    text_reader: Callable[[Path], Iterator[Row]] | None = None
    hub: hub.HubSource | None = None
    dev_from: Literal["train", "dev"] = "train"
    test_from: Literal["dev", "test"] = "dev"
    columns: tuple[str, ...] = ()
    keeps_rows: bool = False

    @property
    def is_published(self) -> bool:
        """Whether its data is a published set, whose division is the papers'."""
        return self.hub is not None

    @property
    def writes(self) -> bool:
        """Whether its metrics are of texts that a model writes."""
        return self.kind == "completion" and bool(self.scorers)

    @property
    def metric(self) -> str:
        """The name of the main metric; "loss" if there is nothing to predict."""
        return next(iter(self.scorers), "loss")

    @property
    def parts(self) -> tuple[Task, ...]:
        """The tasks that it is made of: itself, see `mixture.Mixture`."""
        return (self,)

    def with_rows(self) -> Task:
        """The same, with rows kept."""
        return replace(self, keeps_rows=True)

    def classes(self, examples: Sequence[Example], balanced: bool) -> list[int] | None:
        """The class of each of the examples, for batches with as many of each; None: batches as they come.

        Args:
            examples: to train on.
            balanced: whether batches are to be balanced.
        """
        return [example.gold for example in examples] if balanced and self.kind == "choice" else None

    def stream(self, examples: Sequence[Example], seed: int, classes: Sequence[int] | None) -> Stream | None:
        """The order in which training sees the examples; None: as `batch_indices` has it by itself.

        Args:
            examples: to train on.
            seed: of the order.
            classes: of `classes`.
        """
        return None

    def has(self, data: Path | str | Records | None, split: Split) -> bool:
        """Whether `load` would find examples of `split` in `data`. A single file is train only."""
        if isinstance(data, Records):
            return data.has(split)
        if data is None:
            return self.hub is not None and self.hub.split(split) is not None
        return own.has(data, split)

    def load(
        self, data: Path | str | Records | None, split: Split, left_out: list[LeftOut] | None = None
    ) -> list[Example]:
        """Every example of a split, in file order.

        Args:
            data: a folder of files, one file (whatever the split), a data set's name on the hub, rows in
                memory, or None: the task's own on the hub.
            split: which file of the folder; nothing is carved out here (see `splits.make_splits`).
            left_out: gets the rows that are no example, as long as most are; None: none may be.

        Raises:
            UserError: naming file, line and field, for anything that is not as the task expects.
        """
        rows, source = self._rows(data, split)
        examples: list[Example] = []
        read = dropped = 0
        bad: list[LeftOut] = []
        for row in rows:
            read += 1
            try:
                made = list(self.build(row))
            except UserError as error:
                if left_out is None:
                    raise
                bad.append(LeftOut(row.where, str(error).removeprefix(f"{row.where}: ")))
                continue
            dropped += not made
            about = {WHERE: row.where, **({ROW: row.values} if self.keeps_rows else {})}
            examples.extend(example._replace(fields={**about, **example.fields}) for example in made)
        if dropped:
            logger.info(
                "task %s: %s: %d of %d rows dropped (no gold label)", self.name, source, dropped, read
            )
        check_mostly_good(f"task {self.name}: {source}", bad, read)
        if left_out is not None:
            left_out += bad
        if not examples:
            raise UserError(f"task {self.name}: {source} holds no examples")
        return examples

    def peek(self, data: Path | str | Records | None) -> None:
        """UserError if there is no training data in `data`, or none of its first rows is an example."""
        if data is None and self.hub is not None:
            if importlib.util.find_spec("datasets") is None:
                raise hub.no_library(self.name)
            return
        first: UserError | None = None
        for row in islice(self._rows(data, "train")[0], _PEEKED):
            try:
                list(self.build(row))
                return
            except UserError as error:
                first = first or error
        if first is not None:
            raise first

    def _rows(self, data: Path | str | Records | None, split: Split) -> tuple[Iterator[Row], str]:
        """The rows of a split, and the name of where they come from."""
        if isinstance(data, Records):
            return data.rows(split), "data"
        if data is None:
            if self.hub is None:
                raise UserError(f"task {self.name}: a data file or folder is needed (--data)")
            return hub.rows(self.hub, split, self.name), f"{self.hub.path}[{split}]"
        if (source := own.on_hub(data)) is not None:
            named = not self.is_published
            return hub.rows(source, split, self.name, named=named), f"{source.path}[{split}]"
        paths = files.find_split(Path(data), split)
        if not paths:
            raise UserError(
                f"task {self.name}: {data} has no {split} file; expected a name with "
                f"{split!r} in it and one of the extensions {', '.join(files.SUFFIXES)}"
            )
        return (row for path in paths for row in self._read(path)), ", ".join(map(str, paths))

    def _read(self, path: Path) -> Iterator[Row]:
        if self.text_reader is not None and path.suffix.lower() in own.TEXTS:
            return own.read_text(path, self.text_reader, detect=not self.is_published)
        if self.is_published and path.suffix.lower() not in own.COLUMNAR:
            return files.rows(path, self.headerless)
        return own.rows(path, self.columns)

    def score(self, examples: Sequence[Example], predictions: Sequence[Prediction]) -> Metric:
        """The main metric; arguments as for `scores`.

        Args:
            examples: one or more.
            predictions: of each.
        """
        return self.scores(examples, predictions)[0]

    def scores(self, examples: Sequence[Example], predictions: Sequence[Prediction]) -> list[Metric]:
        """Every metric of the task, the main one first. A completion counts up to the task's stop text.

        Args:
            examples: one or more.
            predictions: of each, an index into its answers ("choice") or a text ("completion").

        Raises:
            UserError: if the task has only a loss.

        Example:
            >>> from hizoo_lite import tasks
            >>> from hizoo_lite.batch import Example
            >>> examples = [Example({}, ("no", "yes"), gold) for gold in (0, 1)]
            >>> tasks.get("sst2").scores(examples, [0, 0])
            [Metric(name='accuracy', value=0.5)]
        """
        if not self.scorers:
            raise UserError(f"task {self.name}: it has no predictions to score; read its loss")
        if len(examples) != len(predictions) or not examples:
            raise ValueError(f"score: {len(examples)} examples and {len(predictions)} predictions")
        if self.stop is not None:
            predictions = [self.completed(str(text)) for text in predictions]
        return [Metric(name, scorer(examples, predictions)) for name, scorer in self.scorers.items()]

    def completed(self, text: str) -> str:
        """What counts of a `text` that was written: up to the task's stop text, if it has one."""
        return text if self.stop is None else text.strip("\n").split(self.stop)[0].strip()
