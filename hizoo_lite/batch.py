"""What travels between tasks and a traversal: examples, batches of tokens, losses, metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from hizoo_lite.arrays import Array


class Batch(NamedTuple):
    """Tokens of one batch and the places where a loss is read.

    A task makes it of numpy arrays; `tensors.batch_tensors` makes torch's of it for a pass.

    A *row* is one token sequence. A *site* is one (row, position) whose logits are needed. A *scored
    token* is a vocabulary entry looked up at a site. A *slot* is one candidate answer of one example:
    its score is the mean log-probability of its scored tokens. Candidates that continue the same prompt
    with one token share a row and a site; others have rows of their own.

    A classifier has one row of class scores for each row: sites and scored tokens are empty.

    Attributes:
        input_ids: (rows, length) int64, padded on the right, on the host like all arrays here.
        attention_mask: (rows, length) int64, 1 where a token is.
        token_type_ids: (rows, length) int64; None if the model has none.
        site_row: (sites,) int64, the row of each site.
        site_position: (sites,) int64, the position whose logits predict the token.
        token_site: (scored,) int64, index into the sites.
        token_id: (scored,) int64, index into the vocabulary.
        token_slot: (scored,) int64, index into the slots.
        slot_example: (slots,) int64, index of the example; slots of one example are adjacent.
        gold: (examples,) int64, index into the slots; of a classifier the class.
        loss: "answer" is the mean negative log-likelihood of the gold slot's tokens; "choice" cross-entropy
            over the example's slots, each scored by its mean token log-probability (as MeZO, 2305.17333,
            trains its classification tasks); "class" cross-entropy over the classifier's logits.
        made_of: the examples, for objectives other than the loss.
        hidden: (rows, length, features) float32, what goes into the first block with anything trained, if it
            is known.
    """

    input_ids: Array
    attention_mask: Array
    token_type_ids: Array | None
    site_row: Array
    site_position: Array
    token_site: Array
    token_id: Array
    token_slot: Array
    slot_example: Array
    gold: Array
    loss: Literal["answer", "choice", "class"]
    made_of: tuple[Example, ...] | None = None
    hidden: Array | None = None

    @property
    def examples(self) -> int:
        """How many examples the batch holds."""
        return len(self.gold)


class Losses(NamedTuple):
    """What one pass returns, on the host.

    Attributes:
        per_example: the loss of each branch and example, (branches, examples) float64.
        scores: mean log-probabilities, (branches, slots); of a classifier its logits, (branches, examples,
            classes).
        divergences: (directions, examples) float64: KL(p || q) + KL(q || p) of the two branches that are
            compared along each direction, of the distribution that the loss is of: "choice" over the
            example's slots, "class" over the classes, "answer" over the vocabulary, there the mean over the
            gold slot's tokens.
        exact: (n,) float64: for each parameter with an exact gradient, in the order of names, the gradient of
            the losses' sum at theta, flat, then its reach as two values: sum |x| over the inputs x that the
            losses depend on, and their number. Their ratio is how far an output moves at most if every value
            moves by one, times what the space makes x larger by (see `LoRADelta`). None if no parameter has
            one.
    """

    per_example: Array
    scores: Array
    divergences: Array
    exact: Array | None = None

    def mean(self) -> Array:
        """The loss of each branch, (branches,)."""
        return self.per_example.mean(1)


class Example(NamedTuple):
    """One example as text, independent of tokenizer and kind of model.

    Attributes:
        fields: named texts for the prompt template, such as {"premise": ..., "hypothesis": ...}.
        answers: the candidate answers (verbalizers); one if an answer is written.
        gold: index of the right one.
        references: the texts that count as right if an answer is written (SQuAD, DROP), else empty.
        group: of examples that are scored together (a question of MultiRC, a query of ReCoRD), else empty.
    """

    fields: Mapping[str, Any]
    answers: Sequence[str]
    gold: int
    references: Sequence[str] = ()
    group: str = ""


class Answered(NamedTuple):
    """What a model was asked, and what it wrote.

    Attributes:
        prompt: as the model has it: of a conversation in the chat template, up to where the answer begins.
        text: the greedy answer, up to the task's stop text; of candidates the one that scores highest.
    """

    prompt: str
    text: str


class Metric(NamedTuple):
    """A task's score of its predictions.

    Attributes:
        name: such as "accuracy", "f1", "exact_match".
        value: in [0, 1].
    """

    name: str
    value: float
