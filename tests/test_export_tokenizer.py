"""The tokenizer of an export: a device reads the ids that transformers reads from the model's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, BertTokenizer, GPT2Tokenizer

from hizoo_lite.edge.tokenizer import EdgeTokenizer
from hizoo_lite.errors import ExportError
from hizoo_lite.export.onnx.export import export_onnx
from hizoo_lite.export.tokenizer import tokenizer_files, write_tokenizer
from tests.export_fixtures import tuned
from tests.tasks_fixtures import byte_level, word_piece

TEXTS = ("The film was GREAT", " café Über <s>", "It was bad,\n\nit was 12 good")


@pytest.fixture
def words(tmp_path: Path) -> Path:
    """A folder with vocab.txt and settings alone, as BERT's first ones have."""
    vocabulary = word_piece().get_vocab()
    folder = tmp_path / "words"
    folder.mkdir()
    known = [*sorted(vocabulary, key=vocabulary.__getitem__), "GREAT", "The", "café", "cafe"]
    (folder / "vocab.txt").write_text("\n".join(dict.fromkeys(known)) + "\n")
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    return folder


@pytest.fixture
def pieces(tmp_path: Path) -> Path:
    """A folder with vocab.json and merges.txt, as GPT-2's first ones have."""
    backend = json.loads(byte_level().backend_tokenizer.to_str())["model"]
    folder = tmp_path / "pieces"
    folder.mkdir()
    (folder / "vocab.json").write_text(
        json.dumps({**backend["vocab"], "<|endoftext|>": len(backend["vocab"])})
    )
    (folder / "merges.txt").write_text(
        "#version: 0.2\n" + "".join(" ".join(m) + "\n" for m in backend["merges"])
    )
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    return folder


def written(folder: Path, out: Path) -> tuple[Any, EdgeTokenizer]:
    """transformers' tokenizer of the folder, and that of what was written of it."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    out.mkdir()
    write_tokenizer(tokenizer, tokenizer_files(folder), out)
    return tokenizer, EdgeTokenizer(out)


def ids(tokenizer: Any) -> list[list[int]]:
    return [list(tokenizer(text)["input_ids"]) for text in TEXTS]


@pytest.mark.parametrize("kind", ["words", "pieces"])
def test_a_folder_without_tokenizer_json_gets_one(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(kind)
    assert not (folder / "tokenizer.json").exists()
    theirs, ours = written(folder, tmp_path / "out")
    assert ids(ours) == ids(theirs)
    assert ours.eos_token_id == theirs.eos_token_id
    assert ours.mask_token_id == theirs.mask_token_id


@pytest.mark.parametrize("setting", ["do_lower_case", "strip_accents", "add_prefix_space"])
def test_what_the_settings_overrule_is_in_tokenizer_json(
    setting: str, words: Path, pieces: Path, tmp_path: Path
) -> None:
    folder, value = (pieces, True) if setting == "add_prefix_space" else (words, False)
    saved = tmp_path / "saved"
    made = GPT2Tokenizer if folder == pieces else BertTokenizer
    lower = {} if folder == pieces else {"do_lower_case": True}
    made.from_pretrained(folder, **lower).save_pretrained(saved)
    path = saved / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), setting: value}))
    (saved / "config.json").write_text((folder / "config.json").read_text())
    theirs, ours = written(saved, tmp_path / "out")
    assert ids(EdgeTokenizer(saved)) != ids(theirs)
    assert ids(ours) == ids(theirs)


def test_a_sound_tokenizer_is_copied_as_it_is(tmp_path: Path) -> None:
    byte_level(bos=True).save_pretrained(tmp_path / "saved")
    written(tmp_path / "saved", tmp_path / "out")
    for path in (tmp_path / "saved").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_a_tokenizer_that_cannot_be_written_so_is_refused(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.save_pretrained(tmp_path)

    class Shouting(type(tokenizer)):  # type: ignore[misc]
        """Changes texts in Python, where no file says so."""

        def __call__(self, text: str, *more: Any, **options: Any) -> Any:
            return super().__call__(text.upper(), *more, **options)

    tokenizer.__class__ = Shouting
    with pytest.raises(ExportError, match=r"Shouting cannot be exported: .* other token ids for 'The film"):
        write_tokenizer(tokenizer, [], tmp_path)

    class Python:
        """None of the `tokenizers` library."""

        is_fast = False

        def save_pretrained(self, out: Path) -> None:
            (out / "vocab.txt").write_text("a")

    (tmp_path / "out").mkdir()
    with pytest.raises(
        ExportError, match="Python cannot be exported: it is none of the `tokenizers` library"
    ):
        write_tokenizer(Python(), [], tmp_path / "out")


@pytest.mark.grid
def test_an_export_of_a_model_with_a_vocabulary_alone_reads_its_text(words: Path, tmp_path: Path) -> None:
    first, _ = tuned(tmp_path, "bert", "none", vocab_size=1100)
    for path in tokenizer_files(words):
        (tmp_path / "source" / path.name).write_bytes(path.read_bytes())
    export_onnx(first, tmp_path / "onnx", base_bits="none")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "source")
    assert ids(EdgeTokenizer(tmp_path / "onnx")) == ids(theirs)
