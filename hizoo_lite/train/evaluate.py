"""Evaluation: the loss and the task's metric on a set of examples, through the same pass as training.

Choice tasks pick the answer with the highest mean token log-probability (for classifiers: the largest
logit); completion tasks write greedily, in batches padded on the left. One forward an example, no branches.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from hizoo_lite.base import BranchLosses
from hizoo_lite.batch import Batch, Example, Losses, Metric
from hizoo_lite.config import TrainConfig
from hizoo_lite.errors import TooManyBadSteps
from hizoo_lite.tasks import Encoder, Task
from hizoo_lite.tasks.task import part_of
from hizoo_lite.train.ranks import ONE, Ranks

Prediction = int | str


class Write(Protocol):
    """How a model continues prompts."""

    def __call__(
        self,
        prompts: Sequence[list[int]],
        pad_id: int,
        max_new_tokens: int,
        ended: Callable[[Sequence[Sequence[int]]], list[bool]] | None = None,
    ) -> list[list[int]]:
        """The tokens that follow each prompt, the most likely one each time.

        A row ends at its end-of-sequence token (part of the result), or once `ended`, given what all rows
        have written, says so; `pad_id` fills up the shorter rows.
        """
        ...


class Writer(BranchLosses, Protocol):
    """A model that is evaluated: its losses, and what it writes."""

    @property
    def write(self) -> Write | None:
        """None if there are losses alone (a training graph); a completion task then has no metric."""
        ...


class Evaluation(NamedTuple):
    """The result on a set of examples."""

    loss: float  # mean over the examples
    metrics: list[Metric]  # the task's main one first; empty for a task that has only a loss
    predictions: list[Prediction]  # index of the answer, or the text written; empty likewise
    examples: int
    seconds: float
    losses: list[float] = []  # noqa: RUF012 - of each example; a tuple's default is never changed
    logits: list[list[float]] = []  # noqa: RUF012 - of a classifier's outputs, for each example; else empty
    gold: list[int] = []  # noqa: RUF012 - the output that is right; likewise

    def __repr__(self) -> str:
        """Without the predictions."""
        scores = {"loss": self.loss} | {metric.name: metric.value for metric in self.metrics}
        words = ", ".join(f"{name}={value:.4f}" for name, value in scores.items())
        return f"Evaluation({words}, examples={self.examples}, seconds={self.seconds:.1f})"

    @property
    def metric(self) -> Metric:
        """The main metric; the loss itself if the task has no other."""
        return self.metrics[0] if self.metrics else Metric("loss", self.loss)


def evaluate(
    model: Writer,
    encoder: Encoder,
    examples: Sequence[Example],
    batch_size: int,
    *,
    check: Callable[[], None] = lambda: None,
    advanced: Callable[[int], None] = lambda count: None,
    ranks: Ranks = ONE,
) -> Evaluation:
    """Loss and metric on `examples` (at least one), which the ranks share.

    Of several tasks the means of what each has, and each by itself, as `of_part` calls it. Batches are of
    examples of like length, the longest first: little padding, and memory that does not reach is missed at
    once.

    `check` is called before every batch and may raise, to stop; `advanced` after it with the number of
    examples that are done.
    """
    given: dict[str, Any] = {"check": check, "advanced": advanced, "ranks": ranks}
    if len(encoder.parts) == 1:
        return _of_one(model, encoder, examples, batch_size, **given)
    places: dict[int, list[int]] = {}
    for place, example in enumerate(examples):
        places.setdefault(part_of(example), []).append(place)
    found = {}
    for part, own in sorted(places.items()):
        mine = [examples[place] for place in own]
        found[part] = _of_one(model, encoder.parts[part], mine, batch_size, **given)
    return _mean(found, places, encoder.task)


def of_part(task: str, score: str) -> str:
    """What the score of one task of several is called; "" for the only one."""
    return f"{task}/{score}" if task else score


def _mean(found: Mapping[int, Evaluation], places: Mapping[int, Sequence[int]], task: Task) -> Evaluation:
    """The evaluations of some of a task's parts, as one. A part that predicts nothing has "" there."""
    loss = math.fsum(each.loss for each in found.values()) / len(found)
    main = [each.metrics[0].value for each in found.values() if each.metrics]
    metrics = [Metric(task.metric, math.fsum(main) / len(main)) if main else Metric("loss", loss)]
    predictions: list[Prediction] = [""] * sum(map(len, places.values()))
    losses = [math.nan] * len(predictions)
    for part, each in found.items():
        scores = [Metric("loss", each.loss), *each.metrics]
        metrics += [Metric(of_part(task.parts[part].name, name), value) for name, value in scores]
        for place, prediction in zip(places[part], each.predictions, strict=False):
            predictions[place] = prediction
        for place, own in zip(places[part], each.losses, strict=True):
            losses[place] = own
    seconds = sum(each.seconds for each in found.values())
    return Evaluation(loss, metrics, predictions if main else [], len(predictions), seconds, losses)


def _of_one(
    model: Writer,
    encoder: Encoder,
    examples: Sequence[Example],
    batch_size: int,
    *,
    check: Callable[[], None],
    advanced: Callable[[int], None],
    ranks: Ranks,
) -> Evaluation:
    """`evaluate` of a single task."""
    began = time.perf_counter()
    total = 0.0
    own = ranks.share(examples)
    encoded = [encoder.encode(example, training=False) for example in own]
    order = sorted(range(len(own)), key=lambda index: -max(map(len, encoded[index].rows)))
    found_at: dict[int, Prediction] = {}
    loss_of = np.zeros(len(own))
    outputs: dict[int, tuple[list[float], int]] = {}
    for part in _parts(order, batch_size):
        check()
        batch = encoder.collate([encoded[index] for index in part])
        losses = model.losses(batch)
        total += float(losses.per_example.sum())
        loss_of[part] = np.asarray(losses.per_example).reshape(-1)
        if encoder.task.kind == "choice":
            found = chosen(losses, batch)
            picked = map(encoder.class_of, found) if batch.loss == "class" else found
            found_at |= zip(part, picked, strict=True)
            if batch.loss == "class":
                outputs |= zip(
                    part, zip(losses.scores[0].tolist(), batch.gold.tolist(), strict=True), strict=True
                )
        elif encoder.task.writes and model.write is not None:
            written = complete(model.write, encoder, [own[index] for index in part])
            found_at |= zip(part, written, strict=True)
        advanced(len(part))
    predicted = [found_at[index] for index in sorted(found_at)]
    logits, gold = ([outputs[index][side] for index in sorted(outputs)] for side in (0, 1))
    shares: list[Any] = ranks.gather((total, predicted, loss_of.tolist(), logits, gold))
    total = sum(share[0] for share in shares)
    predictions = [prediction for share in shares for prediction in share[1]]
    each = [loss for share in shares for loss in share[2]]
    metrics = encoder.task.scores(examples, predictions) if predictions else []
    loss = total / len(examples)
    seconds = time.perf_counter() - began
    both = [[value for share in shares for value in share[side]] for side in (3, 4)]
    return Evaluation(loss, metrics, predictions, len(examples), seconds, each, *both)


def report(found: Evaluation, config: TrainConfig, adapter: str | None, split: str) -> dict[str, Any]:
    """An evaluation as commands print it: scores by name, the loss first."""
    return {
        "model": config.model,
        "adapter": adapter,
        "task": config.task_name,
        "split": split,
        "examples": found.examples,
        "metric": found.metric.name,
        "scores": {"loss": found.loss, **{m.name: m.value for m in found.metrics}},
        "seconds": found.seconds,
    }


def check_result(result: Mapping[str, Any]) -> None:
    """`TooManyBadSteps` if what was evaluated computes nothing. result: of `report`."""
    loss = result["scores"]["loss"]
    if not math.isfinite(loss):
        raise TooManyBadSteps(
            f"{result['model']}: the loss on {result['task']} is {loss}, not a finite number; "
            "its weights, or those of its adapter, are damaged or too large for --compute-dtype"
        )


def _parts(order: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for first in range(0, len(order), size):
        yield order[first : first + size]


def chosen(losses: Losses, batch: Batch) -> list[int]:
    """The index of the answer that scores best, for every example, from an evaluation's losses."""
    return [int(scores.argmax()) for scores in by_example(np.asarray(losses.scores[0]), batch)]


def by_example(scores: np.ndarray, batch: Batch) -> list[np.ndarray]:
    """The scores of one branch, as `Losses.scores` has them, of each example."""
    if batch.loss == "class":
        return list(scores)
    counts = np.bincount(batch.slot_example, minlength=batch.examples)
    return np.split(scores, np.cumsum(counts)[:-1])


def complete(write: Write, encoder: Encoder, examples: Sequence[Example]) -> list[str]:
    """The greedy continuation of every example's prompt, up to its end-of-sequence token or stop text."""
    prompts = [encoder.prompt_ids(example) for example in examples]
    tokenizer, own = encoder.tokenizer, [encoder.of(example) for example in examples]

    def stopped(rows: Sequence[Sequence[int]]) -> list[bool]:
        """Once the text that a row has written holds the stop text after other text, if there is one."""
        texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
        stops = [one.stop for one in own] * (len(rows) // len(own))
        pairs = zip(stops, texts, strict=True)
        return [stop is not None and stop in text.lstrip("\n") for stop, text in pairs]

    ended = None if all(one.stop is None for one in own) else stopped
    written = write(prompts, encoder.pad_id, encoder.max_new_tokens, ended)
    limits = [one.max_new_tokens for one in own] * (len(written) // len(own))
    within = [row[:limit] for row, limit in zip(written, limits, strict=True)]
    return tokenizer.batch_decode(within, skip_special_tokens=True)
