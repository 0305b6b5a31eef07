"""The loop: evaluate, step, record, save, until the last step or a request to end.

Everything a step did is in metrics.jsonl and then in journal.bin before the next one begins. A line has
`kind` "step" or "eval"; `step` is the number of that step, or how many steps had been taken before that
evaluation. What is due after a step (an evaluation on dev, a checkpoint) is looked at when the next one would
begin, so that a killed run makes up for it. Of several ranks each runs this loop on its share of the
examples, and the main one writes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from hizoo_lite.batch import Batch, Example
from hizoo_lite.config import TrainConfig
from hizoo_lite.errors import BudgetError, StorageError, TooManyBadSteps, UserError
from hizoo_lite.memory.peak import PeakMeter
from hizoo_lite.tasks import Encoder, Splits, Task, batch_indices, shown
from hizoo_lite.tasks.collate import Encoded
from hizoo_lite.tasks.task import part_of, where
from hizoo_lite.train import checkpoint
from hizoo_lite.train.callbacks import HIDDEN, Callbacks, scores
from hizoo_lite.train.checkpoint import Position
from hizoo_lite.train.evaluate import Evaluation, Writer, evaluate
from hizoo_lite.train.folder import RunFolder
from hizoo_lite.train.interrupt import Interrupt, Interrupted
from hizoo_lite.train.journal import Journal, Record
from hizoo_lite.train.step import Stepper, StepRecord
from hizoo_lite.units import counted

if TYPE_CHECKING:
    from hizoo_lite.engine.hidden import HiddenStates

#: Steps in a row whose losses are not finite before the run is stopped.
MOST_BAD_STEPS = 20


class Components(Protocol):
    """What a run is made of, as far as the loop needs it."""

    @property
    def config(self) -> TrainConfig: ...

    @property
    def splits(self) -> Splits: ...

    @property
    def encoder(self) -> Encoder: ...

    @property
    def traversal(self) -> Writer: ...

    @property
    def stepper(self) -> Stepper: ...

    @property
    def chunk_halvings(self) -> int:
        """How often the chunks that losses are computed in were halved, so that they fit into memory."""
        ...


class Phases(Protocol):
    """Who looks at memory while the run goes on."""

    def phase(self, name: Literal["evaluate", "train", "save"], step: int) -> AbstractContextManager[None]:
        """A step, an evaluation or a checkpoint, from its start to its end."""
        ...

    def measure_inference(self, step: int, forward: Callable[[], object]) -> None:
        """Call `forward`, an evaluation of a training batch."""
        ...


class Loop:
    """One run in progress. `position` is where it stands, `before` and `after` are its evaluations.

    is_whole: the state in memory is that of `position`, and may be saved; a step that failed after its losses
    were there leaves neither that nor the next one.
    """

    def __init__(
        self,
        setup: Components,
        folder: RunFolder,
        position: Position,
        journal: Journal | None,
        *,
        callbacks: Callbacks,
        interrupt: Interrupt,
        meter: PeakMeter,
        profiler: Phases,
        memory: Callable[[], Mapping[str, Any]],
        hidden: HiddenStates | None = None,
    ) -> None:
        """`memory` gives memory.json as it stands.

        hidden: None if hidden states are not kept.

        journal: None for a rank that is not the main one.
        """
        self.ranks = setup.stepper.ranks
        self.setup, self.folder, self.position, self.journal = setup, folder, position, journal
        self.callbacks, self.memory, self.hidden = callbacks, memory, hidden
        self.interrupt, self.meter, self.profiler = interrupt, meter, profiler
        self.before: Evaluation | None = None
        self.after: Evaluation | None = None
        self.is_whole = True
        self.adapter_step = position.step  # after which the parameters in memory are those
        self.chunk_halvings = setup.chunk_halvings  # of the chunks in which the last step was computed
        self._encoded: dict[int, Encoded] = {}
        task, examples = setup.encoder.task, setup.splits.train
        self._labels = task.classes(examples, setup.config.balanced == "auto")
        self._stream = task.stream(examples, setup.config.seed, self._labels)
        self._length = self._tokens if setup.config.by_length == "auto" else None

    def run(self) -> None:
        """To the end.

        Raises `Interrupted` if a signal came or a callback failed, `TooManyBadSteps` if losses stay NaN
        or the result is.
        """
        splits, total = self.setup.splits, self.setup.config.steps
        self.callbacks.begin(self.position.step)
        if self.position.step == 0 and self.setup.stepper.space.weights is None:
            self._save_state()  # for `replay`
        if self.position.step == 0 and not self._recorded("before", 0):
            self.meter.restart()
            self.before = self._evaluate("before", splits.test, inference_peak=True)
            self.meter.restart()
        if self.position.step < total:
            self._measure_inference()
            self._open_hidden_states()
        self._due()
        while not self._is_over():
            self._step()
            self._due()
        if self.position.step < total:
            who = self.setup.stepper.estimator.over(self.position.step) or "a callback"
            self.callbacks.message(f"{who} ends the run after {self.position.step} of {total} steps")
        if self.setup.config.keep == "best":
            self.save()
            self._take_best()
        self.after = self._evaluate("after", splits.test)
        self._check_result(self.after.loss)

    def _check_result(self, loss: float) -> None:
        """`TooManyBadSteps` if nothing was trained, or what was trained computes nothing."""
        bad, total = self.position.bad_steps, self.setup.config.steps
        if not math.isfinite(loss):
            raise TooManyBadSteps(
                f"after {total} steps the loss is {loss}, not a finite number; {self._remedy()}"
            )
        if bad >= total:
            raise TooManyBadSteps(f"the losses of all {total} steps were not finite; {self._remedy()}")

    def _remedy(self) -> str:
        return (
            f"what was trained is saved in {self.folder.path}; begin another run with a lower --lr or --mu, "
            "or with --compute-dtype float32"
        )

    def save(self) -> None:
        """The checkpoint of where the run stands."""
        if not self.ranks.is_main:
            return
        with self.profiler.phase("save", self.position.step):
            self._save_state()
        best = self.best_step()
        limit = self.setup.config.save_total_limit
        checkpoint.keep(self.folder.checkpoints, limit, [] if best is None else [best])
        if not self.setup.stepper.estimator.secret:
            self.folder.write_memory(self.memory())
        self.callbacks.saved()

    def _save_state(self) -> None:
        if self.journal is not None:
            self.journal.sync()
            self.folder.sync_metrics()
            checkpoint.save(
                self.folder.checkpoints, self.position, self.setup.stepper, self.setup.chunk_halvings
            )

    def _is_over(self) -> bool:
        """Whether there is no other step: all were taken, or a callback or the estimator wants no more.

        Raises `Interrupted` if one has failed or a signal came. All ranks end after the same step.
        """
        control, failed = self.callbacks.control, self.callbacks.failure is not None
        interrupted, stopped = self._any(self.interrupt.requested or failed, control.should_training_stop)
        if interrupted:  # not what this one alone knows by now: a signal may come while it waits
            self.interrupt.requested = True
            raise Interrupted
        step = self.position.step
        return (
            stopped or step >= self.setup.config.steps or self.setup.stepper.estimator.over(step) is not None
        )

    def _may_end(self) -> Callable[[], None]:
        """What raises `Interrupted` between two batches, if it may."""
        return self.interrupt.check if self.ranks.count == 1 else _go_on

    def _any(self, *flags: bool) -> list[bool]:
        """Whether any rank says so, of each."""
        return [bool(count) for count in self.ranks.sum(np.array(flags, dtype=np.float64))]

    def account(self) -> dict[str, Any]:
        """What the estimator has to say of the steps that were taken; entries of summary.json."""
        entries, line = self.setup.stepper.estimator.account(self.position.step)
        if line:
            self.callbacks.message(line)
        return entries

    def best_step(self) -> int | None:
        """After how many steps the evaluation on dev was best; the earliest of several. None without one.

        Of those whose state is there, now or in a checkpoint: a run may be told late to keep the best.
        """
        there = {self.position.step, *map(checkpoint.steps_of, checkpoint.every(self.folder.checkpoints))}
        return self._best(there.__contains__)

    def _best(self, counts: Callable[[int], bool]) -> int | None:
        """Of the evaluations on dev after so many steps as `counts`."""
        name = self.setup.encoder.task.metric
        sign = -1 if name == "loss" else 1
        found = [line for line in self.folder.evaluations() if line["when"] == "dev"]
        scored = [
            (sign * line[name], -line["step"])
            for line in found
            if line.get(name) is not None and counts(line["step"])
        ]
        return -max(scored)[1] if scored else None

    def _measure_inference(self) -> None:
        """What one evaluation forward of the next step's batch takes at most."""
        number = self.position.step
        for batch in self._batches(number)[:1]:
            self.profiler.measure_inference(number, partial(self.setup.traversal.losses, batch))

    def _open_hidden_states(self) -> None:
        """Those of all training examples, as many at once as a part of a step's batch has."""
        if self.hidden is None:
            return
        config, count = self.setup.config, len(self.setup.splits.train)
        together = -(-config.batch_size // config.accumulate)
        order = sorted(range(count), key=lambda index: (self._tokens(index), index))
        groups = [order[first : first + together] for first in range(0, count, together)]
        arguments: dict[str, Any] = {
            "tell": self.callbacks.message,
            "check": self._may_end(),
            "begins": lambda total: self.callbacks.evaluation(HIDDEN, total),
            "advanced": self.callbacks.advanced,
        }
        lengths, collate = self._lengths, self._collated
        if self.ranks.is_main:
            self.hidden.open(groups, lengths, collate, writes=True, **arguments)
        self.ranks.wait()
        if not self.ranks.is_main:
            self.hidden.open(groups, lengths, collate, writes=False, **arguments)

    def _step(self) -> None:
        number = self.position.step
        self.callbacks.step_begin()
        began = time.perf_counter()
        batches = self._batches(number)
        self.is_whole = False
        try:
            with self.profiler.phase("train", number):
                record = self.setup.stepper.step(number, *batches)
        except (StorageError, BudgetError):  # from the losses: nothing has been learnt of this step
            self.is_whole = True
            raise
        line = self._record(record, time.perf_counter() - began)
        bad = self.position.bad_steps + 1 if record.skipped else 0
        self.position, self.is_whole = Position(number + 1, bad), True
        self.adapter_step, self.chunk_halvings = number + 1, self.setup.chunk_halvings
        self.callbacks.step_end(record, line)
        if bad >= MOST_BAD_STEPS:
            raise TooManyBadSteps(
                f"step {number}: the losses of {bad} steps in a row were not finite; {self._remedy()}"
            )

    def _due(self) -> None:
        """What `eval_every`, `save_every` and callbacks ask for where the run stands, if it is not there."""
        config, step = self.setup.config, self.position.step
        if step == 0:
            return
        at_end = step == config.steps and config.keep == "final"  # which is evaluated on the test examples
        [asked] = self._any(self.callbacks.control.should_evaluate)
        wanted = asked or (config.eval_every and step % config.eval_every == 0 and not at_end)
        if asked and not self.setup.splits.dev:
            self.callbacks.fail(UserError("should_evaluate: there are no dev examples to evaluate on"))
        elif wanted and not self._recorded("dev", step):
            self._evaluate("dev", self.setup.splits.dev)
            self.meter.restart()  # what it had is of other sizes than a step's, and would stay beside
        is_best = wanted and config.keep == "best" and self.best_step() == step
        is_due = config.save_every and step % config.save_every == 0
        if is_best or is_due or self.callbacks.control.should_save:
            self.save()

    def _take_best(self) -> None:
        """The parameters of the best evaluation on dev, in place of the last ones."""
        step = self._sound_best() if self.ranks.is_main else 0
        step = int(self.ranks.sum(np.array([float(step)]))[0])
        if step != self.position.step:
            path = checkpoint.path_of(self.folder.checkpoints, step)
            self.is_whole = False
            self.setup.stepper.space.load(path / checkpoint.ADAPTER)
            self.adapter_step, self.is_whole = step, True
            self.callbacks.message(f"best on dev: after {step} steps; that is what is kept")

    def _sound_best(self) -> int:
        """`best_step`, the last one without any; a checkpoint that is damaged is set aside."""
        while (step := self.best_step()) not in (None, self.position.step):
            path = checkpoint.path_of(self.folder.checkpoints, step)
            try:
                checkpoint.check(path)
            except UserError as error:
                checkpoint.set_aside(path)
                self.callbacks.message(f"{error}; it is set aside")
            else:
                break
        wanted = self._best(lambda step: True)
        if wanted != step:
            self.callbacks.message(
                f"the best on dev, after {wanted} steps, is not among the checkpoints; "
                f"hizoo-lite replay {self.folder.path} --step {wanted} makes it from the journal"
            )
        return self.position.step if step is None else step

    def _batches(self, number: int) -> list[Batch]:
        """This rank's share of a step's examples, in the parts that are asked for; none that is empty.

        As many parts for each of the estimator's groups.
        More parts if a step has more examples than the settings say: no part is larger for it.
        """
        config, mine = self.setup.config, self.ranks.share(self._chosen(number))
        most = -(-config.batch_size // (config.accumulate * self.ranks.count))
        groups = self.setup.stepper.estimator.groups
        count = groups * -(-max(config.accumulate, -(-len(mine) // most)) // groups)
        bounds = [len(mine) * part // count for part in range(count + 1)]
        parts = [mine[first:last] for first, last in pairwise(bounds) if first < last]
        made = map(self._collated, parts)
        if self.hidden is not None:
            made = map(self.hidden.of, parts, made)
        examples = self.setup.splits.train
        return [
            batch._replace(made_of=tuple(examples[index] for index in part))
            for batch, part in zip(made, parts, strict=True)
        ]

    def _chosen(self, number: int) -> Sequence[int]:
        """A step's examples, on all ranks."""
        sample = self.setup.stepper.estimator.sample()
        if sample is not None:
            return self.ranks.gather(sample)[0]
        config, count = self.setup.config, len(self.setup.splits.train)
        order = self._labels, self._length, self._stream
        return batch_indices(count, config.batch_size, config.seed, number, *order)

    def _collated(self, part: Sequence[int]) -> Batch:
        """The batch of some training examples."""
        return self.setup.encoder.collate(list(map(self._example, part)))

    def _example(self, index: int) -> Encoded:
        """A training example as tokens."""
        if index not in self._encoded:
            self._encoded[index] = self.setup.encoder.encode(self.setup.splits.train[index], training=True)
        return self._encoded[index]

    def _tokens(self, index: int) -> int:
        """Those of the longest row of a training example."""
        return max(self._lengths(index))

    def _lengths(self, index: int) -> list[int]:
        """Tokens of each row of a training example."""
        return list(map(len, self._example(index).rows))

    def _record(self, record: StepRecord, seconds: float) -> dict[str, Any]:
        """The line of metrics.jsonl. The time of a step tells how many examples it had."""
        told = None if self.setup.stepper.estimator.secret else seconds
        line = {"kind": "step", **record.metrics(), "seconds": told}
        self.folder.append_metrics(line)
        if self.journal is not None:
            self.journal.append(self._journalled(record))
        return line

    def _journalled(self, record: StepRecord) -> Record:
        config = self.setup.config
        return Record(
            step=record.step,
            seed=config.seed,
            position=record.step * config.batch_size,
            losses=record.losses,
            coefficients=record.coefficients,
            curvatures=record.curvatures,
            smoothing=record.smoothing,
            lr=record.lr,
            decay=record.decay,
            skipped=record.skipped,
            clipped=record.clipped,
            chunk_halvings=self.setup.chunk_halvings,
            predicted=record.predicted,
            exact=record.exact,
        )

    def _evaluate(self, when: str, examples: Sequence[Example], inference_peak: bool = False) -> Evaluation:
        setup, step = self.setup, self.position.step
        self.callbacks.evaluation(when, len(examples))
        with self.profiler.phase("evaluate", step):
            result = evaluate(
                setup.traversal,
                setup.encoder,
                examples,
                setup.config.eval_batch_size,
                check=self._may_end(),
                advanced=self.callbacks.advanced,
                ranks=self.ranks,
            )
        found = {metric.name: metric.value for metric in result.metrics}
        line = {"kind": "eval", "when": when, "step": step, "loss": result.loss, **found}
        line |= {"examples": result.examples, "seconds": result.seconds}
        if inference_peak:
            line["inference_peak_bytes"] = self.meter.phase_bytes()
        self.folder.append_metrics(line)
        if when in ("before", "after") and not self.setup.stepper.estimator.secret:
            self.folder.write_predictions(when, step, _lines(setup.encoder.task, examples, result))
        self.callbacks.evaluated(line, result)
        shown = ", ".join(f"{name} {value:.4f}" for name, value in scores(line).items())
        steps, count = counted(step, "step"), counted(result.examples, "example")
        self.callbacks.message(f"{when} ({steps}): {shown} ({count})")
        return result

    def _recorded(self, when: str, step: int) -> bool:
        return any(line["when"] == when and line["step"] == step for line in self.folder.evaluations())


def _lines(task: Task, examples: Sequence[Example], result: Evaluation) -> list[dict[str, Any]]:
    """What is kept of each example of an evaluation."""
    found = []
    for index, example in enumerate(examples):
        line = {"index": index, "where": where(example), "loss": result.losses[index]}
        line["prompt"] = shown.prompt(task, example)
        if task.parts[part_of(example)].kind != "lm" or task.chat:
            line["gold"] = shown.gold(example)
        prediction = result.predictions[index] if result.predictions else ""
        if prediction != "":
            line["answer"] = shown.answer(task, example, prediction)
        if isinstance(prediction, int):
            line["right"] = prediction == example.gold
        found.append(line)
    return found


def _go_on() -> None:
    """A rank does not end alone: the others would wait for it."""
