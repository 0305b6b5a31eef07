"""From an example to tokens and the places where its loss is read, for the three kinds of model.

Causal: the prompt and each answer are tokenized *together*, and the answer's tokens are those after what all
the sequences share with the prompt's own tokens, so that leading spaces and merges over the border are as the
model would see them. MeZO (2305.17333; `encode_prompt` of its code) counts tokens instead, and cuts a long
prompt's beginning; ours cuts the task's text field, so the question and the answer are always whole.

Masked: one site at the mask. Classifier: text or text pair. Special tokens are those the tokenizer adds by
itself; an end-of-sequence token it appends is dropped, except after a completion that has no stop text of its
own, which always gets one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Literal, get_args

from hizoo_lite.base import ModelKind
from hizoo_lite.batch import Batch, Example
from hizoo_lite.errors import UserError
from hizoo_lite.tasks import chat, collate
from hizoo_lite.tasks.collate import Encoded, Loss
from hizoo_lite.tasks.task import WHERE, Task, where
from hizoo_lite.tasks.templates import render
from hizoo_lite.tasks.tokenized import IGNORED
from hizoo_lite.tasks.tokens import (
    Fields,
    Tokenizer,
    check_known,
    common_prefix,
    fit,
    open_ids,
    pad_id,
    spans,
    token_ids,
    usable_length,
    word_id,
)

#: No token of any vocabulary is longer.
_MOST_TOKEN_CHARACTERS = 1024
#: Examples that are encoded to find the tokens of the answers.
_MOST_LOOKED_AT = 64


def _other_kind(task: Task) -> str:
    """What fits a task that does not fit an encoder."""
    if task.kind != "choice":
        return (
            "it is written, which a causal model does; an encoder tells the labels of a classification apart"
        )
    return "use a causal model"


class Encoder:
    """Encodes a task's examples for one tokenizer and one kind of model. Stateless but for its settings.

    Args:
        tokenizer: any Hugging Face tokenizer; it is never changed (see `tokens.pad_id`).
        model_kind: "causal", "masked" or "classifier".
        task: what to encode.
        max_length: the most tokens of a sequence, prompt and answer together.
        loss: "choice" (cross-entropy over the answers' scores; the default of choice tasks, as MeZO's
            train_as_classification) or "answer" (likelihood of the gold answer's tokens; the default of the
            others). Not for classifiers, whose loss is "class".
        order: a classifier's output for each of the task's classes; None if output i is class i.
        vocabulary: how many tokens the model has embeddings for; None checks no token.
        on_cut: told of an example of which a part is left out, because the whole is too long.

    Raises:
        UserError: if task, model kind, tokenizer and loss do not go together.

    Example:
        >>> import hizoo_lite as hz
        >>> from hizoo_lite.batch import Example
        >>> tokenizer = hz.load("embedded", device="cpu").tokenizer
        >>> encoder = hz.tasks.Encoder(tokenizer, "causal", hz.tasks.get("sst2"), max_length=64)
        >>> example = Example({"text": "a joy"}, (" terrible", " great"), gold=1)
        >>> batch = encoder.collate([encoder.encode(example, training=True)])
        >>> batch.examples, batch.loss, batch.gold, batch.slot_example
        (1, 'choice', array([1]), array([0, 0]))
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        model_kind: ModelKind,
        task: Task,
        max_length: int,
        *,
        loss: Literal["choice", "answer"] | None = None,
        order: Sequence[int] | None = None,
        vocabulary: int | None = None,
        on_cut: Callable[[Example], None] = lambda example: None,
    ) -> None:
        self.tokenizer = tokenizer
        self.model_kind = model_kind
        self.task = task
        self.max_length = max_length
        self.loss = self._chosen_loss(loss)
        self.order, self.vocabulary, self.on_cut = order, vocabulary, on_cut
        self.pad_id = pad_id(tokenizer, vocabulary)
        self._check()

    def _chosen_loss(self, loss: Literal["choice", "answer"] | None) -> Loss:
        if self.model_kind == "classifier":
            if loss is not None:
                raise UserError(f"loss: got {loss!r}; a classifier has its own loss, leave it out")
            return "class"
        if loss not in (None, "choice", "answer"):
            raise UserError(f"loss: got {loss!r}; allowed: choice, answer")
        if loss == "choice" and self.task.kind != "choice":
            raise UserError(f"loss: got 'choice', but task {self.task.name} has no answers to choose from")
        return loss or ("choice" if self.task.kind == "choice" else "answer")

    def _check(self) -> None:
        task = self.task
        if self.model_kind not in get_args(ModelKind):
            raise UserError(f"model_kind: got {self.model_kind!r}; allowed: {', '.join(get_args(ModelKind))}")
        usable_length(self.max_length)
        if self.model_kind == "masked" and task.masked is None:
            raise UserError(f"task {task.name}: it has no prompt for a masked model; {_other_kind(task)}")
        if self.model_kind == "masked" and self.tokenizer.mask_token_id is None:
            raise UserError("tokenizer: a masked model needs one with a mask token")
        if task.tokenized and (self.model_kind == "classifier") != (task.num_labels is not None):
            wanted = "one token for each position" if task.num_labels is None else "numbers of classes"
            raise UserError(f"task {task.name}: its labels are {wanted}, but the model is {self.model_kind}")
        if self.model_kind == "classifier" and (task.num_labels is None or task.text is None):
            raise UserError(
                f"task {task.name}: it has no fixed classes for a classifier; {_other_kind(task)}"
            )

    @property
    def parts(self) -> tuple[Encoder, ...]:
        """One for each of the task's parts: itself, see `mixture.MixedEncoder`."""
        return (self,)

    def of(self, example: Example) -> Encoder:
        """The encoder of the task that `example` is of: itself, see `mixture.MixedEncoder`."""
        return self

    @property
    def max_new_tokens(self) -> int:
        """How many tokens a completion may have: the task's, at most half of `max_length`."""
        return min(self.task.max_new_tokens, self.max_length // 2)

    @property
    def stop(self) -> str | None:
        """The text that ends a completion; None if the end-of-sequence token does."""
        return self.task.stop

    def encode(self, example: Example, *, training: bool) -> Encoded:
        """The example as tokens.

        Args:
            example: of the encoder's task.
            training: whether it is trained on; with the loss "answer" the gold answer alone is then scored.

        Raises:
            UserError: naming the example, if it cannot be encoded, or the model lacks one of its tokens.
        """
        encoded = self._encode(example, training)
        self._check_known(example, chain(*encoded.rows, (token for _, token, _ in encoded.tokens)))
        return encoded

    def _encode(self, example: Example, training: bool) -> Encoded:
        if self.task.tokenized:
            return self._tokenized(example)
        if self.model_kind == "classifier":
            return self._classifier(example)
        if self.model_kind == "masked":
            return self._masked(example)
        if self.task.chat:
            return self._chat(example)
        if self.task.kind == "lm":
            return self._text(example)
        return self._causal(example, only_gold=training and self.loss == "answer")

    def label_tokens(self, examples: Sequence[Example], most: int) -> list[int] | None:
        """The tokens that the answers are made of, if the loss is "choice" and all have the same answers.

        Of many examples some are looked at: the tokens of an answer may depend on the text before it, but
        hardly do.

        Args:
            examples: one or more.
            most: of more tokens than these, only those that the answers begin with are returned: what
                follows is mostly certain once a name has begun.

        Returns:
            Indices into the vocabulary, rising; None if the answers are not the same in all examples.
        """
        if self.loss != "choice" or len({tuple(example.answers) for example in examples}) != 1:
            return None
        found = [self.encode(example, training=True).tokens for example in examples[:_MOST_LOOKED_AT]]
        every = {token for tokens in found for _, token, _ in tokens}
        if len(every) <= most:
            return sorted(every)
        first = [{slot: token for _, token, slot in reversed(tokens)} for tokens in found]
        return sorted({token for tokens in first for token in tokens.values()})

    def teaches(self, example: Example) -> bool:
        """Whether `example` has a token to predict: a text of one token alone has none."""
        if self.model_kind != "causal" or self.task.kind != "lm" or self.task.chat or self.task.tokenized:
            return True
        text = render(self.task.causal, example.fields)
        return len(text) > _MOST_TOKEN_CHARACTERS or len(open_ids(self.tokenizer, text)) > 1

    def fits(self, example: Example) -> bool:
        """Whether the whole `example` can surely be encoded: of a conversation, in a third of the time."""
        if self.model_kind != "causal" or not self.task.chat:
            return False
        if example.fields["messages"][0].role == "assistant":
            return False
        text = self._chat_text(example, example.fields["messages"], prompt=False)
        ids = chat.chat_ids(self.tokenizer, text)
        self._check_known(example, ids)
        return len(ids) <= self.max_length

    def divided(self, example: Example) -> list[Example]:
        """The `example`; a text that is too long and of which every token is learnt, as several."""
        field = self.task.cut
        if self.model_kind != "causal" or self.task.chat or self.task.causal != f"{{{field}}}":
            return [example]
        text = str(example.fields[field])
        found: list[Example] = []
        if self.task.kind != "lm" or len(self._ids(example.fields)) <= self.max_length:
            return [example]
        pieces = spans(self.tokenizer, text)
        first = 0
        while first < len(pieces):
            count = min(self.max_length, len(pieces) - first)
            while True:
                last = first + count
                part = text[pieces[first][0] : pieces[last][0] if last < len(pieces) else len(text)]
                beyond = len(self._ids({field: part})) - self.max_length
                if beyond <= 0 or count == 1:
                    break
                count = max(1, count - beyond)
            fields = {**example.fields, field: part, WHERE: f"{where(example)}, piece {len(found) + 1}"}
            found.append(example._replace(fields=fields))
            first += count
        return found

    def collate(self, encoded: Sequence[Encoded]) -> Batch:
        """The batch of `encoded` examples, one or more, padded on the right."""
        return collate.collate(encoded, self.pad_id)

    def prompt_ids(self, example: Example) -> list[int]:
        """The prompt of `example`, for generation; it leaves room for `max_new_tokens` within `max_length`.

        Raises:
            UserError: if the model is not causal, or the example has tokens that it lacks.
        """
        if self.model_kind != "causal":
            raise UserError(f"model_kind: a {self.model_kind} model does not generate")
        text = self._continued(example)
        ids = chat.chat_ids(self.tokenizer, text) if self.task.chat else open_ids(self.tokenizer, text)
        self._check_known(example, ids)
        return ids

    def prompt_text(self, example: Example) -> str:
        """What the model is asked of `example`, as text: what of it fits, without an answer.

        Of a causal model it is what the answer continues, of a conversation in the chat template; of a masked
        one it has the mask; a classifier's second text follows a line break.
        """
        if self.task.tokenized:
            return str(self.tokenizer.decode(example.fields["input_ids"]))
        if self.model_kind == "classifier":
            return "\n".join(self._class_texts(self._class_fields(example)))
        if self.model_kind == "masked":
            return self._masked_text(self._masked_fields(example))
        if self.task.kind == "choice":
            return render(self.task.causal, self._causal_fields(example))
        return self._continued(example)

    def _continued(self, example: Example) -> str:
        """The prompt of a text to write, which leaves room for it."""
        limit = self.max_length - self.max_new_tokens
        if self.task.chat:
            *history, _ = self._conversation(example, limit, answer=False)
            return self._chat_text(example, history, prompt=True)
        fields = self._fit(example, lambda fields: len(self._ids(fields)), limit)
        return render(self.task.causal, fields)

    def _check_known(self, example: Example, ids: Iterable[int]) -> None:
        check_known(self.tokenizer, ids, self.vocabulary, where(example))

    def _ids(self, fields: Fields, answer: str = "") -> list[int]:
        """Tokens of the causal prompt and an answer."""
        ids = open_ids(self.tokenizer, render(self.task.causal, fields) + answer)
        end = self.tokenizer.eos_token_id
        if answer and self.task.kind == "completion" and self.task.stop is None and end is not None:
            return ids if ids[-1] == end else [*ids, end]
        return ids

    def _fit(self, example: Example, length: Callable[[Fields], int], limit: int) -> Fields:
        fields = fit(self.tokenizer, example, self.task.cut, self.task.cut_side, length, limit)
        if fields is not example.fields:
            self.on_cut(example)
        return fields

    def _causal_fields(self, example: Example) -> Fields:
        """Those beside which the longest answer fits."""

        def longest(fields: Fields) -> int:
            return max(len(self._ids(fields, answer)) for answer in example.answers)

        return self._fit(example, longest, self.max_length)

    def _causal(self, example: Example, only_gold: bool) -> Encoded:
        fields = self._causal_fields(example)
        prompt = self._ids(fields)
        candidates = [self._ids(fields, answer) for answer in example.answers]
        start = max(1, min(common_prefix(prompt, candidate) for candidate in candidates))
        short = next((i for i, candidate in enumerate(candidates) if len(candidate) <= start), None)
        if short is not None:
            raise UserError(
                f"{where(example)}: the answer {example.answers[short]!r} adds no token to the prompt"
            )
        chosen = [candidates[example.gold]] if only_gold else candidates
        rows, sites, tokens = collate.score_candidates(chosen, start)
        return Encoded(rows, None, sites, tokens, len(chosen), 0 if only_gold else example.gold, self.loss)

    def _text(self, example: Example) -> Encoded:
        """A loss on every token but the first, which nothing predicts."""
        fields = self._fit(example, lambda fields: len(self._ids(fields)), self.max_length)
        ids = self._ids(fields)
        return self._scored(example, ids, range(1, len(ids)))

    def _chat(self, example: Example) -> Encoded:
        messages = self._conversation(example, self.max_length, answer=True)
        tools = example.fields.get("tools", ())
        return self._scored(example, *chat.assistant_tokens(self.tokenizer, messages, where(example), tools))

    def _chat_text(self, example: Example, messages: Sequence[chat.Message], *, prompt: bool) -> str:
        tools = example.fields.get("tools", ())
        return chat.chat_text(self.tokenizer, messages, prompt, where(example), tools)

    def _tokenized(self, example: Example) -> Encoded:
        ids = example.fields["input_ids"]
        if len(ids) > self.max_length:
            raise UserError(
                f"max_length: {where(example)} has {len(ids)} tokens, allowed are {self.max_length}; raise "
                "max_length or leave the example out"
            )
        if self.model_kind == "classifier":
            types = example.fields.get("token_type_ids")
            return Encoded([ids], None if types is None else [types], [], [], 0, example.gold, "class")
        labels = example.fields["labels"]
        taught = [position for position in range(1, len(ids)) if labels[position] != IGNORED]
        return self._scored(example, ids, taught, labels)

    def _scored(
        self,
        example: Example,
        ids: list[int],
        positions: Sequence[int],
        labels: Sequence[int] | None = None,
    ) -> Encoded:
        """One row, one slot, with a loss on the tokens at these positions, or on other labels there."""
        if not positions:
            raise UserError(f"{where(example)}: the text has no token to learn from")
        sites = [(0, position - 1) for position in positions]
        wanted = ids if labels is None else labels
        tokens = [(site, wanted[position], 0) for site, position in enumerate(positions)]
        return Encoded([ids[:-1]], None, sites, tokens, 1, 0, "answer")

    def _conversation(self, example: Example, limit: int, answer: bool) -> tuple[chat.Message, ...]:
        """The messages that fit: the oldest exchanges are left out, the last one never."""
        messages: tuple[chat.Message, ...] = example.fields["messages"]
        while True:
            part = messages if answer else messages[:-1]
            text = self._chat_text(example, part, prompt=not answer)
            needed = len(chat.chat_ids(self.tokenizer, text))
            if needed <= limit:
                if messages is not example.fields["messages"]:
                    self.on_cut(example)
                return messages
            shorter = chat.shortened(messages)
            if shorter is None:
                raise UserError(
                    f"max_length: {where(example)} needs {needed} tokens for its last exchange, "
                    f"allowed are {limit}; raise max_length or leave the example out"
                )
            messages = shorter

    def _masked_text(self, fields: Fields) -> str:
        return render(str(self.task.masked), {**fields, "mask": str(self.tokenizer.mask_token)})

    def _masked_fields(self, example: Example) -> Fields:
        def length(fields: Fields) -> int:
            return len(token_ids(self.tokenizer, self._masked_text(fields)))

        return self._fit(example, length, self.max_length)

    def _masked(self, example: Example) -> Encoded:
        template, mask = str(self.task.masked), str(self.tokenizer.mask_token)
        fields = self._masked_fields(example)
        text = self._masked_text(fields)
        encoding = self.tokenizer(text, truncation=False, verbose=False)
        ids = list(encoding["input_ids"])
        # The text may hold the mask token by itself: ours is the one after those before it.
        before = render(template.partition("{mask}")[0], fields).count(mask)
        places = [place for place, token in enumerate(ids) if token == self.tokenizer.mask_token_id]
        if len(places) <= before:
            raise UserError(f"{where(example)}: the tokenizer lost the mask of {text!r:.80}")
        words = [word_id(self.tokenizer, answer.strip()) for answer in example.answers]
        tokens = [(0, word, slot) for slot, word in enumerate(words)]
        types = encoding.get("token_type_ids")
        kinds = None if types is None else [list(types)]
        return Encoded([ids], kinds, [(0, places[before])], tokens, len(words), example.gold, self.loss)

    def _class_texts(self, fields: Fields) -> list[str]:
        return [render(t, fields) for t in (self.task.text, self.task.text_pair) if t is not None]

    def _class_fields(self, example: Example) -> Fields:
        def length(fields: Fields) -> int:
            texts = self._class_texts(fields)
            return len(self.tokenizer(*texts, truncation=False, verbose=False)["input_ids"])

        return self._fit(example, length, self.max_length)

    def _classifier(self, example: Example) -> Encoded:
        fields = self._class_fields(example)
        encoding = self.tokenizer(*self._class_texts(fields), truncation=False, verbose=False)
        types = encoding.get("token_type_ids")
        kinds = None if types is None else [list(types)]
        gold = example.gold if self.order is None else self.order[example.gold]
        return Encoded([list(encoding["input_ids"])], kinds, [], [], 0, gold, "class")

    def class_of(self, output: int) -> int:
        """The task's class that the classifier's output number `output` stands for."""
        return output if self.order is None else self.order.index(output)
