"""A model's tokenizer as a GGUF file holds it: tokens, their kinds, merges, and how a text is cut.

llama.cpp has its own code for each way to cut a text before merging ("pre-tokenizer"), chosen by a name in
the file. The name is found by the tokenizer's own rules, which must be exactly those of `_CUTS`; a
tokenizer with others is refused. Two families: byte-level BPE ("gpt2") and BPE of SentencePiece ("llama"),
whose merges are ordered by the tokens' scores. What Unicode NFC does before (qwen2) llama.cpp leaves out.
"""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any, NamedTuple

from hizoo_lite.errors import UserError
from hizoo_lite.extras import need

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


_GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_BYTES = {**_GPT2, "use_regex": False}
_DIGITS = {"type": "Digits", "individual_digits": True}
#: llama.cpp's name -> normalizer, steps of the pre-tokenizer, whether whole words go before merges.
_CUTS: dict[str, tuple[Any, list[dict[str, Any]], bool]] = {
    "gpt-2": (None, [_GPT2], False),
    "smollm": (None, [_DIGITS, _GPT2], False),
    "llama-bpe": (None, [_split(_WORDS % "{1,3}"), _BYTES], True),
    "qwen2": ({"type": "NFC"}, [_split(_WORDS % ""), _BYTES], False),
}

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_SPACE = "▁"
_SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
_PREFIX = {"type": "Prepend", "prepend": _SPACE}
#: Of a text in which no space is left.
_NO_CUT = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
_SPECIAL = ("bos", "eos", "unk", "sep", "pad", "mask")


class Vocabulary(NamedTuple):
    """What is written of a tokenizer."""

    model: str  # "gpt2" or "llama"
    pre: str
    tokens: list[str]
    types: list[int]  # of gguf.TokenType
    scores: list[float] | None  # of SentencePiece's
    space_prefix: bool | None
    special: Any  # gguf.SpecialVocab: merges, special tokens, chat template


def read(tokenizer: Any, folder: Path, size: int, chat_template: str | None) -> Vocabulary:
    """That of transformers' `tokenizer` in a model's folder, with `size` embeddings.

    chat_template: in place of the tokenizer's own. Raises `UserError` for a tokenizer that llama.cpp would
    give other ids with.
    """
    where = f"--to: got gguf, but the tokenizer in {folder}"
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"{where} is none of the `tokenizers` library")
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    if rules["model"]["type"] != "BPE":
        raise UserError(f"{where} is {rules['model']['type']}; allowed: BPE")
    is_bytes = not rules["model"]["byte_fallback"]
    tokens, types = _tokens(tokenizer, size, where, is_bytes)
    special = _special(tokenizer, folder, size, is_bytes, where)
    if chat_template is not None:
        special.chat_template = chat_template
    if is_bytes:
        return Vocabulary("gpt2", _pre_tokenizer(rules, where), tokens, types, None, None, special)
    scores = _scores(rules, tokens, where)
    return Vocabulary("llama", "default", tokens, types, scores, _space_prefix(rules, where), special)


def write(writer: Any, vocabulary: Vocabulary) -> None:
    """All of it, to a `gguf.GGUFWriter`."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.space_prefix is not None:
        writer.add_add_space_prefix(vocabulary.space_prefix)
    vocabulary.special.add_to_gguf(writer, quiet=True)


def _tokens(tokenizer: Any, size: int, where: str, is_bytes: bool) -> tuple[list[str], list[int]]:
    """Text and kind of every id below `size`; ids without a token are padding."""
    kinds = need("gguf", "gguf", "--to gguf").TokenType
    tokens, types = [f"[PAD{i}]" for i in range(size)], [int(kinds.UNUSED)] * size
    added = tokenizer.added_tokens_decoder
    vocabulary = tokenizer.get_vocab()
    if max(vocabulary.values()) >= size:
        raise UserError(f"{where} has ids up to {max(vocabulary.values())}, the model {size} embeddings")
    for text, number in vocabulary.items():
        kind = kinds.NORMAL
        if number in added:
            kind = kinds.CONTROL if added[number].special else kinds.USER_DEFINED
        if not is_bytes:
            if _BYTE.fullmatch(text):
                kind = kinds.BYTE
            elif number == tokenizer.unk_token_id:
                kind = kinds.UNKNOWN
            elif kind == kinds.USER_DEFINED:
                text = text.replace(_SPACE, " ")  # they are looked for in the text as it is
        tokens[number], types[number] = text, int(kind)
    return tokens, types


def _special(tokenizer: Any, folder: Path, size: int, is_bytes: bool, where: str) -> Any:
    """gguf's own reading of merges, with special tokens and template as transformers has them."""
    gguf = need("gguf", "gguf", "--to gguf")
    logging.getLogger("gguf.vocab").setLevel(logging.ERROR)  # its guesses at what is set below
    special = gguf.SpecialVocab(folder, load_merges=is_bytes, n_vocab=size)
    ids = {kind: getattr(tokenizer, f"{kind}_token_id") for kind in _SPECIAL}
    special.special_token_ids = {kind: number for kind, number in ids.items() if number is not None}
    special.chat_template = tokenizer.chat_template
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    whole = list(tokenizer("a")["input_ids"])
    bos, eos = whole[:1] == [ids["bos"]] != plain[:1], whole[-1:] == [ids["eos"]] != plain[-1:]
    if whole != [ids["bos"]] * bos + plain + [ids["eos"]] * eos:
        raise UserError(f"{where} puts other tokens around a text than its first and last one: {whole}")
    special.add_special_token = {"bos": bos, "eos": eos}
    return special


def _pre_tokenizer(rules: dict[str, Any], where: str) -> str:
    """llama.cpp's name of the way in which a text is cut."""
    found = (_bare(rules["normalizer"]), _steps(rules["pre_tokenizer"]), rules["model"]["ignore_merges"])
    for name, cut in _CUTS.items():
        if found == cut:
            return name
    shown = json.dumps({"normalizer": found[0], "pre_tokenizer": found[1], "ignore_merges": found[2]})
    raise UserError(
        f"{where} cuts a text in a way that is not known here ({shown}); known: {', '.join(_CUTS)}"
    )


def _steps(rule: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The parts of a pre-tokenizer or a normalizer, without what changes no id."""
    if rule is None:
        return []
    parts = rule.get("pretokenizers", rule.get("normalizers")) if rule["type"] == "Sequence" else [rule]
    return [_bare(part) for part in parts or []]


def _bare(rule: dict[str, Any] | None) -> Any:
    return None if rule is None else {key: value for key, value in rule.items() if key != "trim_offsets"}


def _space_prefix(rules: dict[str, Any], where: str) -> bool:
    """Whether a space is put in front of a text. UserError if anything else is done to it."""
    before, cuts = _steps(rules["normalizer"]), _steps(rules["pre_tokenizer"])
    if before == [_PREFIX, _SPACES] and not cuts:
        return True
    if before == [_SPACES] and cuts in ([], [_NO_CUT]):
        return False
    if not before and len(cuts) == 1 and cuts[0]["type"] == "Metaspace" and not cuts[0].get("split", True):
        return cuts[0]["prepend_scheme"] != "never"
    shown = json.dumps({"normalizer": before, "pre_tokenizer": cuts})
    raise UserError(f"{where} prepares a text in a way that llama.cpp does not know: {shown}")


def _scores(rules: dict[str, Any], tokens: list[str], where: str) -> list[float]:
    """SentencePiece's, by which pairs are merged: minus the place of the first merge that makes a token.

    UserError if the order of merges is not one of tokens.
    """
    place: dict[str, int] = {}
    last = ""
    for merge in rules["model"]["merges"]:
        made = "".join(merge.split(" ") if isinstance(merge, str) else merge)
        if made != last and made in place:
            raise UserError(f"{where} merges {made!r} in two places, which SentencePiece's scores cannot say")
        place.setdefault(made, len(place))
        last = made
    return [-float(place[token]) if token in place else 0.0 if len(token) == 1 else -1e6 for token in tokens]
