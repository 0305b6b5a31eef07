"""Encoding: joint tokenization, shared rows, truncation, masked models, classifiers."""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from hizoo_lite import tasks
from hizoo_lite.batch import Batch, Example, Losses
from hizoo_lite.errors import UserError
from hizoo_lite.tasks import Encoder
from hizoo_lite.tasks.collate import collate
from hizoo_lite.tasks.order import output_order
from hizoo_lite.tasks.task import WHERE
from hizoo_lite.tasks.templates import render
from hizoo_lite.tasks.tokens import pad_id
from hizoo_lite.tensors import batch_tensors
from hizoo_lite.train.evaluate import evaluate
from tests.tasks_fixtures import (
    answer_text,
    byte_level,
    check_consistent,
    data,
    llama,
    model_folder,
    sequence,
    word_piece,
)

SST2 = tasks.get("sst2")
SQUAD = tasks.get("squad")


def sst2(text: str, gold: int = 1) -> Example:
    return Example({WHERE: "train.tsv:7", "text": text}, (" terrible", " great"), gold)


def squad(context: str, question: str = "Who won?", answer: str = "Ann") -> Example:
    fields = {WHERE: "train.json:1", "title": "T", "context": context, "question": question}
    return Example(fields, (f" {answer}\n",), 0, (answer,))


REAL = ["sst2", "rte", "cb", "boolq", "wsc", "snli"]


@pytest.mark.parametrize("name", [*REAL, "squad"])
def test_real_data_encodes_for_a_causal_model_within_the_limit(name):
    task, tokenizer = tasks.get(name), llama()
    examples = task.load(data("xquad" if name == "squad" else name), "train")[:40]
    encoder = Encoder(tokenizer, "causal", task, 400)
    encoded = [encoder.encode(example, training=True) for example in examples]
    for example, tokens in zip(examples, encoded, strict=True):
        check_consistent(tokens)
        assert all(len(sequence(tokens, slot)) <= 400 for slot in range(tokens.slots))
        assert answer_text(tokenizer, tokens, tokens.gold).strip() == example.answers[example.gold].strip()
    assert encoder.collate(encoded[:4]).examples == 4


def test_sequence_of_prompt_and_answer_equals_joint_tokenization():
    tokenizer = llama()
    encoded = Encoder(tokenizer, "causal", SST2, 64).encode(sst2("a fine film ."), training=True)
    for slot, word in enumerate((" terrible", " great")):
        assert sequence(encoded, slot) == tokenizer(f"a fine film . It was{word}")["input_ids"]


def test_first_token_of_a_row_is_the_tokenizers_own_bos():
    tokenizer = llama()
    encoded = Encoder(tokenizer, "causal", SST2, 64).encode(sst2("good"), training=True)
    assert all(row[0] == tokenizer.bos_token_id for row in encoded.rows)
    plain = Encoder(byte_level(), "causal", SST2, 64).encode(sst2("good"), training=True)
    assert all(row[0] != 0 for row in plain.rows)


def test_one_token_candidates_share_a_row_and_a_site():
    encoded = Encoder(byte_level(), "causal", SST2, 64).encode(sst2("It was"), training=True)
    assert len(encoded.rows) == len(encoded.sites) == 1
    assert encoded.slots == len(encoded.tokens) == 2
    assert encoded.sites[0] == (0, len(encoded.rows[0]) - 1)


def test_longer_candidates_share_a_row_where_one_begins_the_other():
    example = Example({"text": "x"}, (" good", " good", " good film", " bad film"), 0)
    encoded = Encoder(byte_level(), "causal", SST2, 64).encode(example, training=True)
    check_consistent(encoded)
    assert len(encoded.rows) == 2  # "good" and "good film" share one, "bad film" has its own
    assert encoded.slots == 4


def test_answer_that_merges_with_the_prompt_is_scored_from_the_merge_on():
    tokenizer = byte_level()
    example = Example({"text": "x"}, ("ed", "tastic film"), 1)
    encoded = Encoder(tokenizer, "causal", SST2, 64).encode(example, training=True)
    for slot, word in enumerate(example.answers):
        assert sequence(encoded, slot) == tokenizer(f"x It was{word}")["input_ids"]
        assert answer_text(tokenizer, encoded, slot).endswith(word)


def test_answer_loss_trains_on_the_gold_answer_and_evaluates_all():
    encoder = Encoder(llama(), "causal", SST2, 64, loss="answer")
    train = encoder.encode(sst2("good"), training=True)
    assert (train.slots, train.gold, train.loss) == (1, 0, "answer")
    assert answer_text(llama(), train, 0) == "great"
    evaluated = encoder.encode(sst2("good"), training=False)
    assert (evaluated.slots, evaluated.gold) == (2, 1)


def test_default_losses_are_choice_for_choice_tasks_and_answer_for_others():
    assert Encoder(llama(), "causal", SST2, 64).loss == "choice"
    assert Encoder(llama(), "causal", SQUAD, 64).loss == "answer"
    assert Encoder(llama(), "causal", tasks.get("lm"), 64).loss == "answer"
    assert Encoder(word_piece(), "classifier", SST2, 64).loss == "class"


# -------------------------------------------------------------------------------------- completion


def test_completion_is_scored_with_its_stop_text():
    encoded = Encoder(llama(), "causal", SQUAD, 256).encode(squad("Ann won."), training=True)
    assert answer_text(llama(), encoded, 0) == "Ann\n"


def test_completion_without_a_stop_text_ends_with_the_end_token(tmp_path):
    path = tmp_path / "t.toml"
    path.write_text('name = "t"\nkind = "completion"\nprompt = "Q: {q} A:"\nanswer = " {a}"\n')
    task = tasks.get(path)
    example = Example({"q": "who", "a": "Ann"}, (" Ann",), 0, ("Ann",))
    for tokenizer in (byte_level(eos=True), byte_level(ended=True)):
        encoded = Encoder(tokenizer, "causal", task, 64).encode(example, training=True)
        assert answer_text(tokenizer, encoded, 0) == " Ann</s>"
        assert tokenizer.eos_token_id not in Encoder(tokenizer, "causal", task, 64).prompt_ids(example)


def test_end_token_that_a_tokenizer_appends_is_not_scored_for_choices():
    ended, plain = byte_level(ended=True), byte_level()
    assert ended("x")["input_ids"][-1] == ended.eos_token_id
    encoded = Encoder(ended, "causal", SST2, 64).encode(sst2("x"), training=True)
    assert encoded == Encoder(plain, "causal", SST2, 64).encode(sst2("x"), training=True)


def test_prompt_ids_are_the_prompt_and_leave_room_for_the_completion():
    tokenizer = llama()
    encoder = Encoder(tokenizer, "causal", SQUAD, 200)
    short = squad("Ann won.")
    assert encoder.prompt_ids(short) == tokenizer(render(SQUAD.causal, short.fields))["input_ids"]
    long = encoder.prompt_ids(squad("Ann won. " * 100))
    assert len(long) + encoder.max_new_tokens <= 200
    assert tokenizer.decode(long).endswith("Question: Who won?\nAnswer:")


def test_max_new_tokens_is_at_most_half_the_limit():
    assert Encoder(llama(), "causal", SQUAD, 512).max_new_tokens == 50
    assert Encoder(llama(), "causal", SQUAD, 60).max_new_tokens == 30
    assert Encoder(llama(), "causal", SQUAD, 60).stop == "\n"


def test_lm_scores_every_token_but_the_first():
    tokenizer = llama()
    example = Example({"text": "Once upon a time"}, ("Once upon a time",), 0)
    encoded = Encoder(tokenizer, "causal", tasks.get("lm"), 64).encode(example, training=True)
    ids = tokenizer("Once upon a time")["input_ids"]
    assert [token for _, token, _ in encoded.tokens] == ids[1:]
    assert encoded.sites == [(0, position) for position in range(len(ids) - 1)]
    assert encoded.rows == [ids[:-1]]


# -------------------------------------------------------------------------------------- truncation

TEXTS = st.text(alphabet=st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=300)


@cache
def tokenizers() -> tuple[Any, ...]:
    return llama(), byte_level(bos=True), byte_level()


@settings(max_examples=60, deadline=None)
@given(text=TEXTS, limit=st.integers(24, 60), which=st.integers(0, 2))
def test_truncation_keeps_the_answer_and_the_limit(text, limit, which):
    tokenizer = tokenizers()[which]
    encoded = Encoder(tokenizer, "causal", SST2, limit).encode(sst2(text), training=True)
    check_consistent(encoded)
    for slot, word in enumerate((" terrible", " great")):
        whole = sequence(encoded, slot)
        assert len(whole) <= limit
        assert tokenizer.decode(whole).endswith(f"It was{word}")
        assert answer_text(tokenizer, encoded, slot).strip() == word.strip()


@settings(max_examples=40, deadline=None)
@given(context=TEXTS, limit=st.integers(120, 200))
def test_truncation_keeps_the_question(context, limit):
    tokenizer = llama()
    encoded = Encoder(tokenizer, "causal", SQUAD, limit).encode(squad(context), training=True)
    assert len(sequence(encoded, 0)) <= limit
    assert tokenizer.decode(sequence(encoded, 0)).endswith("Question: Who won?\nAnswer: Ann\n")


def test_truncation_keeps_the_beginning_of_the_text_and_uses_the_room():
    tokenizer = llama()
    text = " ".join(f"word{number}" for number in range(200))
    encoded = Encoder(tokenizer, "causal", SST2, 100).encode(sst2(text), training=True)
    lengths = [len(sequence(encoded, slot)) for slot in (0, 1)]
    # The cut is at a token; tokens that join anew around it may free a few more.
    assert 95 <= max(lengths) <= 100
    assert tokenizer.decode(sequence(encoded, 1)).startswith("<s> word0 word1")


def test_record_loses_the_beginning_of_its_passage():
    tokenizer, task = byte_level(), tasks.get("record")
    fields = {
        "passage": "start " * 50 + "- last note",
        "query": "@placeholder left",
        "entities": ("Ann", "Bob"),
    }
    example = Example(fields, (" Ann left", " Bob left"), 0, ("Ann",))
    encoded = Encoder(tokenizer, "causal", task, 60).encode(example, training=True)
    assert tokenizer.decode(sequence(encoded, 1)).endswith("start - last note\n- Bob left")


def test_prompt_that_does_not_fit_without_its_text_is_an_error_that_names_the_example():
    with pytest.raises(
        UserError, match=r"max_length: train\.tsv:7 needs \d+ tokens even with an empty 'text'"
    ):
        Encoder(llama(), "causal", SST2, 5).encode(sst2("good"), training=True)


def test_prompt_of_a_task_without_a_cut_field_is_an_error(tmp_path):
    path = tmp_path / "t.toml"
    path.write_text(
        'name = "t"\nkind = "choice"\nprompt = "{a} {b}"\nlabel_field = "l"\n[answers]\nx = " x"\ny = " y"\n'
    )
    example = Example({WHERE: "t.csv:2", "a": "long " * 40, "b": "b"}, (" x", " y"), 0)
    with pytest.raises(UserError, match=r"max_length: t\.csv:2 needs \d+ tokens, allowed are 20"):
        Encoder(byte_level(), "causal", tasks.get(path), 20).encode(example, training=True)


def test_tokenizer_without_offsets_is_cut_at_words():
    class Slow:
        """The byte-level tokenizer as a slow one, which cannot tell offsets."""

        is_fast = False

        def __init__(self) -> None:
            self.inner = byte_level()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def __call__(self, text: str, **options: Any) -> Any:
            assert "return_offsets_mapping" not in options
            return self.inner(text, **options)

    encoded = Encoder(Slow(), "causal", SST2, 40).encode(sst2("some words of text " * 20), training=True)
    text = byte_level().decode(sequence(encoded, 1))
    assert len(sequence(encoded, 1)) <= 40
    assert text.startswith("some words of")
    assert text.endswith(" It was great")


def test_answer_that_adds_no_token_is_an_error():
    example = Example({WHERE: "a.tsv:2", "text": "x"}, ("", " great"), 1)
    with pytest.raises(UserError, match=r"a\.tsv:2: the answer '' adds no token to the prompt"):
        Encoder(llama(), "causal", SST2, 64).encode(example, training=True)


def test_text_of_one_token_is_an_error_for_lm():
    example = Example({WHERE: "a.txt:2", "text": "a"}, ("a",), 0)
    with pytest.raises(UserError, match=r"a\.txt:2: the text has no token to learn from"):
        Encoder(byte_level(), "causal", tasks.get("lm"), 64).encode(example, training=True)


# --------------------------------------------------------------------------- masked and classifier


def test_masked_site_is_the_mask_and_its_tokens_are_the_words():
    tokenizer = word_piece()
    encoded = Encoder(tokenizer, "masked", SST2, 64).encode(sst2("the film"), training=True)
    (row,) = encoded.rows
    assert row == tokenizer("the film It was [MASK].")["input_ids"]
    ((_, place),) = encoded.sites
    assert row[place] == tokenizer.mask_token_id
    words = tokenizer.convert_ids_to_tokens([token for _, token, _ in encoded.tokens])
    assert words == ["terrible", "great"]
    assert encoded.types == [[0] * len(row)]


def test_mask_token_inside_the_text_is_not_taken_for_the_prompts_mask():
    tokenizer = word_piece()
    encoded = Encoder(tokenizer, "masked", SST2, 64).encode(sst2("the [MASK] film"), training=True)
    places = [place for place, token in enumerate(encoded.rows[0]) if token == tokenizer.mask_token_id]
    assert len(places) == 2
    assert encoded.sites == [(0, places[1])]
    first = tasks.get("trec")
    example = Example({"text": "who [MASK]"}, (" Human", " Entity"), 0)
    assert Encoder(tokenizer, "masked", first, 64).encode(example, training=True).sites == [(0, 1)]


def test_masked_truncation_keeps_the_mask():
    tokenizer = word_piece()
    encoded = Encoder(tokenizer, "masked", SST2, 20).encode(sst2("the film was " * 30), training=True)
    assert len(encoded.rows[0]) <= 20
    assert tokenizer.decode(encoded.rows[0]).endswith("it was [MASK] . [SEP]")


def test_verbalizer_of_two_tokens_is_an_error_that_names_the_word():
    example = Example({"text": "x"}, (" terrible", " marvellous"), 0)
    with pytest.raises(UserError, match="the word 'marvellous' is not one token of this model's vocabulary"):
        Encoder(word_piece(), "masked", SST2, 64).encode(example, training=True)


def test_space_is_part_of_a_masked_word_where_the_vocabulary_has_it():
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    encoded = Encoder(tokenizer, "masked", SST2, 64).encode(sst2("x"), training=True)
    words = tokenizer.convert_ids_to_tokens([token for _, token, _ in encoded.tokens])
    assert words == ["Ġterrible", "Ġgreat"]


def test_tokenizer_that_loses_the_mask_is_an_error():
    class Forgetful:
        def __init__(self) -> None:
            self.inner = word_piece()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def __call__(self, text: str, **options: Any) -> Any:
            return self.inner(text.replace("[MASK]", ""), **options)

    with pytest.raises(
        UserError, match=r"train\.tsv:7: the tokenizer lost the mask of 'x It was \[MASK\]\.'"
    ):
        Encoder(Forgetful(), "masked", SST2, 64).encode(sst2("x"), training=True)


def test_classifier_pair_has_token_types_and_the_class_as_gold():
    tokenizer, task = word_piece(), tasks.get("rte")
    example = Example({"premise": "a man is true", "hypothesis": "the film"}, ("Yes", "No"), 1)
    encoded = Encoder(tokenizer, "classifier", task, 64).encode(example, training=True)
    expected = tokenizer("a man is true", "the film")
    assert encoded.rows == [expected["input_ids"]]
    assert encoded.types == [expected["token_type_ids"]]
    assert (encoded.gold, encoded.loss, encoded.slots, encoded.sites) == (1, "class", 0, [])


def test_classifier_truncation_cuts_the_premise_only():
    tokenizer, task = word_piece(), tasks.get("rte")
    example = Example({"premise": "a man is true " * 20, "hypothesis": "the film"}, ("Yes", "No"), 1)
    encoded = Encoder(tokenizer, "classifier", task, 16).encode(example, training=True)
    assert len(encoded.rows[0]) == 16
    assert tokenizer.decode(encoded.rows[0]).endswith("[SEP] the film [SEP]")


# ---------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Encoder(word_piece(), "masked", SQUAD, 64),
            "task squad: it has no prompt for a masked model; it is written, which a causal model does",
        ),
        (
            lambda: Encoder(byte_level(), "masked", SST2, 64),
            "tokenizer: a masked model needs one with a mask",
        ),
        (
            lambda: Encoder(word_piece(), "classifier", tasks.get("copa"), 64),
            "task copa: it has no fixed classes for a classifier",
        ),
        (lambda: Encoder(byte_level(), "causal", SST2, 1), "max_length: got 1; allowed: 2 or more"),
        (lambda: Encoder(byte_level(), "seq", SST2, 64), "model_kind: got 'seq'; allowed: causal, masked"),
        (
            lambda: Encoder(byte_level(), "causal", SQUAD, 64, loss="choice"),
            "got 'choice', but task squad has no answers to choose from",
        ),
        (
            lambda: Encoder(byte_level(), "causal", SST2, 64, loss="hinge"),
            "loss: got 'hinge'; allowed: choice, answer",
        ),
        (
            lambda: Encoder(word_piece(), "classifier", SST2, 64, loss="answer"),
            "loss: got 'answer'; a classifier has its own loss",
        ),
        (
            lambda: Encoder(word_piece(), "masked", SST2, 64).prompt_ids(sst2("x")),
            "a masked model does not generate",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_an_error(make, message):
    with pytest.raises(UserError, match=message):
        make()


# ----------------------------------------------------------------------------------------- collate


def test_collate_shifts_rows_sites_and_slots_and_pads_on_the_right():
    encoder = Encoder(byte_level(), "causal", SST2, 64)
    encoded = [encoder.encode(example, training=True) for example in (sst2("x", 1), sst2("a longer text", 0))]
    batch = encoder.collate(encoded)
    assert batch.slot_example.tolist() == [0, 0, 1, 1]
    assert batch.gold.tolist() == [1, 2]
    assert batch.site_row.tolist() == [0, 1]
    short, long = (len(example.rows[0]) for example in encoded)
    assert batch.attention_mask.sum(1).tolist() == [short, long]
    assert batch.input_ids[0, short:].tolist() == [0] * (long - short)
    assert batch.site_position.tolist() == [short - 1, long - 1]
    assert batch.token_site.tolist() == [0, 0, 1, 1]
    assert batch.token_slot.tolist() == [0, 1, 2, 3]
    assert batch.token_type_ids is None
    assert all(t.dtype == np.int64 for t in batch if isinstance(t, np.ndarray))


def test_collated_classifier_has_no_sites_and_class_labels():
    encoder = Encoder(word_piece(), "classifier", SST2, 64)
    batch = encoder.collate([encoder.encode(sst2(text), training=True) for text in ("the film", "a")])
    assert isinstance(batch, Batch)
    assert batch.gold.tolist() == [1, 1]
    assert batch.site_row.shape == batch.token_id.shape == batch.slot_example.shape == (0,)
    assert batch.token_type_ids is not None
    assert batch.token_type_ids.shape == batch.input_ids.shape
    assert batch.input_ids[1, -1] == 0
    assert batch.loss == "class"


def test_collate_refuses_nothing_and_mixed_losses():
    one = Encoder(byte_level(), "causal", SST2, 64).encode(sst2("x"), training=True)
    with pytest.raises(ValueError, match="one or more examples with the same loss"):
        collate([], 0)
    with pytest.raises(ValueError, match="one or more examples with the same loss"):
        collate([one, one._replace(loss="answer")], 0)


def test_slot_scores_of_a_padded_batch_equal_separate_whole_sequences():
    model = AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.float32).eval()
    encoder = Encoder(llama(), "causal", SST2, 64)
    encoded = [encoder.encode(sst2(text), training=True) for text in ("a fine film .", "bad", "so so")]
    batch = batch_tensors(encoder.collate(encoded))
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        log_p = logits[batch.site_row, batch.site_position].log_softmax(-1)
        chosen = log_p[batch.token_site, batch.token_id]
        scores = torch.zeros(len(batch.slot_example)).index_add(0, batch.token_slot, chosen)
        expected = []
        for text, word in product(("a fine film .", "bad", "so so"), (" terrible", " great")):
            ids = llama()(f"{text} It was{word}", return_tensors="pt")["input_ids"]
            start = llama()(f"{text} It was", return_tensors="pt")["input_ids"].shape[1]
            whole = model(input_ids=ids).logits[0].log_softmax(-1)
            expected.append(sum(whole[i - 1, ids[0, i]] for i in range(start, ids.shape[1])))
    # Float32 sums of a few log-probabilities near 10, in another order: 1e-4 is ten times their rounding.
    torch.testing.assert_close(scores, torch.stack(expected), rtol=0, atol=1e-4)


def test_padding_token_is_chosen_without_changing_the_tokenizer():
    tokenizer = byte_level(eos=True)
    encoder = Encoder(tokenizer, "causal", SST2, 64)
    assert encoder.pad_id == tokenizer.eos_token_id
    assert tokenizer.pad_token is None
    assert Encoder(byte_level(), "causal", SST2, 64).pad_id == 0
    assert Encoder(word_piece(), "masked", SST2, 64).pad_id == 0


def test_tokens_behind_the_models_vocabulary_are_named_with_their_example():
    tokenizer = word_piece()
    known = len(tokenizer)
    tokenizer.add_tokens(["lovely"])
    encoder = Encoder(tokenizer, "classifier", SST2, 64, vocabulary=known)
    encoder.encode(sst2("a fine film"), training=True)
    with pytest.raises(UserError, match=rf"train\.tsv:7: the token 'lovely' .* {known}, .* {known};"):
        encoder.encode(sst2("a lovely film"), training=True)
    encoded = Encoder(tokenizer, "classifier", SST2, 64).encode(sst2("a lovely film"), training=True)
    assert known in encoded.rows[0]
    prompts = Encoder(byte_level(eos=True), "causal", tasks.get("squad"), 64, vocabulary=3)
    with pytest.raises(UserError, match=r"train\.json:1: the token .* has the id"):
        prompts.prompt_ids(squad("Ann won."))


def test_a_pad_token_behind_the_models_vocabulary_counts_as_none():
    tokenizer = byte_level(eos=True)
    known = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == known
    assert pad_id(tokenizer) == known
    assert pad_id(tokenizer, known) == tokenizer.eos_token_id
    assert Encoder(tokenizer, "causal", SST2, 64, vocabulary=known).pad_id == tokenizer.eos_token_id


MNLI = tasks.get("mnli")
NLI_OUTPUTS = {0: "CONTRADICTION", 1: "NEUTRAL", 2: "ENTAILMENT"}


@pytest.mark.parametrize(
    ("task", "named", "order"),
    [
        ("mnli", NLI_OUTPUTS, (2, 1, 0)),
        ("mnli", {str(number): name for number, name in NLI_OUTPUTS.items()}, (2, 1, 0)),  # as in JSON
        ("cb", {0: "entailment", 1: "neutral", 2: "contradiction"}, (0, 2, 1)),
        ("rte", {0: "Not Entailment", 1: "entailment"}, (1, 0)),
        ("sst2", {0: "NEGATIVE", 1: "POSITIVE"}, None),
        ("boolq", {0: "True", 1: "False"}, (1, 0)),
        ("mnli", {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}, None),
        ("mnli", {0: "entailment", 1: "neutral"}, None),
        ("mnli", {1: "neutral", 2: "entailment", 3: "contradiction"}, None),
        ("squad", NLI_OUTPUTS, None),
        ("mnli", None, None),
    ],
)
def test_outputs_of_a_classifier_are_found_by_the_names_of_the_classes(task, named, order, caplog):
    assert output_order(tasks.get(task), named) == order
    assert not caplog.text


def test_classes_of_other_names_are_taken_by_number_and_that_is_said(caplog):
    assert output_order(SST2, {0: "toxic", 1: "fine"}) is None
    assert "sst2: its classes are negative, positive, the model calls its own toxic, fine" in caplog.text


class AlwaysRight:
    """A classifier with the outputs of `NLI_OUTPUTS` that is given one example of each class, in order."""

    write = None

    def losses(self, batch: Batch) -> Losses:
        scores = np.zeros((1, 3, 3))
        scores[0, range(3), [2, 1, 0]] = 9.0
        wrong = np.array([[float(gold) for gold in batch.gold != np.array([2, 1, 0])]])
        return Losses(wrong, scores, np.empty((0, 3)))


def test_a_right_classifier_with_another_order_is_right():
    fields = {"premise": "a boy", "hypothesis": "a man"}
    examples = [Example(fields, ("Yes", "Maybe", "No"), gold) for gold in range(3)]
    encoder = Encoder(word_piece(), "classifier", MNLI, 64, order=output_order(MNLI, NLI_OUTPUTS))
    found = evaluate(AlwaysRight(), encoder, examples, 3)
    assert (found.loss, found.predictions, found.metric.value) == (0.0, [0, 1, 2], 1.0)


@pytest.mark.parametrize("name", [name for name in tasks.names() if tasks.get(name).num_labels])
def test_a_task_with_classes_names_them(name):
    assert len(tasks.get(name).labels) == tasks.get(name).num_labels
