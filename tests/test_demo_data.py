"""The embedded demo's files: they load, they fit, and test and training sentences share no template."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import demo_grammar
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "hizoo_lite" / "demo"
TOOL = ROOT / "tools" / "make_demo_model.py"
MAX_BYTES = 8_000_000  # what the wheel may carry


def rows(name: str, folder: Path = DEMO) -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]


def words(sentence: str) -> list[str]:
    return re.findall(r"[a-z']+", sentence.lower())


def ngrams(sentences: list[str], length: int) -> set[tuple[str, ...]]:
    found = set()
    for sentence in sentences:
        tokens = words(sentence)
        found |= {tuple(tokens[i : i + length]) for i in range(len(tokens) - length + 1)}
    return found


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO, local_files_only=True)


def test_demo_files_fit_into_eight_megabytes():
    sizes = {path.name: path.stat().st_size for path in DEMO.iterdir() if path.is_file()}
    assert {
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "train.jsonl",
        "test.jsonl",
        "task.toml",
    } <= set(sizes)
    assert sum(sizes.values()) <= MAX_BYTES, sizes


def test_model_is_a_tied_llama_with_a_hidden_size_of_whole_quantization_blocks():
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.bfloat16, local_files_only=True)
    assert model.config.model_type == "llama"
    assert model.config.hidden_size % 64 == 0
    assert model.config.intermediate_size % 64 == 0
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert 1_000_000 <= sum(p.numel() for p in model.parameters()) <= 5_000_000


def test_tokenizer_reproduces_every_sentence_and_has_its_special_tokens(tokenizer):
    for row in rows("train.jsonl") + rows("test.jsonl"):
        ids = tokenizer(row["sentence"])["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids[1:]) == row["sentence"]
    assert None not in (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)


def test_answers_of_the_task_are_single_tokens(tokenizer):
    task = tomllib.loads((DEMO / "task.toml").read_text(encoding="utf-8"))
    answers = [tokenizer.encode(text, add_special_tokens=False) for text in task["answers"].values()]
    assert [len(ids) for ids in answers] == [1, 1]
    assert answers[0] != answers[1]
    assert set(rows("train.jsonl")[0]) == {"sentence", task["label_field"]}


def test_both_labels_are_equally_frequent_and_no_sentence_is_repeated():
    train, test = rows("train.jsonl"), rows("test.jsonl")
    assert len(train) >= 500
    assert len(test) >= 200
    for part in (train, test):
        assert sum(row["label"] for row in part) * 2 == len(part)
    sentences = [row["sentence"] for row in train + test]
    assert len(set(sentences)) == len(sentences)


def test_training_and_test_sentences_share_no_four_words_in_a_row():
    train = ngrams([row["sentence"] for row in rows("train.jsonl")], 4)
    test = ngrams([row["sentence"] for row in rows("test.jsonl")], 4)
    assert train & test == set()


def test_training_and_test_sentences_share_no_frame():
    """With all that can stand in a slot blanked, no sentence of one set looks like one of the other."""
    lexicon = demo_grammar.lexicon_phrases()
    pattern = re.compile(
        r"\b(?:" + "|".join(sorted(map(re.escape, lexicon), key=len, reverse=True)) + r")\b", re.I
    )

    def frames(name: str) -> set[str]:
        return {re.sub(r"\ban\b", "a", pattern.sub("_", row["sentence"]).lower()) for row in rows(name)}

    assert min(len(frames("train.jsonl")), len(frames("test.jsonl"))) >= 20
    assert frames("train.jsonl") & frames("test.jsonl") == set()


def test_topic_nouns_of_the_test_occur_in_no_training_sentence():
    train = {word for row in rows("train.jsonl") for word in words(row["sentence"])}
    nouns = {noun for topic in demo_grammar.TOPICS.values() for noun in topic.nouns.held_out}
    used = {word for row in rows("test.jsonl") for word in words(row["sentence"])} & nouns
    assert len(used) >= 20
    assert used & train == set()


def test_no_single_word_gives_the_label_away():
    """Whether any one word occurs predicts the label of at most 56 % of the test sentences."""
    test = [(set(words(row["sentence"])), row["label"]) for row in rows("test.jsonl")]
    for word in set().union(*(found for found, _ in test)):
        agree = sum((word in found) == bool(label) for found, label in test) / len(test)
        assert max(agree, 1 - agree) <= 0.56, word


def test_generated_pretraining_text_contains_no_sentence_of_the_task():
    task = {row["sentence"] for row in rows("train.jsonl") + rows("test.jsonl")}
    rng = np.random.default_rng((0, 1))
    text = [demo_grammar.document(rng) for _ in range(20_000)]
    sentences = {sentence for document in text for sentence in re.split(r"(?<=[.!?]) ", document)}
    assert len(sentences) > 10_000
    assert sentences & task == set()


def test_the_same_seed_gives_the_embedded_sentences():
    assert demo_grammar.task_rows(np.random.default_rng((0, 2)), "train", 800) == rows("train.jsonl")
    assert demo_grammar.task_rows(np.random.default_rng((0, 3)), "test", 300) == rows("test.jsonl")


def test_no_artifact_names_a_folder_of_the_machine_that_made_it():
    for path in DEMO.glob("*.*"):
        if path.suffix != ".safetensors":
            assert not re.search(
                r"(?<![\w.])/(tmp|home|work|root|Users)/", path.read_text(encoding="utf-8")
            ), path.name


@pytest.mark.grid
def test_the_tool_makes_a_loadable_model_and_the_same_one_twice(tmp_path: Path):
    """Bitwise on one machine with one thread; five steps are enough to run every part."""
    for name in ("a", "b"):
        command = [sys.executable, str(TOOL), "--out", str(tmp_path / name), "--quick", "--steps", "5"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "parameters" in done.stdout
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b"))
    assert first == second
    assert rows("test.jsonl", tmp_path / "a") == rows("test.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a", local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a", local_files_only=True)
    assert model(**tokenizer("The soup was", return_tensors="pt")).logits.isfinite().all()
