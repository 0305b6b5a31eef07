"""Position codes that depend on a row's length are those of the row alone, whatever is beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import transformers

from hizoo_lite.batch import Batch
from hizoo_lite.branches import Branches
from hizoo_lite.engine.load import load
from hizoo_lite.engine.traversal import Traversal
from hizoo_lite.errors import UserError
from tests.architectures import make_tiny, save_tiny
from tests.batches import reference_losses
from tests.test_branches import FLOAT32_ROUNDING, MU, separate_losses, tuned

ORIGINAL = 16
LENGTHS = (9, 30, 16, 22)
ROPES: dict[str, tuple[str, dict[str, Any]]] = {
    "longrope": (
        "phi3",
        {
            "original_max_position_embeddings": ORIGINAL,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0 + 0.1 * i for i in range(8)],
                "long_factor": [1.0 + 1.5 * i for i in range(8)],
                "original_max_position_embeddings": ORIGINAL,
                "factor": 4.0,
            },
        },
    ),
    "dynamic": (
        "llama",
        {
            "max_position_embeddings": ORIGINAL,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0},
        },
    ),
}


def batch_of(lengths: tuple[int, ...]) -> Batch:
    """Random rows of these lengths; the loss is of every token but the first."""
    generator = np.random.default_rng(3)
    rows = [generator.integers(5, 97, length) for length in (*LENGTHS,)]
    rows = [rows[LENGTHS.index(length)] for length in lengths]
    ids, mask = np.zeros((2, len(rows), max(lengths)), dtype=np.int64)
    for number, row in enumerate(rows):
        ids[number, : len(row)], mask[number, : len(row)] = row, 1
    row, position = torch.from_numpy(mask[:, 1:].copy()).nonzero(as_tuple=True)
    ids, mask = torch.from_numpy(ids), torch.from_numpy(mask)
    sites, examples = torch.arange(len(row)), torch.arange(len(rows))
    tokens = ids[row, position + 1]
    return Batch(ids, mask, None, row, position, sites, tokens, row, examples, examples, "answer")


@pytest.mark.parametrize("chunk", [1, "auto"])
@pytest.mark.parametrize("rope", ROPES)
def test_a_row_has_the_loss_that_it_has_alone(
    rope: str, chunk: int | Literal["auto"], tmp_path: Path
) -> None:
    name, changes = ROPES[rope]
    save_tiny(name, tmp_path, **changes)
    model = load(tmp_path, bits="none", compute_dtype="float32", device="cpu")
    model.branch_chunk = chunk
    traversal, alone = Traversal(model), []
    with torch.no_grad():
        for length in LENGTHS:  # by a fresh model each: dynamic codes depend on what was before
            alone.append(reference_losses(make_tiny(name, **changes), batch_of((length,)))[0])
    for _ in range(2):
        together = traversal.losses(batch_of(LENGTHS)).per_example[0]
        torch.testing.assert_close(together, torch.stack(alone), rtol=0, atol=FLOAT32_ROUNDING)
    short = traversal.losses(batch_of((16, 9))).per_example[0]
    torch.testing.assert_close(short, torch.stack([alone[2], alone[0]]), rtol=0, atol=FLOAT32_ROUNDING)
    space, directions = tuned(model)
    folded = traversal.losses(batch_of(LENGTHS), Branches.of(), MU, directions).per_example
    separate = separate_losses(traversal, space, batch_of(LENGTHS), directions, Branches.of())
    torch.testing.assert_close(folded, separate, rtol=0, atol=FLOAT32_ROUNDING)


@pytest.mark.parametrize("rope", ROPES)
def test_a_prompt_is_continued_as_it_is_alone(rope: str, tmp_path: Path) -> None:
    name, changes = ROPES[rope]
    save_tiny(name, tmp_path, **changes)
    model = load(tmp_path, bits="none", compute_dtype="float32", device="cpu")
    prompts = [batch_of((length,)).input_ids[0].tolist() for length in LENGTHS]
    alone = []
    for prompt in prompts:
        plain = make_tiny(name, **changes)
        plain.generation_config = transformers.GenerationConfig(eos_token_id=2, pad_token_id=0)
        written = plain.generate(torch.tensor([prompt]), max_new_tokens=4, do_sample=False)
        alone.append(written[0, len(prompt) :].tolist())
    assert Traversal(model).write(prompts, 0, 4) == alone


def test_codes_made_inside_of_a_block_are_refused(tmp_path: Path) -> None:
    name, changes = ROPES["longrope"]
    save_tiny(name, tmp_path, **changes)
    model = load(tmp_path, bits="none", compute_dtype="float32", device="cpu")
    rotary = model.module.get_submodule("model.rotary_emb")
    with (
        model.row_positions.of(LENGTHS),
        pytest.raises(UserError, match=r"Phi3RotaryEmbedding makes position codes, .* of 2 of 4 rows"),
    ):
        rotary(torch.zeros(2, 30, 64), position_ids=torch.arange(30).expand(2, -1))


def test_models_without_such_codes_are_left_alone(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    model = load(tmp_path, bits="none", compute_dtype="float32", device="cpu")
    assert model.row_positions.modules == []
    assert not model.row_positions.depend_on(10**6)
