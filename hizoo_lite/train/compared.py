"""Points compared by another objective than the loss: what stands between a step and its traversal.

Scores are there when the losses are. A text is not: after the traversal, which has the divergence of the
predictions and so the curvature, every branch writes its greedy answer, all of them at once along the branch
axis. Beside its forwards a step then costs a generation of branches * examples rows: up to `max_new_tokens`
times through all blocks, which a streamed model fetches as often, with keys and values of all rows in memory;
the run's plan counts them. Parameters stay where they are: the branches exist only inside the linear layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from hizoo_lite.arrays import Array
from hizoo_lite.base import BranchLosses, ModelKind, Objective
from hizoo_lite.batch import Answered, Batch, Example, Losses
from hizoo_lite.branches import EVALUATION, Branches
from hizoo_lite.config import TrainConfig
from hizoo_lite.errors import UserError
from hizoo_lite.registry import OBJECTIVES
from hizoo_lite.tasks import Encoder, Task, shown
from hizoo_lite.train.evaluate import Write, by_example, complete


class BranchWriter(BranchLosses, Protocol):
    """What has losses, and texts, of every branch: a traversal."""

    def writing(self, branches: Branches, mu: float, directions: Mapping[str, Array]) -> Write:
        """As `evaluate.Write`, of every branch: the rows of the first, then those of the next."""
        ...


def given_by(objective: Objective, task: Task, kind: ModelKind, loss: str) -> str | None:
    """What the objective is of in this run, one of its `reads`; None if it is the loss.

    loss: the setting. Raises UserError for an objective of what the task, or one of several, does not give.
    """
    found = {_given(objective, part, kind, loss) for part in task.parts}
    if len(found) > 1:
        raise UserError(
            f"--objective: {objective.name} would be of scores in some of the tasks {task.name} and of texts "
            "in others; allowed: tasks that are alike in that, or loss"
        )
    return found.pop()


def answers_steps(config: TrainConfig, encoder: Encoder) -> bool:
    """Whether answers are written in steps, for the objective."""
    of_text = (_gives(part, encoder.model_kind, config.loss) == "text" for part in encoder.task.parts)
    return not config.is_of_loss and any(of_text)


def _gives(task: Task, kind: ModelKind, loss: str) -> str | None:
    """What a task has for objectives: scores, or the text of a completion or of the last turn of a chat."""
    if kind == "classifier" or (task.kind == "choice" and loss != "answer"):
        return "scores"
    return "text" if kind == "causal" and (task.kind == "completion" or task.chat) else None


def _given(objective: Objective, task: Task, kind: ModelKind, loss: str) -> str | None:
    """`given_by` of a single task."""
    given = _gives(task, kind, loss)
    if not objective.reads:
        return None
    if given in objective.reads:
        return given
    words = {"scores": "scores of candidates", "text": "a written answer"}
    wanted = " or ".join(words[one] for one in objective.reads)
    if task.kind == "choice" and given is None:
        why = "--loss answer scores the gold one alone (--loss choice scores all)"
    else:
        why = f"task {task.name} has {'neither' if given is None else words[given]}"
    allowed = [name for name, member in OBJECTIVES.items() if not member.reads or given in member.reads]
    allowed += ["FILE.py:NAME"] * (given is not None)
    raise UserError(f"--objective: {objective.name} is of {wanted}, but {why}; allowed: {', '.join(allowed)}")


class Compared(BranchLosses):
    """A traversal whose losses are minus the objective's values."""

    def __init__(self, objective: Objective, traversal: BranchWriter, encoder: Encoder, given: str) -> None:
        """given: of `given_by`."""
        self.objective, self.traversal, self.encoder, self.given = objective, traversal, encoder, given

    def losses(
        self,
        batch: Batch,
        branches: Branches = EVALUATION,
        mu: float = 0.0,
        directions: Mapping[str, Array] | None = None,
        exact: Mapping[str, Array] | None = None,
    ) -> Losses:
        """See `BranchLosses.losses`. A loss that is not finite has no value: NaN."""
        assert batch.made_of is not None
        losses = self.traversal.losses(batch, branches, mu, directions, exact)
        known = np.asarray(losses.per_example)
        if self.given == "text":
            found: Sequence[Sequence[Any]] = self._texts(batch, branches, mu, directions or {})
        else:
            found = self._scores(losses, batch)
        if self.objective.of_row:
            found = self._answered(found, batch)
        values = np.full_like(known, np.nan)
        for branch, example in zip(*np.nonzero(np.isfinite(known)), strict=True):
            read = batch.made_of[example], found[branch][example]
            scorers = self.encoder.of(read[0]).task.scorers
            values[branch, example] = self.objective.value(*read, scorers)
        return losses._replace(per_example=0.0 - values)

    def _answered(self, found: Sequence[Sequence[Any]], batch: Batch) -> list[list[Answered]]:
        """By branch and example; of scores the answer that has the highest, of equal ones the first."""
        examples, task = batch.made_of or (), self.encoder.task
        prompts = [self.encoder.prompt_text(example) for example in examples]

        def text(example: Example, found: Any) -> str:
            is_text = self.given == "text"
            return str(found) if is_text else shown.answer(task, example, found.index(max(found)))

        texts = ([text(*one) for one in zip(examples, each, strict=True)] for each in found)
        return [[Answered(*one) for one in zip(prompts, each, strict=True)] for each in texts]

    def _scores(self, losses: Losses, batch: Batch) -> list[list[list[float]]]:
        """By branch, example and the task's own order of candidates or classes."""
        orders = [self.encoder.of(example).order for example in batch.made_of or ()]
        return [
            [
                (one if order is None else one[list(order)]).tolist()
                for one, order in zip(by_example(scores, batch), orders, strict=True)
            ]
            for scores in np.asarray(losses.scores)
        ]

    def _texts(
        self, batch: Batch, branches: Branches, mu: float, directions: Mapping[str, Array]
    ) -> list[list[str]]:
        """By branch and example."""
        examples, write = batch.made_of or (), self.traversal.writing(branches, mu, directions)
        written, count = complete(write, self.encoder, examples), len(examples)
        own = [self.encoder.of(example).task for example in examples] * (len(written) // count)
        texts = [task.completed(text) for task, text in zip(own, written, strict=True)]
        return [texts[first : first + count] for first in range(0, len(texts), count)]
