"""The order in which training sees its examples: pure functions of seed and step.

Which of them are a batch, too: balanced by their classes, and of like length where much would be padding.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain

import numpy as np

from hizoo_lite.tasks.task import Stream

#: Classes of which none has more than this many times another's examples count as equally frequent.
EVEN = 1.5
#: The share of padding from which examples are sorted by length. Batches of like length are less like the
#: whole, which costs a run of short texts more than it saves: the demo (26 %) ends at losses 0.01 to 0.07
#: higher, SST-2 (59 %) does not.
LEAST_PADDING = 1 / 3
#: Batches among which examples are sorted by length.
WINDOW = 8


def batch_indices(
    count: int,
    batch_size: int,
    seed: int,
    step: int,
    labels: Sequence[int] | None = None,
    length: Callable[[int], int] | None = None,
    stream: Stream | None = None,
) -> list[int]:
    """The examples of one training step: a pure function of its arguments.

    The stream of examples is one permutation of `range(count)` after another, each a function of (seed,
    epoch); step s takes positions s * batch_size onwards. The last, incomplete batch of an epoch goes on into
    the next epoch's permutation, so that every batch is full and no example is left out.

    Args:
        count: how many examples there are.
        batch_size: of every step.
        seed: of the permutations.
        step: counted from 0.
        labels: the class of each example, (count,), to balance the batches: the same number of each class if
            classes are about equally frequent (see `_in_turn`), their proportions otherwise (see `_spread`).
        length: tokens of an example, to have batches of like length: those of `WINDOW` batches, or of a
            quarter of an epoch if that is less, change places (see `_alike`) if at least `LEAST_PADDING` of
            them is padding.
        stream: what is at some places of the stream, in place of those permutations.

    Raises:
        ValueError: if a number is out of its range.

    Example:
        >>> first, second = (batch_indices(4, 2, seed=0, step=step) for step in range(2))
        >>> sorted(first + second)  # an epoch
        [0, 1, 2, 3]
    """
    if count < 1 or batch_size < 1 or seed < 0 or step < 0:
        raise ValueError(f"batch: got {count} examples, batch size {batch_size}, seed {seed}, step {step}")
    come = partial(as_they_come, count, seed, labels) if stream is None else stream

    def batch(number: int) -> list[int]:
        return come(range(number * batch_size, (number + 1) * batch_size))

    window = min(WINDOW, count // (4 * batch_size))
    if length is None or window < 2:
        return batch(step)
    number, place = divmod(step, window)
    usual = [batch(step) for step in range(number * window, (number + 1) * window)]
    if _padding(usual, length) < LEAST_PADDING:
        return usual[place]
    found = _alike(usual, labels, length)
    # a counter that no permutation of an epoch reaches
    draw = np.random.Generator(np.random.Philox(counter=1 << 192, key=[seed, number]))
    return found[draw.permutation(window)[place]]


def _padding(batches: Sequence[Sequence[int]], length: Callable[[int], int]) -> float:
    """The share of the batches' tokens that is padding."""
    lengths = [[length(index) for index in batch] for batch in batches]
    return 1.0 - sum(map(sum, lengths)) / sum(max(each) * len(each) for each in lengths)


def _alike(
    window: Sequence[Sequence[int]], labels: Sequence[int] | None, length: Callable[[int], int]
) -> list[list[int]]:
    """The examples of some batches by length: the shortest of each class in the first batch, and so on.

    A batch has as many of a class as it had. What comes a second time, in the next epoch, is sorted on its
    own, or it would lie beside itself.
    """
    found: list[list[int]] = [[] for _ in window]
    seen: Counter[int] = Counter()
    of_class: dict[int, list[tuple[int, int, int]]] = {}
    for index in chain.from_iterable(window):
        label = 0 if labels is None else labels[index]
        of_class.setdefault(label, []).append((seen[index], length(index), index))
        seen[index] += 1
    left = {label: iter(sorted(members)) for label, members in of_class.items()}
    for batch, taken in zip(window, found, strict=True):
        labels_of_batch = [0 if labels is None else labels[index] for index in batch]
        taken += [next(left[label])[2] for label in labels_of_batch]
        taken.sort(key=length)
    return found


def as_they_come(count: int, seed: int, labels: Sequence[int] | None, positions: range) -> list[int]:
    """The examples at these positions of the stream; arguments as for `batch_indices`."""
    if labels is not None and is_even(labels):
        return _in_turn(np.asarray(labels), seed, positions)
    indices: list[int] = []
    while len(indices) < len(positions):
        epoch, offset = divmod(positions.start + len(indices), count)
        draw = np.random.Generator(np.random.Philox(key=[seed, epoch]))
        order = draw.permutation(count)
        if labels is not None:
            order = _spread(order, np.asarray(labels), draw)
        indices += order[offset : offset + len(positions) - len(indices)].tolist()
    return indices


def is_even(labels: Sequence[int]) -> bool:
    """Whether the most frequent class has at most `EVEN` times the examples of the least frequent one."""
    counts = np.unique(np.asarray(labels), return_counts=True)[1]
    return bool(counts.max() <= EVEN * counts.min())


def _in_turn(labels: np.ndarray, seed: int, positions: range) -> list[int]:
    """The examples at these positions of a stream that takes one of each class in turn.

    Each class has its own permutations, one an epoch of the class. The loss that is trained is that of
    equally likely classes: what a sample has more of one is no prior to learn.
    """
    classes = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    orders: dict[tuple[int, int], np.ndarray] = {}
    found = []
    for position in positions:
        turn, which = divmod(position, len(classes))
        epoch, offset = divmod(turn, len(classes[which]))
        if (which, epoch) not in orders:
            draw = np.random.Generator(np.random.Philox(key=[seed, epoch * len(classes) + which]))
            orders[which, epoch] = draw.permutation(classes[which])
        found.append(int(orders[which, epoch][offset]))
    return found


def _spread(order: np.ndarray, labels: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """`order` with its classes spread evenly: every batch has them in the proportions of the whole.

    The k-th of a class's n examples goes to the place (k + u) / n of the epoch, with one u in [0, 1) a class.
    Each example is still seen once an epoch and the loss that is trained is the same, but what batches differ
    in by the share of their classes is gone from its gradient (stratified sampling with proportional
    allocation; Cochran, Sampling Techniques, section 5.5).
    """
    place = np.empty(len(order))
    for label in np.unique(labels):
        own = np.flatnonzero(labels[order] == label)
        place[own] = (np.arange(len(own)) + draw.random()) / len(own)
    return order[np.argsort(place, kind="stable")]


def batches(
    encoded: Sequence[object], batch_size: int, seed: int, start_step: int = 0
) -> Iterator[list[int]]:
    """The indices of every step's batch, without end; see `batch_indices`.

    A resumed run that starts at its step sees the same data as one that was never interrupted.

    Args:
        encoded: the examples; their number alone counts.
        batch_size: of every step.
        seed: of their order.
        start_step: the first step, counted from 0.
    """
    step = start_step
    while True:
        yield batch_indices(len(encoded), batch_size, seed, step)
        step += 1
