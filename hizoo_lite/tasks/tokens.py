"""A tokenizer as the encoder needs it, whatever its family; it is only read, never changed."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol

from hizoo_lite.batch import Example
from hizoo_lite.config import refuse
from hizoo_lite.errors import UserError
from hizoo_lite.files import is_unicode
from hizoo_lite.tasks.task import where
from hizoo_lite.units import counted

Fields = Mapping[str, Any]


class Tokenizer(Protocol):
    """What tasks need of a tokenizer: any of transformers', or `edge.tokenizer.EdgeTokenizer`."""

    @property
    def eos_token(self) -> str | None: ...

    @property
    def mask_token(self) -> str | None: ...

    @property
    def eos_token_id(self) -> int | None: ...

    @property
    def pad_token_id(self) -> int | None: ...

    @property
    def unk_token_id(self) -> int | None: ...

    @property
    def mask_token_id(self) -> int | None: ...

    @property
    def chat_template(self) -> Any: ...

    @property
    def is_fast(self) -> bool: ...

    @property
    def model_max_length(self) -> int: ...

    def __call__(self, text: str, *pair: Any, **options: Any) -> Any: ...

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = ...) -> str: ...

    def batch_decode(self, rows: Sequence[Sequence[int]], skip_special_tokens: bool = ...) -> list[str]: ...

    def convert_ids_to_tokens(self, ids: Any) -> Any: ...

    def apply_chat_template(
        self, messages: Any, tools: Any = ..., *, tokenize: bool, add_generation_prompt: bool
    ) -> Any: ...


def token_ids(tokenizer: Tokenizer, text: str, special: bool = True) -> list[int]:
    """The ids of a text, with the special tokens that the tokenizer adds by itself if `special`."""
    return list(tokenizer(text, add_special_tokens=special, truncation=False, verbose=False)["input_ids"])


def open_ids(tokenizer: Tokenizer, text: str, special: bool = True) -> list[int]:
    """`token_ids` without an end-of-sequence token that the tokenizer put at the end by itself."""
    ids = token_ids(tokenizer, text, special)
    end = tokenizer.eos_token
    if special and ids and end and ids[-1] == tokenizer.eos_token_id and not text.endswith(end):
        return ids[:-1]
    return ids


def pad_id(tokenizer: Tokenizer, vocabulary: int | None = None) -> int:
    """What rows are padded with: the pad, else end-of-sequence, else unknown token, else 0.

    Padding is on the right under attention mask 0, so that its value never reaches a loss; a tokenizer
    without a pad token is therefore used as it is. `vocabulary`: how many tokens the model knows; a pad token
    that was added behind them counts as none.
    """
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
    return next((token for token in known if token is not None and is_known(token, vocabulary)), 0)


def is_known(token: int, vocabulary: int | None) -> bool:
    """Whether a model with so many tokens has this one; None: it is not known how many."""
    return vocabulary is None or token < vocabulary


def check_known(tokenizer: Tokenizer, ids: Iterable[int], vocabulary: int | None, where: str) -> None:
    """UserError naming the first token that the model has no embedding for; `where` names the text."""
    beyond = next((token for token in ids if not is_known(token, vocabulary)), None)
    if beyond is not None:
        token = tokenizer.convert_ids_to_tokens([beyond])[0]
        raise UserError(
            f"{where}: the token {token!r} has the id {beyond}, but the model's vocabulary has {vocabulary}; "
            "it was added to the tokenizer and not to the model; leave the text out, or take a model "
            "that was resized for this tokenizer"
        )


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many leading tokens two sequences share."""
    length = min(len(first), len(second))
    return next((index for index in range(length) if first[index] != second[index]), length)


def word_id(tokenizer: Tokenizer, word: str) -> int:
    """The one token of a word at a mask.

    LM-BFF's rule: the token of the word behind a space ("Ġgreat" for RoBERTa; WordPiece ignores the space),
    else of the bare word. Raises UserError naming the word if neither is one known token.
    """
    for text in (" " + word, word):
        ids = token_ids(tokenizer, text, special=False)
        if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
            return ids[0]
    pieces = tokenizer.convert_ids_to_tokens(token_ids(tokenizer, " " + word, special=False))
    raise UserError(
        f"answers: the word {word!r} is not one token of this model's vocabulary (it is {pieces}); "
        "a masked model needs answers of one token each"
    )


def usable_length(max_length: int, positions: int | None = None) -> int:
    """Tokens that a sequence may have, of a model with so many positions; UserError if they are under 2."""
    if positions is not None and positions < 2:
        raise UserError(
            f"model: it has positions for {counted(max(positions, 0), 'token')}; allowed: 2 or more"
        )
    if max_length < 2:
        raise UserError(f"max_length: got {max_length}; allowed: 2 or more")
    return max_length if positions is None else min(max_length, positions)


def spans(tokenizer: Tokenizer, text: str) -> list[tuple[int, int]]:
    """(first, last + 1) character of every token, or of every word if the tokenizer has no offsets."""
    if not tokenizer.is_fast:
        return [match.span() for match in re.finditer(r"\S+", text)]
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return [(first, last) for first, last in encoding["offset_mapping"] if last > first]


def fit(
    tokenizer: Tokenizer,
    example: Example,
    cut: str,
    side: Literal["start", "end"],
    length: Callable[[Fields], int],
    limit: int,
) -> Fields:
    """The example's fields with the field `cut` shortened until `length(fields)` is at most `limit`.

    As many tokens go as are too many, from the given end of the field (words in proportion, if the
    tokenizer has no offsets); since tokens can join differently around the cut, this is repeated until the
    whole fits. Nothing but that field changes. UserError naming
    the example if even the empty field does not fit, or if there is no such field.
    """
    fields: Fields = example.fields
    needed = length(fields)
    if needed <= limit:
        return fields
    text = str(fields[cut]) if cut else ""
    pieces = spans(tokenizer, text)
    keep = len(pieces)
    tokens_a_piece = max(1.0, len(token_ids(tokenizer, text, special=False)) / max(1, keep))
    while needed > limit:
        if keep == 0:
            raise UserError(
                f"max_length: {where(example)} needs {needed} tokens"
                + (f" even with an empty {cut!r}" if cut else "")
                + f", allowed are {limit}; raise max_length or leave the example out"
            )
        keep = max(0, keep - max(1, int((needed - limit) / tokens_a_piece)))
        fields = {**fields, cut: _kept(text, pieces, keep, side)}
        needed = length(fields)
    return fields


def _kept(text: str, pieces: Sequence[tuple[int, int]], keep: int, side: Literal["start", "end"]) -> str:
    if keep == 0:
        return ""
    return text[: pieces[keep - 1][1]].rstrip() if side == "end" else text[pieces[-keep][0] :].lstrip()


_MOST_SEED = (1 << 63) - 1  # torch's generators take no larger one


def check_sampling(max_new_tokens: int, temperature: float, top_p: float, seed: int) -> None:
    """UserError naming the flags of the numbers that no text can be written with."""
    refuse(
        [
            f"{flag}: got {got}, allowed: {allowed}"
            for flag, got, valid, allowed in (
                ("--max-new-tokens", max_new_tokens, max_new_tokens >= 1, "a whole number of 1 or more"),
                ("--temperature", temperature, 0 <= temperature < math.inf, "a finite number of 0 or more"),
                ("--top-p", top_p, 0 < top_p <= 1, "a number above 0, at most 1"),
                ("--seed", seed, 0 <= seed <= _MOST_SEED, f"a whole number from 0 to {_MOST_SEED}"),
            )
            if not valid
        ]
    )


def prompt_ids(
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    positions: int | None = None,
    vocabulary: int | None = None,
    special: bool = True,
) -> list[int]:
    """The tokens of a prompt, with the special tokens that the tokenizer adds by itself if `special`.

    UserError if there are none, more than the model has positions for, or others than it knows.
    """
    if not is_unicode(prompt):
        raise UserError(f"--prompt: got {prompt!r:.80}, which has half of a character; allowed: UTF-8 text")
    ids = open_ids(tokenizer, prompt, special)
    if not ids:
        raise UserError("--prompt: got no token to begin with; allowed: a text that is not empty")
    check_known(tokenizer, ids, vocabulary, "--prompt")
    if positions is not None and len(ids) + max_new_tokens > positions:
        raise UserError(
            f"--max-new-tokens: got {max_new_tokens} after a prompt of {len(ids)} tokens; "
            f"allowed: {positions} tokens in all, the model's positions"
        )
    return ids
