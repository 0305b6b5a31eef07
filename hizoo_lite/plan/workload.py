"""What a task's examples ask of a pass: rows, positions whose logits are read, tokens, and a cache."""

from __future__ import annotations

from typing import Any, NamedTuple

_FLOAT32 = 4


class Demand(NamedTuple):
    """What one example makes, at most."""

    rows: int = 1  # token sequences
    sites: int = 1  # positions whose logits are read


class Workload(NamedTuple):
    """What the examples of a run make, at most."""

    training: Demand = Demand()
    evaluation: Demand = Demand()
    length: int | None = None  # tokens of the longest row; None if only the limit is known
    examples: int | None = None  # to train on; None if only the limit is known
    tokens: int | None = None  # of all their rows together; None if only the longest is known
    labels: int = 0  # tokens that the answers are made of, if they have rows of the head
    written: int = 0  # tokens of a prompt and its completion, in evaluations that write; 0 if none does
    answered: int = 0  # likewise in steps, whose objective is of a text


#: If nothing is known about the examples.
ONE_ROW = Workload()


def cache_bytes(config: Any, rows: int, length: int) -> int:
    """Keys and values of `rows` sequences of `length` tokens, float32, and one layer's twice: it is copied.

    config: transformers' PretrainedConfig.
    """
    text = config.get_text_config()
    width = int(text.hidden_size)
    heads = getattr(text, "num_attention_heads", None)
    if heads:
        head = getattr(text, "head_dim", None) or width // heads
        width = head * (getattr(text, "num_key_value_heads", None) or heads)
    return 2 * _FLOAT32 * rows * length * width * (int(text.num_hidden_layers) + 1)
