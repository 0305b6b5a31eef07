"""What travels between tasks and a traversal: examples, batches of tokens, losses, metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from hizoo_lite.arrays import Array


class Batch(NamedTuple):
    """Tokens of one batch and the places where a loss is read. All arrays on the host, int64 if nothing
    else is said.

    A task makes it of numpy arrays; `tensors.batch_tensors` makes torch's of it for a traversal.

    A *row* is one token sequence. A *site* is one (row, position) whose logits are needed. A *scored
    token* is a vocabulary entry looked up at a site. A *slot* is one candidate answer of one example:
    its score is the mean log-probability of its scored tokens. Candidates that continue the same prompt
    with one token share a row and a site; others have rows of their own.

    For a classifier the logits are one row of class scores each, sites and scored tokens are empty,
    and `gold` is the class index.
    """

    input_ids: Array  # (rows, length), right-padded
    attention_mask: Array  # (rows, length), 1 where a token is
    token_type_ids: Array | None  # (rows, length) or None
    site_row: Array  # (sites,)
    site_position: Array  # (sites,) the position whose logits predict the token
    token_site: Array  # (scored,) index into the sites
    token_id: Array  # (scored,) vocabulary index
    token_slot: Array  # (scored,) index into the slots
    slot_example: Array  # (slots,) index of the example; slots of one example are adjacent
    gold: Array  # (examples,) causal / masked: index into slots; classifier: class index
    loss: Literal["answer", "choice", "class"]
    # "answer": mean negative log-likelihood of the gold slot's tokens; "choice": cross-entropy over the
    # example's slots, each scored by its mean token log-probability (MeZO 2305.17333, which trains its
    # classification tasks so); "class": cross-entropy over the classifier's logits.
    made_of: tuple[Example, ...] | None = None  # for who compares points by more than losses
    hidden: Array | None = None
    # (rows, length, features) float32: what goes into the first block with anything trained, if it is known

    @property
    def examples(self) -> int:
        """How many examples the batch holds."""
        return len(self.gold)


class Losses(NamedTuple):
    """What one pass returns, on the host."""

    per_example: Array  # (branches, examples) float64
    scores: Array  # causal, masked: (branches, slots) mean log-probability; classifier: class logits
    divergences: Array
    # (directions, examples) float64: KL(p || q) + KL(q || p) of the two branches that are compared along each
    # direction, of the distribution that the loss is of: "choice" over the example's slots, "class" over the
    # classes, "answer" over the vocabulary, there the mean over the gold slot's tokens.
    exact: Array | None = None
    # float64, (n,): of each parameter with an exact gradient, in the order of names, the gradient of the
    # losses' sum at theta, flat, then its reach, how far an output moves at most if every value moves by one:
    # sum |x| over the inputs x that the losses depend on, and their number. None if no parameter has one.

    def mean(self) -> Array:
        """The loss of each branch, (branches,)."""
        return self.per_example.mean(1)


class Example(NamedTuple):
    """One example as text, independent of tokenizer and kind of model."""

    fields: Mapping[str, Any]  # named texts for the prompt template, e.g. {"premise": ..., "hypothesis": ...}
    answers: Sequence[str]  # candidate answers (verbalizers); one for generation and lm tasks
    gold: int  # index into `answers`
    references: Sequence[str] = ()  # accepted free-text answers (SQuAD, DROP), else empty
    group: str = ""  # examples scored together (MultiRC question, ReCoRD query), else empty


class Metric(NamedTuple):
    """A task's score of its predictions."""

    name: str  # "accuracy", "f1", "exact_match"
    value: float  # in [0, 1]
