"""A model's tokenizer from its files, with the `tokenizers` library alone.

It gives the ids that transformers' AutoTokenizer gives for the same folder (the tests compare them): special
tokens named in `tokenizer_config.json` or `special_tokens_map.json` are special whatever tokenizer.json says;
which of them stand around a text tokenizer.json alone says; truncation and padding are off. Only what
tasks ask for is here (see `tasks.tokens.Tokenizer`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hizoo_lite.edge.chat import render
from hizoo_lite.errors import UserError
from hizoo_lite.files import read_json

_FILE, _CONFIG, _SPECIAL = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
_TEMPLATE = "chat_template.jinja"
_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_UNLIMITED = int(1e30)  # what transformers says if no length is given
#: transformers' clean-up of decoded WordPiece text, in its order.
_CLEANED = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")


class EdgeTokenizer:
    """The tokenizer of a folder. `token_types`: whether the model takes token type ids."""

    is_fast = True

    def __init__(self, folder: Path, *, token_types: bool = False) -> None:
        """UserError if `tokenizers` is not installed or a file is missing or not valid."""
        self.folder, self._token_types = folder, token_types
        config = read_json(folder / _CONFIG, "a tokenizer's settings") if (folder / _CONFIG).is_file() else {}
        if (folder / _SPECIAL).is_file():
            config = {**read_json(folder / _SPECIAL, "special tokens by name"), **config}
        self._tokens = {name: _text(config.get(name)) for name in _NAMES}
        self._backend = _backend(folder / _FILE)
        try:
            self._add_tokens(config)
            self.model_max_length = int(config.get("model_max_length") or _UNLIMITED)
            self.chat_template = _template(folder, config)
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
            where = f"{folder / _CONFIG}: not a tokenizer's settings"
            raise UserError(f"{where} ({type(error).__name__}: {error})") from error
        wanted = bool(config.get("clean_up_tokenization_spaces"))
        self._cleans = wanted and type(self._backend.model).__name__ != "BPE"

    # ---------------------------------------------------------------------------- special tokens

    @property
    def eos_token(self) -> str | None:
        """The text of the end-of-sequence token, if there is one."""
        return self._tokens["eos_token"]

    @property
    def mask_token(self) -> str | None:
        """The text of the mask, if there is one."""
        return self._tokens["mask_token"]

    @property
    def eos_token_id(self) -> int | None:
        """The id of the end-of-sequence token."""
        return self._id("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        return self._id("pad_token")

    @property
    def unk_token_id(self) -> int | None:
        return self._id("unk_token")

    @property
    def mask_token_id(self) -> int | None:
        return self._id("mask_token")

    # ---------------------------------------------------------------------------- text and ids

    def __call__(
        self,
        text: str,
        pair: str | None = None,
        *,
        add_special_tokens: bool = True,
        return_offsets_mapping: bool = False,
        truncation: bool = False,
        verbose: bool = False,
    ) -> dict[str, Any]:
        """`input_ids`, `token_type_ids` if the model has them, `offset_mapping` if it is asked for."""
        assert not truncation
        pair = pair or None  # transformers takes an empty second text for none
        try:
            encoding = self._backend.encode(text, pair, add_special_tokens=add_special_tokens)
        except Exception as error:  # the library raises nothing more special
            raise UserError(f"{self.folder / _FILE}: cannot read a text ({error})") from error
        found: dict[str, Any] = {"input_ids": encoding.ids}
        if self._token_types:
            found["token_type_ids"] = encoding.type_ids
        if return_offsets_mapping:
            found["offset_mapping"] = encoding.offsets
        return found

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        """The vocabulary's entries."""
        return [self._backend.id_to_token(token) for token in ids]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text of some ids."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        for piece in _CLEANED if self._cleans else ():
            text = text.replace(piece, piece.strip())
        return text

    def batch_decode(self, rows: Sequence[Sequence[int]], skip_special_tokens: bool = False) -> list[str]:
        """The text of every row."""
        return [self.decode(ids, skip_special_tokens) for ids in rows]

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None = None,
        *,
        tokenize: bool,
        add_generation_prompt: bool,
    ) -> str:
        """The conversation as the folder's template writes it."""
        assert self.chat_template is not None
        assert not tokenize
        special = {name: token for name, token in self._tokens.items() if token is not None}
        where = str(self.folder)
        return render(self.chat_template, messages, add_generation_prompt, special, where, tools)

    # ---------------------------------------------------------------------------- inside

    def _id(self, name: str) -> int | None:
        token = self._tokens[name]
        return None if token is None else self._backend.token_to_id(token)

    def _add_tokens(self, config: Mapping[str, Any]) -> None:
        """What the settings name and the vocabulary lacks, or has as an ordinary token."""
        from tokenizers import AddedToken

        known = self._backend.get_added_tokens_decoder()
        listed = config.get("added_tokens_decoder") or {}
        for number, value in sorted((int(key), value) for key, value in listed.items()):
            if number not in known:
                flags = {key: value[key] for key in _ADDED if key in value}
                self._backend.add_tokens([AddedToken(value["content"], **flags)])
        extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
        texts = [*self._tokens.values(), *map(_text, extra.values() if isinstance(extra, dict) else extra)]
        has = {token.content for token in self._backend.get_added_tokens_decoder().values() if token.special}
        new = [text for text in texts if text is not None and text not in has]
        self._backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in new])


_ADDED = ("single_word", "lstrip", "rstrip", "normalized", "special")


def _backend(path: Path) -> Any:
    try:
        from tokenizers import Tokenizer, __version__
    except ImportError as error:
        raise UserError("the `tokenizers` library is not installed; run: pip install tokenizers") from error
    if not path.is_file():
        raise UserError(f"{path}: no such file; allowed: an exported folder, with its tokenizer's files")
    try:
        backend = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more special
        raise UserError(
            f"{path}: not a valid tokenizer for tokenizers {__version__}, which is installed here ({error})"
        ) from error
    backend.no_truncation()
    backend.no_padding()
    return backend


def _text(token: Any) -> str | None:
    """A special token is a text, or an object with its `content`."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return None if token is None else str(token)


def _template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The chat template: a file of its own, a text in the settings, or the one named default of a list."""
    path = folder / _TEMPLATE
    if path.is_file():
        return path.read_text(encoding="utf-8")
    found = config.get("chat_template")
    if isinstance(found, list):
        found = next((entry["template"] for entry in found if entry["name"] == "default"), None)
    return None if found is None else str(found)
