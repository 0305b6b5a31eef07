"""One traversal of the model for all branches of a step: from a batch to per-branch, per-example losses.

The batch is repeated once a branch along its first axis; the Hugging Face model runs unchanged on it.
Blocks come and go as they run (see `block.py`). Logits are computed only where a label is, through the
model's own head, in chunks; log-probabilities and divergences are summed in float64 because a step needs
differences of order mu^2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from hizoo_lite.batch import Batch, Losses
from hizoo_lite.branches import EVALUATION, Branches
from hizoo_lite.device import like
from hizoo_lite.engine.backward import Boundaries, kept_boundaries
from hizoo_lite.engine.exact import (
    RECORDED_HALVINGS,
    class_loss,
    gradients_of,
    recorded,
    theta,
    token_gradients,
    with_reaches,
)
from hizoo_lite.engine.fanout import blocks_alike
from hizoo_lite.engine.generate import Ended, write
from hizoo_lite.engine.head import HELD_BYTES, LOGITS_BYTES, head_of, logits_at, with_hidden
from hizoo_lite.engine.hidden import Known, Taken, first_trained, in_part
from hizoo_lite.engine.overwritten import until_suited
from hizoo_lite.errors import UserError
from hizoo_lite.model.attention import nothing_packed
from hizoo_lite.model.linear import BranchLinear
from hizoo_lite.model.model import Model
from hizoo_lite.model.offloaded import OffloadedWeight
from hizoo_lite.tasks.losses import class_losses, divergence_terms, sides, slot_losses
from hizoo_lite.tensors import TorchArrays, batch_tensors, brought

#: Bytes of a chunk's logits that are float64 at once: as a whole they and their exponentials would be four
#: times the chunk.
TERMS_BYTES = {"cpu": 2 << 20, "cuda": 64 << 20}
Result = TypeVar("Result")
_HOST = TorchArrays()
_NONE: Mapping[str, Tensor] = {}


class Guard(Protocol):
    """Runs a pass, again in smaller chunks if memory runs out."""

    def __call__(self, work: Callable[[], Result], /) -> Result: ...


class Traversal:
    """Evaluates branches of a model. Stateless between calls; never changes a weight."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.guard: Guard = _once  # of every pass; see engine/budget.py

    def write(
        self, prompts: Sequence[list[int]], pad_id: int, max_new_tokens: int, ended: Ended | None = None
    ) -> list[list[int]]:
        """See `evaluate.Write`."""
        return write(self.model, prompts, pad_id, max_new_tokens, ended)

    def writing(self, branches: Branches, mu: float, directions: Mapping[str, Tensor]) -> Callable[..., Any]:
        """See `BranchWriter.writing`."""

        def work(*given: Any) -> list[list[int]]:
            self.model.state.set(branches, mu, directions, writes=True)
            try:
                return self.write(*given)
            finally:
                self.model.state.set(EVALUATION, 0.0, {})

        return lambda *given: self.guard(partial(work, *given))

    @torch.no_grad()
    def losses(
        self,
        batch: Batch,
        branches: Branches = EVALUATION,
        mu: float = 0.0,
        directions: Mapping[str, Tensor] | None = None,
        exact: Mapping[str, Tensor] | None = None,
    ) -> Losses:
        """See `BranchLosses.losses`; `directions` as in `BranchState`."""
        made = batch_tensors(batch)
        work = partial(self._losses, made, branches, mu, directions or {}, exact or {})
        return self.guard(lambda: until_suited(self.model, work))

    def _losses(
        self,
        batch: Batch,
        branches: Branches,
        mu: float,
        directions: Mapping[str, Tensor],
        exact: Mapping[str, Tensor],
    ) -> Losses:
        found = self.outcome(batch, branches, mu, directions, exact)
        made = brought(found, torch.device("cpu"))  # in one copy: the host waits once
        if self.model.kind == "classifier":
            losses = class_losses(_HOST, made[0], batch.gold, branches.compared)
        else:
            losses = slot_losses(_HOST, made[0], made[1], batch, branches.compared)
        return losses._replace(exact=made[-1]) if exact else losses

    def outcome(
        self,
        batch: Batch,
        branches: Branches,
        mu: float,
        directions: Mapping[str, Tensor],
        exact: Mapping[str, Tensor] = _NONE,
    ) -> tuple[Tensor, ...]:
        """What losses are made of, on the model's device, float64.

        Of a classifier its logits, (branches, examples, classes); else `_scored_log_probabilities`. Behind
        that, if there are parameters with one, the exact gradients: `Losses.exact`.
        Raises `Unsuited` when the model is first found to be.
        """
        standing, known = len(theta(branches)), self._known(batch)
        with (
            self._branches(branches, mu, directions),
            kept_boundaries(self.model, exact, standing) as kept,
            in_part(self.model, known),
        ):
            with self._laid_out(batch, branches.count) as inputs, recorded(exact):
                if self.model.kind == "classifier":
                    logits = self.model.module(**inputs).logits
                    logits = logits.view(branches.count, batch.examples, -1).double()
                    if not exact:
                        return (logits,)
                    loss = class_loss(logits, batch.gold, branches)
                    return logits.detach(), self._class_gradients(loss, batch, standing, exact, kept)
                output = self._trunk(inputs)
                recorded_hidden = output[0].view(branches.count, *batch.input_ids.shape, -1)
            hidden = recorded_hidden.detach()
            output = with_hidden(output, hidden)  # what else it has need not live on
            found = self._scored_log_probabilities(output, hidden, batch, branches)
            if not exact:
                return found
            weights = token_gradients(found[0][:standing], batch) / standing
            return *found, self._label_gradients(output, recorded_hidden, batch, weights, exact, kept)

    @torch.no_grad()
    def hidden_states(self, batch: Batch, first: int) -> np.ndarray:
        """What goes into block `first` at theta: (rows, length, features) float32."""
        made = batch_tensors(batch)
        return self.guard(lambda: until_suited(self.model, partial(self.taken, made, first))).numpy()

    def taken(self, batch: Batch, first: int) -> Tensor:
        """The same, on the host. Raises `Unsuited` when the model is first found to be."""
        taken = Taken(first)
        with (
            self._branches(EVALUATION, 0.0, {}),
            self._laid_out(batch, 1) as inputs,
            in_part(self.model, taken),
        ):
            self._trunk(inputs)
        assert taken.hidden is not None
        return taken.hidden

    @torch.no_grad()
    def scored(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """Of every scored token its log-probability, float64, and whether none is likelier, bool."""
        made = batch_tensors(batch)
        log_p, likeliest = self.guard(lambda: until_suited(self.model, partial(self._scored, made)))
        return log_p[0].cpu().numpy(), likeliest.cpu().numpy()

    def _scored(self, batch: Batch) -> tuple[Tensor, Tensor]:
        likeliest = torch.empty(len(batch.token_id), dtype=torch.bool, device=self.model.device)
        with self._branches(EVALUATION, 0.0, {}):
            with self._laid_out(batch, 1) as inputs:
                output = self._trunk(inputs)
            hidden = output[0].view(1, *batch.input_ids.shape, -1)
            log_p, _ = self._scored_log_probabilities(output, hidden, batch, EVALUATION, likeliest)
        return log_p, likeliest

    def _trunk(self, inputs: Mapping[str, Tensor]) -> Any:
        """What everything below the head gives."""
        trunk = self.model.module.get_submodule(self.model.trunk_name)
        return trunk(**inputs, **self._no_cache())

    def _known(self, batch: Batch) -> Known | None:
        """The part of the model that is run on a batch whose lower hidden states are known."""
        if batch.hidden is None or self.model.reads_below:
            return None
        return Known(self.model, first_trained(self.model), batch.hidden)

    @contextmanager
    def _laid_out(self, batch: Batch, count: int) -> Iterator[dict[str, Tensor]]:
        """While this is open the model may run on `count` branches of the batch: its inputs."""
        inputs, state = self._fold(batch, count), self.model.state
        state.sent(batch.input_ids, inputs["input_ids"])
        if "attention_mask" in inputs and self.model.leaves_out_padding:
            state.pad(batch.attention_mask)
        lengths = batch.attention_mask.sum(1).tolist()
        with state.laid_out(*inputs["input_ids"].shape), self.model.row_positions.of(lengths):
            yield inputs

    @contextmanager
    def _branches(self, branches: Branches, mu: float, directions: Mapping[str, Tensor]) -> Iterator[None]:
        self.model.state.set(branches, mu, directions)
        self.model.overwrites = not self.model.reads_again
        self.model.blocks_alike = blocks_alike(self.model, branches.count)
        try:
            with nothing_packed():
                yield
        finally:
            self.model.overwrites, self.model.blocks_alike = False, 0
            self.model.state.set(EVALUATION, 0.0, {})

    def _fold(self, batch: Batch, count: int) -> dict[str, Tensor]:
        device = self.model.device
        inputs = {"input_ids": batch.input_ids}
        if not bool(batch.attention_mask.all()):  # asked here, on the host: the model would ask the device
            inputs["attention_mask"] = batch.attention_mask
        if batch.token_type_ids is not None:
            inputs["token_type_ids"] = batch.token_type_ids
        return {name: t.to(device, non_blocking=True).repeat(count, 1) for name, t in inputs.items()}

    def _no_cache(self) -> dict[str, bool]:
        return {"use_cache": False} if self.model.kind == "causal" else {}

    def _scored_log_probabilities(
        self,
        output: Any,
        hidden: Tensor,
        batch: Batch,
        branches: Branches,
        likeliest: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Log-probability of every scored token, (branches, scored) float64, on the model's device.

        And the divergence along each direction over the vocabulary at every site, (directions, sites)
        float64, if the loss is of that; no direction otherwise. likeliest: gets, if it is given, whether
        each scored token is the likeliest one at its site for the first branch, (scored,) bool.
        """
        device, model = hidden.device, self.model
        directions = branches.directions if batch.loss == "answer" else 0
        divergences = torch.empty(directions, len(batch.site_row), dtype=torch.float64, device=device)
        order = torch.argsort(batch.token_site)
        out = torch.empty(hidden.shape[0], order.shape[0], dtype=torch.float64, device=device)
        limits = (size >> model.chunk_halvings for size in (LOGITS_BYTES, HELD_BYTES[like(device)]))
        for part, logits, tokens, at, ids in self._at_tokens(output, hidden, batch, order, *limits):
            normalizer = torch.empty(logits.shape[:2], dtype=torch.float64, device=device)
            step = max(1, TERMS_BYTES[like(device)] // (8 * logits.shape[0] * logits.shape[-1]))
            for first in range(0, logits.shape[1], step):
                some = slice(first, first + step)
                wide = logits[:, some].double()
                normalizer[:, some] = torch.logsumexp(wide, dim=-1)
                if directions:
                    wide -= normalizer[:, some, None]
                    divergences[:, part][:, some] = _divergences(wide, branches)
            out[:, tokens] = logits[:, at, ids].double() - normalizer[:, at]
            if likeliest is not None:
                likeliest[_sent(order[tokens], device)] = logits[0].argmax(-1)[at] == ids
            if self.model.observer is not None:
                self.model.observer.reached("head")
        unsorted = torch.empty_like(out)
        unsorted[:, _sent(order, device)] = out
        return unsorted, divergences

    def _at_tokens(
        self, output: Any, hidden: Tensor, batch: Batch, order: Tensor, limit_bytes: int, held_bytes: int = 0
    ) -> Iterator[tuple[slice, Tensor, slice, Tensor, Tensor]]:
        """Chunks of logits with the scored tokens that are read there.

        order: of the scored tokens by site. Gives, of each chunk: its sites; its logits, see `logits_at`; its
        tokens, in that order; their sites in the chunk; their ids.
        """
        device, model = hidden.device, self.model
        rows, positions = _sent(batch.site_row, device), _sent(batch.site_position, device)
        sites, ids = batch.token_site[order], _sent(batch.token_id[order], device)
        limits = limit_bytes, self._offloaded_head(), held_bytes
        for part, logits in logits_at(
            model.module, model.trunk_name, output, hidden, rows, positions, model.config.vocab_size, *limits
        ):
            first, last = torch.searchsorted(sites, torch.tensor([part.start, part.stop])).tolist()
            at = _sent(sites[first:last] - part.start, device)
            yield part, logits, slice(first, last), at, ids[first:last]

    def _class_gradients(
        self, loss: Tensor, batch: Batch, standing: int, exact: Mapping[str, Tensor], kept: Boundaries | None
    ) -> Tensor:
        """`Losses.exact` of a classifier from its loss, recorded from behind the blocks on."""
        above = self._above(exact)
        if kept is None:
            return with_reaches(gradients_of(loss, above), self.model.state)
        assert kept.output is not None
        found = gradients_of(loss, {**above, "": kept.output})
        gradient = found.pop("")[: standing * batch.input_ids.shape[0]].float()
        return self._with_those_inside(found, gradient, batch, standing, exact, kept)

    def _label_gradients(
        self,
        output: Any,
        hidden: Tensor,
        batch: Batch,
        weights: Tensor,
        exact: Mapping[str, Tensor],
        kept: Boundaries | None,
    ) -> Tensor:
        """`Losses.exact`: the head is run once more at theta, with gradients for what is beside its matrix.

        hidden: the trunk's, recorded from behind the blocks on. weights: d loss / d log-probability of every
        scored token, (standing, scored) on the host. Without a base branch both points of the first pair
        stand for theta, which is off by O(mu^2).
        """
        above, standing = self._above(exact), len(weights)
        if above and batch.loss != "choice":
            raise UserError(
                f"--head: exact has rows for labels, but the loss is {batch.loss!r}, not 'choice'"
            )
        of_hidden = None if kept is None else torch.zeros_like(hidden[:standing])
        found = self._head_gradients(output, hidden.detach(), batch, weights, above, of_hidden)
        if kept is None:
            return with_reaches(found, self.model.state)
        assert kept.output is not None
        with torch.enable_grad():
            at_theta = hidden[:standing]
        (gradient,) = torch.autograd.grad(at_theta, kept.output, of_hidden)
        gradient = gradient[: standing * batch.input_ids.shape[0]]
        return self._with_those_inside(found, gradient, batch, standing, exact, kept)

    def _head_gradients(
        self,
        output: Any,
        hidden: Tensor,
        batch: Batch,
        weights: Tensor,
        above: Mapping[str, Tensor],
        of_hidden: Tensor | None,
    ) -> dict[str, Tensor]:
        """Gradients of what is in the head; that of the hidden states at theta is added to `of_hidden`."""
        state, order = self.model.state, torch.argsort(batch.token_site)
        weights = _sent(weights[:, order], hidden.device)
        limit = max(1, LOGITS_BYTES >> (self.model.chunk_halvings + RECORDED_HALVINGS))
        found: dict[str, Tensor] = {}
        for branch, own in enumerate(weights):
            leaf = hidden[branch : branch + 1].detach()
            wanted = dict(above) if of_hidden is None else {**above, "": leaf}
            with state.one_branch(), recorded(wanted):
                for _, logits, tokens, at, ids in self._at_tokens(output, leaf, batch, order, limit):
                    of_logits = _through_softmax(logits[0].detach(), at, ids, own[tokens])
                    gradients = gradients_of(logits[0], wanted, of_logits)
                    if of_hidden is not None:
                        of_hidden[branch] += gradients.pop("")[0]
                    for name, value in gradients.items():
                        found[name] = found[name] + value if name in found else value
        return found

    def _above(self, exact: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parameters that are not inside the blocks."""
        return {name: value for name, value in exact.items() if self.model.block_of(name) is None}

    def _with_those_inside(
        self,
        found: dict[str, Tensor],
        gradient: Tensor,
        batch: Batch,
        standing: int,
        exact: Mapping[str, Tensor],
        kept: Boundaries,
    ) -> Tensor:
        """`Losses.exact` from the gradients above the blocks, and that of the last block's output."""
        state, inside = self.model.state, {n: value for n, value in exact.items() if n not in found}
        if self.model.leaves_out_padding and not bool(batch.attention_mask.all()):
            state.pad(batch.attention_mask.repeat(standing, 1))
        with state.one_branch(), recorded(inside), torch.no_grad():
            return with_reaches(found | kept.gradients(gradient, inside), state)

    def _offloaded_head(self) -> BranchLinear | None:
        """The head, if its matrix is not on the device."""
        head = head_of(self.model.linears, self.model.trunk_name, self.model.config.vocab_size)
        return head if head is not None and isinstance(head.weight, OffloadedWeight) else None


def _once(work: Callable[[], Result]) -> Result:
    return work()


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """On `device`, without waiting for it."""
    return tensor.to(device, non_blocking=True)


def _through_softmax(logits: Tensor, at: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """The gradient of sum weights * log softmax(logits)[at, ids] with respect to the logits, float32.

    logits: (sites, vocabulary) float32. at, ids, weights (float64): (scored tokens,).
    """
    of_site = torch.zeros(len(logits), dtype=torch.float64, device=logits.device).index_add_(0, at, weights)
    out = torch.empty_like(logits)
    step = max(1, TERMS_BYTES[like(logits.device)] // (8 * logits.shape[-1]))
    for first in range(0, len(logits), step):
        some = slice(first, first + step)
        out[some] = logits[some].double().softmax(-1).mul_(-of_site[some, None])
    return out.index_put_((at, ids), weights.float(), accumulate=True)


def _divergences(log_p: Tensor, branches: Branches) -> Tensor:
    """Along each direction: (branches, sites, vocabulary) -> (directions, sites), float64."""
    plus, minus = sides(_HOST, log_p, branches.compared)
    return divergence_terms(_HOST, plus, minus).sum(-1)
