"""Splitting the data by seed.

MeZO's rule (2305.17333, section 3): train and dev come from the official train file, the official validation
file is the test set, because the official test sets have no public labels. SST-5 and TREC, whose test sets
are public, use them (as LM-BFF does). Custom tasks, `lm` and `chat` use their own dev and test files if
they have them. What has no file is carved out of the train file. Counts are upper limits: if the train
file is too small for the parts taken from it, they share it in proportion (CB: 250 examples, 1 000 + 500
wanted, so 167 + 83). An example that is there twice is in one part, both times.

A user's own data is used as a whole, unless limits are given: a tenth of the train file, 200 at most, is held
out if test has no file, and again for dev if that is needed; the rest is train. Given numbers of dev
and test are exact.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from hizoo_lite.batch import Example
from hizoo_lite.errors import UserError
from hizoo_lite.tasks.files import SPLIT_WORDS, Split, nameless
from hizoo_lite.tasks.records import Records
from hizoo_lite.tasks.task import ABOUT, LeftOut, Task
from hizoo_lite.units import counted

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Splits:
    """The examples of a run; the three parts share no example.

    Attributes:
        train: to train on.
        dev: evaluated during the run.
        test: evaluated before and after it.
        unused: how many examples of the files are in no part.
        shared: whether the train file was too small for what was to be taken from it.
        carved: the parts that were taken out of the train file.
        dev_size: how many are held out for dev, of a user's own train file.
        left_out: what is no example, or too long.
        notes: what else was done to examples, in lines.
        sizes: of several tasks, the examples that the files of each have.
    """

    train: list[Example]
    dev: list[Example]
    test: list[Example]
    unused: int = 0
    shared: bool = False
    carved: tuple[str, ...] = ()
    dev_size: int | None = None
    left_out: tuple[LeftOut, ...] = ()
    notes: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()

    @property
    def total(self) -> int:
        """Examples of the files."""
        return self.unused + len(self.train) + len(self.dev) + len(self.test)

    def __repr__(self) -> str:
        return f"Splits({self})"

    def lines(self, name: str) -> list[str]:
        """What the user is told of the examples of the task called `name`, in lines."""
        return [f"{name}, {self}", *self.notes]

    def __str__(self) -> str:
        """How the examples were divided, in one line."""
        words = (
            f"{counted(self.total, 'example')}: {len(self.train)} train, {len(self.dev)} dev, "
            f"{len(self.test)} test"
        )
        if self.unused:
            words += f", {self.unused:,} not used (beyond the limits, or equal to one of another part)"
        taken = [name for name in self.carved if getattr(self, name) and not self.shared]
        if taken:
            words += f"; {' and '.join(taken)} held out of train"
        if self.shared:
            words += "; parts without a file of their own are taken from train in proportion to their limits"
        if self.left_out:
            words += f"; {len(self.left_out):,} left out"
        return words


#: Of a user's own data: one in so many is held out, but no more than that.
HELD_OUT, MOST_HELD_OUT = 10, 200

_HELD: tuple[Split, Split] = ("dev", "test")
Limit = int | Literal["auto"] | None


class _Wanted(NamedTuple):
    train: int | None
    dev: int | None
    test: int | None


class Published(NamedTuple):
    """The papers' limits. Of a user's own data, dev's and test's are those of files."""

    train: int = 1000
    dev: int = 500
    test: int = 1000


PUBLISHED = Published()


def make_splits(
    task: Task,
    data: Path | str | Records | None,
    *,
    train_examples: Limit = 1000,
    dev_examples: Limit = 500,
    test_examples: Limit = 1000,
    k_shot: int | None = None,
    seed: int = 0,
    exact: bool = False,
    needs_dev: bool = True,
    left_out: list[LeftOut] | None = None,
) -> Splits:
    """Train, dev and test examples, a function of the data and the seed only.

    An example whose fields equal those of a train example is never taken into a dev or test part that is
    carved out of the train file.

    Args:
        task: reads the data.
        data: as in `Task.load`.
        train_examples: upper limit; None takes all there are, less what is carved out of the train file.
        dev_examples: likewise; None takes a fifth of the train file if there is no dev file.
        test_examples: likewise, of test.
        k_shot: that many examples of each class for train, and again for dev as far as there are, instead of
            the first two limits. Needs a task with fixed classes.
        seed: not negative.
        exact: numbers of dev and test are those that are wanted, and "auto" is what the module says; else
            they are upper limits as in the papers, and "auto" is 1000, 500 and 1000.
        needs_dev: dev examples are held out for "auto".
        left_out: gets what is no example, see `Task.load`.

    Raises:
        UserError: naming file, line and field, if the data is not as the task expects.

    Example:
        >>> from hizoo_lite import tasks
        >>> rows = tasks.Records([{"text": f"text {n}"} for n in range(10)])
        >>> tasks.make_splits(tasks.get("lm"), rows, dev_examples=2, test_examples=3, exact=True)
        Splits(10 examples: 5 train, 2 dev, 3 test; dev and test held out of train)
    """
    asked = (train_examples, dev_examples, test_examples)
    _check(asked, k_shot, seed)
    _name_the_rest(data)
    is_own = exact and not task.is_published
    dev_file, test_file = _official(task, data, is_own)
    pool = _shuffled(task.load(data, "train", left_out), seed, 0)
    tests = [] if test_file is None else _shuffled(task.load(data, test_file, left_out), seed, 1)
    devs = [] if dev_file is None else _shuffled(task.load(data, dev_file, left_out), seed, 2)
    most = _Wanted(*(p if a == "auto" else a for a, p in zip(asked, PUBLISHED, strict=True)))
    test = None if test_file is None else tests[: most.test]
    dev = None if dev_file is None else devs[: most.dev]
    wanted = _Wanted(most.train, most.dev if dev is None else 0, most.test if test is None else 0)
    if is_own and dev_examples == "auto" and not needs_dev:
        wanted = wanted._replace(dev=0)
    shared, dev_size = False, None
    if k_shot is not None:
        train, carved_dev, rest = _few_shot(task, pool, k_shot, wanted)
        carved_test = rest[: wanted.test]
    elif is_own or (exact and asked[1:] != ("auto", "auto") and not _is_room(len(pool), wanted)):
        dev_size, test_size = _exact_sizes(len(pool), asked, wanted)
        carved_dev, carved_test, rest = _held_out(pool, dev_size, test_size)
        train = rest if is_own and train_examples == "auto" else rest[: most.train]
    else:
        *sizes, shared = _sizes(len(pool), wanted)
        train, carved_dev, carved_test = _carve(pool, sizes, wanted)
    parts = train, carved_dev if dev is None else dev, carved_test if test is None else test
    unused = len(pool) + len(devs) + len(tests) - sum(map(len, parts))
    carved = tuple(name for name, own in (("dev", dev), ("test", test)) if own is None)
    notes = (
        ("dev examples are evaluated with --eval-every alone",) if is_own and dev and not needs_dev else ()
    )
    size = dev_size if dev is None else None
    return Splits(*parts, unused, shared, carved, size, tuple(left_out or ()), notes)


def _check(asked: Sequence[Limit], k_shot: int | None, seed: int) -> None:
    """UserError for numbers that nothing can be divided by."""
    for name, limit in zip(("train_examples", "dev_examples", "test_examples"), asked, strict=True):
        if isinstance(limit, int) and limit < (1 if name == "train_examples" else 0):
            raise UserError(f"{name}: got {limit}; allowed: a positive number, or none for all")
    if seed < 0:
        raise UserError(f"seed: got {seed}; allowed: 0 or more")
    if k_shot is not None and k_shot < 1:
        raise UserError(f"k_shot: got {k_shot}; allowed: a positive number")


def _is_room(available: int, wanted: _Wanted) -> bool:
    """Whether the train file has as many examples as are taken from it."""
    return None not in wanted and sum(size or 0 for size in wanted) <= available


def _name_the_rest(data: Path | str | Records | None) -> None:
    """Say which data files of a folder are not taken because their names tell no part."""
    rest = [] if data is None or isinstance(data, Records) else nameless(Path(data))
    if rest:
        words = ", ".join(word for part in SPLIT_WORDS.values() for word in part)
        _log.warning("data: %s: not taken: %s; names that tell their part: %s", data, ", ".join(rest), words)


def _official(
    task: Task, data: Path | str | Records | None, is_own: bool
) -> tuple[Split | None, Split | None]:
    """The files of the dev and of the test part; None if it comes out of the train file."""
    if is_own:
        held = [split if task.has(data, split) else None for split in _HELD]
        return held[0], held[1]
    order: tuple[Split, Split] = ("test", "dev") if task.test_from == "test" else ("dev", "test")
    test = next((split for split in order if task.has(data, split)), None)
    dev: Split | None = "dev" if task.dev_from == "dev" and test != "dev" and task.has(data, "dev") else None
    return dev, test


def _shuffled(examples: list[Example], seed: int, stream: int) -> list[Example]:
    order = np.random.Generator(np.random.Philox(key=[seed, stream])).permutation(len(examples))
    return [examples[index] for index in order]


def _sizes(available: int, wanted: _Wanted) -> tuple[int, int, int, bool]:
    """How much of the train file each part gets, and whether that is less than was wanted."""
    fifth = available // 5
    dev = fifth if wanted.dev is None else wanted.dev
    test = fifth if wanted.test is None else wanted.test
    train = max(1, available - dev - test) if wanted.train is None else wanted.train
    total = train + dev + test
    if total > available:
        dev, test = dev * available // total, test * available // total
        train = available - dev - test
    return train, dev, test, dev + test > 0 and total > available


def _exact_sizes(available: int, asked: Sequence[Limit], wanted: _Wanted) -> tuple[int, int]:
    """How many examples of the train file dev and test get. UserError if they leave none for train."""
    tenth = min(MOST_HELD_OUT, max(1, available // HELD_OUT))
    dev, test = (
        0 if limit == 0 else tenth if given == "auto" else available // 5 if given is None else given
        for limit, given in zip(wanted[1:], asked[1:], strict=True)
    )
    if dev + test >= available:
        raise UserError(
            f"data: {available} examples in train, of which {dev} are to be held out for dev and {test} for "
            "test: none is left; allowed: more data, or fewer with --test-examples and --dev-examples"
        )
    return int(dev), int(test)


def _held_out(
    pool: list[Example], dev_size: int, test_size: int
) -> tuple[list[Example], list[Example], list[Example]]:
    """Dev, test and the rest, classes in their shares. What is there twice goes to one part, both times."""
    alike: dict[Any, list[Example]] = {}
    for example in pool:
        alike.setdefault(key(example), []).append(example)
    dev: list[Example] = []
    test: list[Example] = []
    held: set[int] = set()
    for same in _in_proportion([*reversed(alike.values())]):
        room = next((p for p, n in ((test, test_size), (dev, dev_size)) if len(p) + len(same) <= n), None)
        if room is not None:
            room += same
            held |= set(map(id, same))
    return dev, test, [example for example in pool if id(example) not in held]


def _in_proportion(groups: list[list[Example]]) -> list[list[Example]]:
    """So ordered that every beginning has about the same share of each class."""
    sizes, seen = Counter(group[0].gold for group in groups), Counter[int]()

    def place(group: list[Example]) -> float:
        seen[group[0].gold] += 1
        return (seen[group[0].gold] - 0.5) / sizes[group[0].gold]

    return sorted(groups, key=place)


def _carve(
    pool: list[Example], sizes: Sequence[int], wanted: _Wanted
) -> tuple[list[Example], list[Example], list[Example]]:
    """Train, dev and test. What equals an example of an earlier part goes there, up to that part's limit."""
    train = pool[: sizes[0]]
    rest, twins = _parted(pool[sizes[0] :], train)
    dev = rest[: sizes[1]]
    rest, dev_twins = _parted(rest[sizes[1] :], dev)
    return (train + twins)[: wanted.train], (dev + dev_twins)[: wanted.dev], rest[: sizes[2]]


def _few_shot(
    task: Task, pool: list[Example], k_shot: int, wanted: _Wanted
) -> tuple[list[Example], list[Example], list[Example]]:
    """k of each class for train, up to k for dev (none if dev has a file of its own), and the rest."""
    if task.num_labels is None:
        raise UserError(f"k_shot: task {task.name} has no fixed classes; use train_examples")
    train: list[Example] = []
    for label in range(task.num_labels):
        members = [example for example in pool if example.gold == label]
        if len(members) < k_shot:
            name = members[0].answers[label].strip() if members else str(label)
            raise UserError(f"k_shot: got {k_shot}, but class {name!r} has {len(members)} training examples")
        train += members[:k_shot]
    chosen = {id(example) for example in train}
    rest = _without([example for example in pool if id(example) not in chosen], train)
    dev: list[Example] = []
    if wanted.dev != 0:
        for label in range(task.num_labels):
            dev += [example for example in rest if example.gold == label][:k_shot]
    taken = {id(example) for example in dev}
    return train, dev, _without([example for example in rest if id(example) not in taken], dev)


def _without(examples: list[Example], taken: list[Example]) -> list[Example]:
    """The examples whose fields equal none of those taken."""
    return _parted(examples, taken)[0]


def _parted(examples: list[Example], taken: list[Example]) -> tuple[list[Example], list[Example]]:
    """The same, and the others."""
    seen = {key(example) for example in taken}
    others: list[Example] = []
    twins: list[Example] = []
    for example in examples:
        (twins if key(example) in seen else others).append(example)
    return others, twins


def key(example: Example) -> tuple[tuple[str, str], ...]:
    """What two examples have in common that ask the same."""
    return tuple((name, repr(value)) for name, value in example.fields.items() if name not in ABOUT)
