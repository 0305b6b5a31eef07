"""Several tasks in one run: one model, every batch with examples of all of them (MaZO, arXiv 2502.11513).

What is trained is the weighted mean of the tasks' losses: places in the stream of examples go to the tasks in
proportion to their weights, evenly spread, so that a batch has each task's share of it up to one example or
so. Without weights all tasks count the same, whatever they have of examples, as in the mean of their metrics.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, zip_longest

import numpy as np

from hizoo_lite.batch import Batch, Example
from hizoo_lite.errors import UserError
from hizoo_lite.tasks.batching import as_they_come
from hizoo_lite.tasks.collate import Encoded
from hizoo_lite.tasks.encoder import Encoder
from hizoo_lite.tasks.files import Row
from hizoo_lite.tasks.splits import Splits
from hizoo_lite.tasks.task import TASK, Stream, Task, part_of

#: Places of the stream after which the tasks' order repeats itself: weights count to one in so many.
CYCLE = 10_000
#: The main metric: the mean of those of the tasks that have one.
MEAN = "mean"


@dataclass(frozen=True)
class Mixture(Task):
    """Tasks as one. Its own templates are empty: `MixedEncoder` has those of each.

    Attributes:
        members: the tasks, of different names.
        weights: how much each counts in training.
    """

    members: tuple[Task, ...] = ()
    weights: tuple[float, ...] = ()

    @property
    def parts(self) -> tuple[Task, ...]:
        """The tasks."""
        return self.members

    @property
    def is_published(self) -> bool:
        """Whether all tasks are."""
        return all(task.is_published for task in self.members)

    @property
    def metric(self) -> str:
        """See `MEAN`; "loss" if no task has a metric."""
        return MEAN if any(task.scorers for task in self.members) else "loss"

    def with_rows(self) -> Task:
        """See `Task.with_rows`."""
        return replace(self, members=tuple(task.with_rows() for task in self.members))

    def classes(self, examples: Sequence[Example], balanced: bool) -> list[int]:
        """A number for each task, and of tasks with choices, if they are to be balanced, for each class."""
        found = [
            (part, self.parts[part].kind == "choice", example) for part, example in _with_parts(examples)
        ]
        keys = [(part, example.gold if balanced and choice else 0) for part, choice, example in found]
        numbers = {key: number for number, key in enumerate(sorted(set(keys)))}
        return [numbers[key] for key in keys]

    def stream(self, examples: Sequence[Example], seed: int, classes: Sequence[int] | None) -> Stream:
        """Each task's own stream, at the places that are its own."""
        assert classes is not None
        own: list[list[int]] = [[] for _ in self.members]
        for index, (part, _) in enumerate(_with_parts(examples)):
            own[part].append(index)
        empty = [task.name for task, indices in zip(self.members, own, strict=True) if not indices]
        if empty:
            raise UserError(f"--data: there are no training examples of task {empty[0]}")
        labels = [[classes[index] for index in indices] for indices in own]
        balanced = [each if len(set(each)) > 1 else None for each in labels]
        turns = Turns(self.weights)

        def stream(places: range) -> list[int]:
            found = []
            for part, indices in enumerate(own):
                positions = range(turns.before(part, places.start), turns.before(part, places.stop))
                of_part = as_they_come(len(indices), seed, balanced[part], positions)
                found.append(iter([indices[index] for index in of_part]))
            return [next(found[turns.part(place)]) for place in places]

        return stream


def of_tasks(tasks: Sequence[Task], weights: Sequence[float] | None = None) -> Task:
    """Several tasks as one, of which every batch has examples; a single one is itself.

    Args:
        tasks: of different names.
        weights: their shares of the examples of every batch, above 0; None: all count the same.

    Raises:
        UserError: if two have the same name.
    """
    if len(tasks) == 1:
        return tasks[0]
    names = [task.name for task in tasks]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"--task: got two tasks that are called {twice!r}; allowed: each once")
    kinds, labels = {task.kind for task in tasks}, {task.num_labels for task in tasks}
    return Mixture(
        name=", ".join(names),
        kind="completion" if "completion" in kinds else "choice" if "choice" in kinds else "lm",
        build=_of_none,
        num_labels=labels.pop() if len(labels) == 1 else None,
        chat=all(task.chat for task in tasks),
        members=tuple(tasks),
        weights=tuple(weights or [1.0] * len(tasks)),
    )


def _of_none(row: Row) -> list[Example]:
    raise NotImplementedError("each of the tasks reads its own data")


def _with_parts(examples: Sequence[Example]) -> Iterator[tuple[int, Example]]:
    return ((part_of(example), example) for example in examples)


def joined(splits: Sequence[Splits]) -> Splits:
    """Those of every task as one: training examples by turns, so that the first ones are of all tasks."""
    if len(splits) == 1:
        return splits[0]
    tagged = []
    for part, one in enumerate(splits):
        train, dev, test = (_tagged(examples, part) for examples in (one.train, one.dev, one.test))
        tagged.append(replace(one, train=train, dev=dev, test=test))
    turns = chain.from_iterable(zip_longest(*(one.train for one in tagged)))
    return Splits(
        [example for example in turns if example is not None],
        [example for one in tagged for example in one.dev],
        [example for one in tagged for example in one.test],
        sum(one.unused for one in splits),
        any(one.shared for one in splits),
        tuple(dict.fromkeys(name for one in splits for name in one.carved)),
        dev_size=sizes.pop() if len(sizes := {one.dev_size for one in splits}) == 1 else None,
        left_out=tuple(chain.from_iterable(one.left_out for one in splits)),
        notes=tuple(chain.from_iterable(one.notes for one in splits)),
        sizes=tuple(one.total + len(one.left_out) for one in splits),
    )


def tasks_of_rows(batch: Batch) -> list[int]:
    """Of each row of a batch, which task it is of; 0 of a batch that does not say what it was made of."""
    found, made_of = [0] * len(batch.input_ids), batch.made_of
    if made_of is None:
        return found
    rows, examples = range(batch.examples), list(range(batch.examples))
    if len(batch.token_site):  # else a classifier, with a row an example
        rows = np.asarray(batch.site_row)[np.asarray(batch.token_site)].tolist()
        examples = np.asarray(batch.slot_example)[np.asarray(batch.token_slot)].tolist()
    for row, example in zip(rows, examples, strict=True):
        found[row] = part_of(made_of[example])
    return found


def _tagged(examples: Sequence[Example], part: int) -> list[Example]:
    return [example._replace(fields={**example.fields, TASK: part}) for example in examples]


class Turns:
    """Which task has which place of the stream; the same for any batch size, and no matter where one begins.

    Of a cycle's places each task has its share (the largest remainders are rounded up, and none has no
    place), the k-th of n at (k + 1/2) / n of the cycle.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        shares = np.array(weights, dtype=np.float64)
        exact = shares / shares.sum() * CYCLE
        counts = np.maximum(np.floor(exact).astype(np.int64), 1)
        first = np.argsort(counts - exact, kind="stable")
        while (left := CYCLE - int(counts.sum())) != 0:
            if left > 0:
                counts[first[:left]] += 1
            else:  # tasks that were given a place have it from the largest
                counts[counts.argmax()] -= 1
        place = np.concatenate([(np.arange(count) + 0.5) / count for count in counts])
        self._order = np.repeat(np.arange(len(counts)), counts)[np.argsort(place, kind="stable")]
        each = self._order[:, None] == np.arange(len(counts))
        self._before = np.concatenate([np.zeros((1, len(counts)), np.int64), each.cumsum(0)])

    def part(self, place: int) -> int:
        """The task of a place."""
        return int(self._order[place % CYCLE])

    def before(self, part: int, place: int) -> int:
        """How many of the places before this one are a task's."""
        cycle, rest = divmod(place, CYCLE)
        return int(cycle * self._before[-1, part] + self._before[rest, part])


class MixedEncoder(Encoder):
    """Encodes examples of several tasks, each as an encoder of its own does."""

    def __init__(self, task: Mixture, encoders: Sequence[Encoder]) -> None:
        """encoders: of the tasks, alike but for that. UserError if their losses differ, or their classes."""
        first = self._first = encoders[0]
        self.tokenizer, self.model_kind, self.task = first.tokenizer, first.model_kind, task
        self.max_length, self.loss, self.order = first.max_length, first.loss, None
        self.vocabulary, self.pad_id = first.vocabulary, first.pad_id
        self._parts = tuple(encoders)
        odd = next((one for one in encoders if one.loss != first.loss), None)
        if odd is not None:
            raise UserError(
                f"--task: {first.task.name} has the loss {first.loss!r}, {odd.task.name} {odd.loss!r}; "
                "allowed in one run: tasks of one loss, or --loss answer"
            )
        if self.model_kind == "classifier" and task.num_labels is None:
            counts = ", ".join(f"{one.name} {one.num_labels}" for one in task.parts)
            raise UserError(f"--task: a classifier has one head, and the tasks' classes are {counts}")

    @property
    def parts(self) -> tuple[Encoder, ...]:
        """The encoders, in the order of the tasks."""
        return self._parts

    def of(self, example: Example) -> Encoder:
        """See `Encoder.of`."""
        return self._parts[part_of(example)]

    @property
    def max_new_tokens(self) -> int:
        """The most of any task."""
        return max(one.max_new_tokens for one in self.parts)

    def encode(self, example: Example, *, training: bool) -> Encoded:
        """See `Encoder.encode`."""
        return self.of(example).encode(example, training=training)

    def label_tokens(self, examples: Sequence[Example], most: int) -> list[int] | None:
        """Those of all tasks that have some, see `Encoder.label_tokens`."""
        for each in (most, 0):  # all of them, or those that answers begin with
            found = [
                one.label_tokens([example for example in examples if self.of(example) is one], each)
                for one in self.parts
            ]
            every = sorted({token for tokens in found for token in tokens or ()})
            if len(every) <= most:
                break
        return None if all(tokens is None for tokens in found) else every

    def teaches(self, example: Example) -> bool:
        """See `Encoder.teaches`."""
        return self.of(example).teaches(example)

    def prompt_ids(self, example: Example) -> list[int]:
        """See `Encoder.prompt_ids`."""
        return self.of(example).prompt_ids(example)

    def prompt_text(self, example: Example) -> str:
        """See `Encoder.prompt_text`."""
        return self.of(example).prompt_text(example)
