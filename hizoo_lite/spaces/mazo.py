"""MaZO (arXiv 2502.11513): of every row of a weight the few that matter most to all the tasks of a run.

For each task t, with g the gradient of its loss on some examples and h the diagonal of the Hessian,

    S_t = row(g^2 / 2h) + greedy row(g^2) + size row(|W|),    mask: the largest k of each row of sum_t S_t

The first is the global score: how much higher the minimum of the quadratic model of the loss lies if this one
weight stays as it is, [H^-1 g]_m^2 / 2 [H^-1]_mm, of a diagonal H. The second is the greedy one: what a step
of gradient descent loses of its decrease without it. Every task counts the same. z is drawn for the k alone:
what is trained are differences at fixed places, as in `sparse.py`, 8 k bytes a row beside the stored weights.

Deviations: h is the layer-wise Hessian of OBD and Wanda, sum x_j^2 over the tokens of the task, with 1 % of
its mean added as in GPTQ; the factor of a row's own second derivative goes with the row's normalization, and
no Hessian, nor the inverse of one, is made: of n inputs that takes 8 n^2 bytes and n^3 operations a layer.
row() divides by the sum over a row, of each term by itself, so that `greedy` and `size` are in units of the
first and a row's scores sum to the same for every task; the paper normalizes S_t. Sum and mask are the
paper's; both scores are made here from what they are described as, a saliency by the Hessian and the loss
that a step reduces, without published code to hold them to.

g comes from one reverse pass of the examples of all tasks, a block at a time, see `sparse.Sensitivity`, and a
row of the batch at a time, so that each is known to be of one task. A block's weights are there until the
last row has come back: its places are chosen by then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hizoo_lite.batch import Batch
from hizoo_lite.engine.backward import NoReverse
from hizoo_lite.engine.traversal import Traversal
from hizoo_lite.errors import UserError
from hizoo_lite.model.linear import BranchLinear
from hizoo_lite.model.model import Model
from hizoo_lite.spaces.heads import HeadMode
from hizoo_lite.spaces.sparse import (
    INDEX,
    Row,
    Sensitivity,
    Sparse,
    SparseChanges,
    joined,
    score_tiles,
    sizes,
)
from hizoo_lite.spaces.targets import Blocks
from hizoo_lite.tasks.mixture import tasks_of_rows

#: Of the mean of h, added to it: a weight whose input is nearly 0 is not the most important one.
DAMPING = 0.01


class MaZOChanges(SparseChanges):
    """W + S, in float32."""

    space = "mazo"


class MaZO(Sparse):
    """The weights of each row that matter most to all tasks of a run (MaZO, arXiv 2502.11513).

    With g the gradient of task t's loss and h a diagonal Hessian, row(x) being x over its sum over the row,
    those with the largest sum over the tasks of

        S_t = row(g^2 / 2h) + greedy row(g^2) + size row(|W|)

    Deviations: h is diagonal, and row() is of each term, in place of S_t. Trained like those of `Sparse`.
    """

    name = "mazo"
    changes = MaZOChanges

    def __init__(
        self,
        share: float = 0.001,
        greedy: float = 1.0,
        size: float = 1.0,
        targets: str | Sequence[str] = "all-linear",
        head: HeadMode | None = None,
        blocks: Blocks = "all",
    ) -> None:
        """Nothing is chosen before `calibrate`.

        Args:
            share: of each row, above 0 and up to 1; at least one weight.
            greedy: what the decrease of one step counts beside the first score, 0 or more.
            size: what the size of a weight counts beside it, 0 or more.
            targets: as of `LoRA`; by default all linear layers.
            head: as of `LoRA`, without rows for label words.
            blocks: how many blocks are trained, from the top, or "all".

        Raises:
            UserError: if an argument is out of range.
        """
        super().__init__(share, targets=targets, head=head, blocks=blocks)
        for flag, value in (("--mazo-greedy", greedy), ("--mazo-size", size)):
            if not 0 <= value < float("inf"):
                raise UserError(f"{flag}: got {value!r}, allowed: a number of 0 or more")
        self.greedy, self.size = greedy, size
        self.without_losses = "another --space"

    def options(self) -> dict[str, Any]:
        """What a space must be made with to read what this one saved, beside the targets."""
        return {**super().options(), "greedy": self.greedy, "size": self.size}

    def count(self, linear: BranchLinear) -> int:
        """How many weights of the layer `linear` are trained: as many of each row."""
        return linear.out_features * max(1, round(self.share * linear.in_features))

    def calibrate(self, traversal: Traversal, batch: Batch) -> None:
        """Choose the places, by gradients of the examples of each task. See `Space.calibrate`.

        Raises:
            UserError: if the model allows no reverse pass, or gradients are not finite.
        """
        index = {target: self.frozen[target + INDEX] for target in self.target_names}
        found = Importance(self.model, index, tasks_of_rows(batch), self.greedy, self.size)
        self.reverse(traversal, batch, found, 1)

    def refusal(self, why: str, also: str = "") -> UserError:
        """What is said if there are no gradients to choose places by."""
        return UserError(
            f"--space: got {self.name!r}, which needs gradients, but {why}; allowed: another{also}"
        )


class Importance(Sensitivity):
    """The places of every row's largest scores, from the rows of a batch, each of a task."""

    def __init__(
        self, model: Model, index: Mapping[str, Tensor], tasks: Sequence[int], greedy: float, size: float
    ) -> None:
        """tasks: of each row of the batch."""
        self.tasks, self.greedy, self.size = tasks, greedy, size
        super().__init__(model, index)

    def begin(self) -> None:
        """See `Sensitivity.begin`."""
        super().begin()
        self._out = 0  # layers that have been run and whose gradient has not come

    def enter(self, target: str) -> None:
        """See `Sensitivity.enter`."""
        super().enter(target)
        self._out += 1

    def take(self, target: str, x: Tensor, gradient: Tensor) -> None:
        """The same; the last one of the block finishes it, whose weights are there."""
        super().take(target, x, gradient)
        self._out -= 1
        if self._out == 0 and self.chunk + 1 == len(self.tasks):
            self.finish()

    def finish(self) -> None:
        """See `Sensitivity.finish`. Raises `NoReverse` for a block whose weights may be gone."""
        if self._rows and self._out:
            raise NoReverse(
                f"{self.model.config.model_type} has layers in its blocks that no loss depends on"
            )
        super().finish()

    def choose(self, target: str, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """See `Sensitivity.choose`."""
        of_tasks: dict[int, list[Row]] = {}
        for row in rows:
            of_tasks.setdefault(self.tasks[row.chunk], []).append(row)
        given = [
            (joined([x for row in own for x in row.x]), joined([dy for row in own for dy in row.gradient]))
            for own in of_tasks.values()
        ]
        linear, device = self.model.linears[target], self.model.device
        return largest_of_rows(
            linear, len(self.index[target]), partial(scores, linear, given, self.greedy, self.size), device
        )


def largest_of_rows(
    linear: BranchLinear, count: int, score: Any, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The largest scores of every row of a matrix, as many of each, and their places in it, flat and rising.

    count: of the matrix. score: fills a tile, (rows, in_features) float32, that begins at a row.
    """
    rows, columns = linear.weight.shape
    best, index = torch.empty(count, device=device), torch.empty(count, dtype=torch.int64, device=device)
    each = count // rows
    for first, tile in score_tiles(linear, device):
        score(tile, first)
        places = tile.topk(each, dim=1, sorted=False).indices.sort(dim=1).values
        own = slice(first * each, (first + len(tile)) * each)
        best[own] = tile.gather(1, places).flatten()
        starts = torch.arange(first, first + len(tile), device=device)[:, None] * columns
        index[own] = (places + starts).flatten()
        if device.type == "meta":  # the other tiles take no more memory than this one
            break
    return best, index


def scores(
    linear: BranchLinear,
    given: Sequence[tuple[Tensor, Tensor]],
    greedy: float,
    size: float,
    tile: Tensor,
    first: int,
) -> None:
    """Fill `tile`, of the rows from `first` on, with the sum of S_t. given: (x, dy) of each task."""
    sizes(linear.weight, tile, first)
    _shares(tile).mul_(size * len(given))
    term = torch.empty_like(tile)
    for x, gradient in given:
        torch.mm(gradient[:, first : first + len(tile)].t(), x, out=term)
        hessian = x.square().sum(0, dtype=torch.float64)
        hessian += DAMPING * hessian.mean()
        hessian += hessian == 0  # of inputs that are all 0, as g is
        squares = term.square_()
        if greedy:
            tile.add_(_shares(squares.clone()), alpha=greedy)
        tile.add_(_shares(squares.div_(hessian.float())))


def _shares(values: Tensor) -> Tensor:
    """Each row by its sum, in place; a row of zeros stays one."""
    total = values.sum(1, keepdim=True, dtype=torch.float64)
    return values.div_((total + (total == 0)).float())
