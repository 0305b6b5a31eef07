"""A model's tokenizer in an export, so that a device reads the ids that the model was tuned with.

On a device there is the `tokenizers` library alone, which reads tokenizer.json. transformers makes a
tokenizer also of vocab.txt, or of vocab.json and merges.txt, and lets tokenizer_config.json overrule
tokenizer.json (do_lower_case, strip_accents, add_prefix_space, what stands around a text).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hizoo_lite.config import TrainConfig
from hizoo_lite.edge.tokenizer import EdgeTokenizer
from hizoo_lite.errors import ExportError, UserError
from hizoo_lite.files import storage_errors, write_text
from hizoo_lite.tasks import chat_templates

_TOKENIZER = "tokenizer.json"
_PATTERNS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "*.spm",
    "*.tiktoken",
    "spiece.model",
)
#: Whatever a setting can change shows in one of them: case, accents, spaces, numbers, lines, other scripts.
_TEXTS = (
    "The film was GREAT.",
    " leading, and  inner \tspace ",
    "Ünïcode Café NAÏVE",
    "1234 5.67 2026-01-31",
    "one line\n\nanother line",
    "it isn't (at all) <s> what [MASK] it's </s>",
    "東京 привет 🙂",
)


def tokenizer_files(base: Path) -> list[Path]:
    """The files of a model folder that its tokenizer is read from."""
    return sorted({path for pattern in _PATTERNS for path in base.glob(pattern) if path.is_file()})


def write_template(settings: TrainConfig | None, out: Path) -> None:
    """The chat template that a run had in place of the tokenizer's own, if it did."""
    if settings is not None and settings.chat_template is not None:
        with storage_errors(out):
            write_text(out / chat_templates.FILE, chat_templates.read(settings.chat_template))


def write_tokenizer(tokenizer: Any | None, files: Iterable[Path], out: Path) -> None:
    """Copy `files` to `out`, and see that the ids read there are those of transformers' `tokenizer`.

    tokenizer.json is written from the tokenizer itself if there is none, or if it gives other ids.
    None for a model without one: nothing is compared. Raises `ExportError`, naming a text, if the ids
    differ all the same.
    """
    with storage_errors(out):
        for path in files:
            shutil.copyfile(path, out / path.name)
        if tokenizer is None:
            return
        if not (out / _TOKENIZER).is_file():
            tokenizer.save_pretrained(out)
        elif _other_ids(tokenizer, out) is not None and tokenizer.is_fast:
            write_text(out / _TOKENIZER, tokenizer.backend_tokenizer.to_str(pretty=True))
    if not (out / _TOKENIZER).is_file():
        raise ExportError(
            f"{type(tokenizer).__name__} cannot be exported: it is none of the `tokenizers` library, which "
            f"reads {_TOKENIZER} on a device"
        )
    text = _other_ids(tokenizer, out)
    if text is not None:
        raise ExportError(
            f"{type(tokenizer).__name__} cannot be exported: {_TOKENIZER} alone gives other token ids for "
            f"{text!r} than transformers with the model's tokenizer_config.json"
        )


def _other_ids(tokenizer: Any, out: Path) -> str | None:
    """A text whose ids in `out` are others; None if there is none."""
    written = EdgeTokenizer(out)
    special = f"a {' b '.join(tokenizer.all_special_tokens)} c"
    for text in (*_TEXTS, special):
        if _ids(tokenizer, text) != _ids(written, text):
            return text
        if _ids(tokenizer, text, _TEXTS[0]) != _ids(written, text, _TEXTS[0]):
            return f"{text} + {_TEXTS[0]}"
    return None


def _ids(tokenizer: Any, *texts: str) -> list[int] | None:
    """None for a text that it has no tokens for."""
    try:
        return list(tokenizer(*texts, verbose=False)["input_ids"])
    except UserError:
        return None
    except Exception as error:
        if type(error) is not Exception:  # what the `tokenizers` library raises
            raise
        return None
