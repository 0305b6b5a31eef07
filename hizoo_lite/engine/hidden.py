"""Hidden states below the first block with anything trained: the same in every step, so computed once.

They are kept in a file, for every training example, as they go into that block. A step on a batch that has
them (`Batch.hidden`) runs the model's own code as ever, but the blocks below hand on what they were given,
uncomputed and unread, and what goes into the first trained block is put in its place. Blocks that are not run
are not brought in either.

The values are those of one pass over a fixed group of examples, so that they do not depend on the order of
the steps; a run that is resumed reads the same file. A model whose own code reads what a lower block gives,
or whose blocks hand on more than hidden states, runs in full: `NotComputed` raises once that is seen.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, final

import numpy as np
import torch
from torch import Tensor

from hizoo_lite.batch import Batch, Losses
from hizoo_lite.engine.chunks import has_cache, may_overwrite
from hizoo_lite.engine.overwritten import Overwritten, Unreadable, Unsuited, readable
from hizoo_lite.errors import StorageError, UserError
from hizoo_lite.files import check_space, read_json, storage_errors, sync_file, write_text
from hizoo_lite.units import counted

if TYPE_CHECKING:
    from hizoo_lite.base import Space
    from hizoo_lite.model.model import Model

_FORMAT = 1
_VALUE_BYTES = 4


class ReadsBelow(Unsuited):
    """What a block gives is read elsewhere than in the next one: no block may be left out."""

    note = "reads_below"


@final
class NotComputed(Unreadable):
    """What a block that was left out gives: of the right form, with no values of its own.

    room: a tensor of the form of all branches' hidden states that nobody reads any more; None: there is none.
    """

    error = ReadsBelow
    room: Tensor | None

    @classmethod
    def nothing(cls) -> Tensor:
        """In place of what a block gives besides hidden states."""
        made = torch.empty(0)
        cls.mark(made)
        return made


def first_trained(model: Model) -> int:
    """The first block that has something trained; as many as there are blocks if none has."""
    trained = (model.block_of(name) for name, linear in model.linears.items() if linear.delta is not None)
    return min((block for block in trained if block is not None), default=len(model.blocks))


def worth_keeping(model: Model, space: Space, drawn: int, examples: int) -> bool:
    """Whether they are kept, if they may be: if every example comes twice, and there are any.

    drawn: examples of all steps together. examples: to train on.
    """
    return drawn >= 2 * examples and space.weights is None and first_trained(model) > 0


def stored_bytes(tokens: int, features: int) -> int:
    """What the file has of so many tokens."""
    return tokens * features * _VALUE_BYTES


class Known:
    """A pass in which the blocks below `first` are left out; `hidden` goes into that one."""

    def __init__(self, model: Model, first: int, hidden: Tensor) -> None:
        """hidden: (rows, length, features) float32, of one branch, on the host."""
        self.model, self.first, self.hidden = model, first, hidden

    def runs(self, index: int) -> bool:
        """Whether block `index` is run."""
        return index >= self.first

    def left_out(self, hidden: Tensor) -> Tensor:
        """What is handed on in place of a block's output."""
        if type(hidden) is NotComputed:
            return hidden
        if hidden.dtype != torch.float32 or hidden.ndim != 3:
            raise ReadsBelow(f"hidden states of {hidden.ndim} axes in {hidden.dtype}")
        made = readable(hidden)
        NotComputed.mark(made)
        overwrites = self.model.overwrites and may_overwrite(hidden)
        made.room = readable(hidden) if overwrites else None  # type: ignore[attr-defined]
        if overwrites:
            Overwritten.mark(hidden)
        return made

    def given(
        self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What block `index`, which is run, is given."""
        if index > self.first:
            return args, kwargs
        before = args[0] if args else kwargs["hidden_states"]
        if type(before) is not NotComputed or has_cache(args, kwargs):
            raise ReadsBelow("a block is given what is not the output of the one before")
        branches = self.model.state.branches.count
        rows, *shape = self.hidden.shape
        if tuple(before.shape) != (branches * rows, *shape):
            raise ReadsBelow(f"hidden states of {tuple(before.shape)}")
        whole = before.room
        if whole is None:
            whole = torch.empty(before.shape, device=before.device)
        by_branch = whole.view(branches, rows, *shape)
        by_branch[0].copy_(self.hidden, non_blocking=True)
        by_branch[1:] = by_branch[:1]
        return ((whole, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": whole})


class Taken:
    """A pass that ends at block `first`, whose hidden states are taken; from there on none is run."""

    def __init__(self, first: int) -> None:
        self.first = first
        self.hidden: Tensor | None = None

    def runs(self, index: int) -> bool:
        """Whether block `index` is run."""
        return index < self.first

    def left_out(self, hidden: Tensor) -> Tensor:
        """What is handed on in place of a block's output."""
        if self.hidden is None:
            self.hidden = hidden.clone() if hidden.is_meta else hidden.to("cpu", copy=True)
        return hidden

    def given(
        self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What block `index`, which is run, is given."""
        return args, kwargs


@contextmanager
def in_part(model: Model, part: Known | Taken | None) -> Iterator[None]:
    """While this is open only those blocks are run; None: all of them."""
    if part is None:
        yield
        return
    model.part = part
    model.residency.starts_at = part.first if isinstance(part, Known) else 0
    try:
        yield
    finally:
        model.part, model.residency.starts_at = None, 0


class Passes(Protocol):
    """As far as a traversal is needed here."""

    model: Model

    def losses(self, batch: Batch) -> Losses:
        """At theta."""
        ...

    def hidden_states(self, batch: Batch, first: int) -> np.ndarray:
        """What goes into block `first` at theta: (rows, length, features) float32."""
        ...


class HiddenStates:
    """hidden.bin of a run: those of all training examples, and hidden.json, which says what is in it."""

    def __init__(self, traversal: Passes, folder: Path, of: Mapping[str, str]) -> None:
        """of: hashes of what they are computed from, to tell the file of another run."""
        self._of = dict(of)
        self.traversal, self.first = traversal, first_trained(traversal.model)
        self._data, self._about = folder / "hidden.bin", folder / "hidden.json"
        self._places: dict[int, tuple[int, list[int]]] = {}  # example -> where it begins, lengths of its rows
        self._features = 0
        self.is_open = False

    def open(
        self,
        groups: Sequence[Sequence[int]],
        lengths: Callable[[int], list[int]],
        collate: Callable[[Sequence[int]], Batch],
        *,
        writes: bool,
        tell: Callable[[str], None],
        check: Callable[[], None],
        begins: Callable[[int], None],
        advanced: Callable[[int], None],
    ) -> None:
        """Read the file, or make it if there is none that is whole. A model that is not suited: `tell`.

        groups: the examples that go through together. lengths: tokens of each row of one. collate: of some.
        writes: False for a rank that waits until the main one has made the file. check: may raise.
        begins, advanced: called as it is made, with how many examples there are, and are done since.
        """
        if not self._is_suited(collate([groups[0][0], groups[-1][-1]])):
            tell("the model reads hidden states below the first trained block: they are not kept")
            return
        first = 0
        for index in (index for group in groups for index in group):
            self._places[index] = first, lengths(index)
            first += stored_bytes(sum(lengths(index)), self._features)
        if writes and not self._is_whole(first):
            self._check_room(first)
            tell(
                f"computing the hidden states below block {self.first} once, for "
                f"{counted(len(self._places), 'example')} ({first / 2**20:.0f} MiB in {self._data.name})"
            )
            begins(len(self._places))
            self._make(groups, collate, first, check, advanced)
        self.is_open = True

    def of(self, examples: Sequence[int], batch: Batch) -> Batch:
        """The batch of these examples with their hidden states; as it is if none are kept."""
        if not self.is_open:
            return batch
        out = np.zeros((*batch.input_ids.shape, self._features), np.float32)
        rows = iter(out)
        try:
            with self._data.open("rb", buffering=0) as file:
                for index in examples:
                    begin, lengths = self._places[index]
                    file.seek(begin)
                    for length in lengths:
                        own = next(rows)[:length]
                        if file.readinto(own) != own.nbytes:
                            raise StorageError(f"{self._data}: it ends early")
        except OSError as error:
            raise StorageError(f"{self._data}: cannot be read: {error.strerror or error}") from error
        return batch._replace(hidden=out)

    def close(self, *, finished: bool) -> None:
        """A run that has finished needs them no more."""
        self.is_open = False
        for path in (self._data, self._about) if finished else ():
            path.unlink(missing_ok=True)

    def _is_suited(self, batch: Batch) -> bool:
        """Whether a pass may leave blocks out, and what is at padding: it is not kept.

        All blocks run once before, so that it is known what they give.
        """
        wanted = self.traversal.losses(batch).per_example
        try:
            found = self.traversal.hidden_states(batch, self.first)
        except ReadsBelow:
            return False
        self._features = found.shape[-1]
        kept = np.where(batch.attention_mask[..., None], found, np.float32(0))
        losses = self.traversal.losses(batch._replace(hidden=kept)).per_example
        same = (losses == wanted) | (wanted != wanted)
        return not self.traversal.model.reads_below and bool(same.all())

    def _is_whole(self, size: int) -> bool:
        """Whether the file is there with what hidden.json says."""
        try:
            stated = read_json(self._about, "what hidden.bin holds")
            return self._data.stat().st_size == size and stated == self._says(size)
        except (UserError, OSError):
            return False

    def _says(self, size: int) -> dict[str, Any]:
        about = {
            "format": _FORMAT,
            "of": self._of,
            "block": self.first,
            "features": self._features,
            "bytes": size,
        }
        return {**about, "blake2b": _digest(self._data)}

    def _check_room(self, size: int) -> None:
        try:
            check_space(self._data.parent, size)
        except UserError as error:
            raise UserError(f"{error}, or do without {self._data.name}: --hidden-states off") from error

    def _make(
        self,
        groups: Sequence[Sequence[int]],
        collate: Callable[[Sequence[int]], Batch],
        size: int,
        check: Callable[[], None],
        advanced: Callable[[int], None],
    ) -> None:
        self._about.unlink(missing_ok=True)
        with storage_errors(self._data), self._data.open("wb") as file:
            for group in groups:
                check()
                batch = collate(group)
                found = self.traversal.hidden_states(batch, self.first)
                for row, length in zip(found, batch.attention_mask.sum(1), strict=True):
                    file.write(row[: int(length)].tobytes())
                advanced(len(group))
            file.close()
            sync_file(self._data)
            write_text(self._about, json.dumps(self._says(size)) + "\n")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()
