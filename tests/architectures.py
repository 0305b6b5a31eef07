"""Tiny random models of every architecture family that is tested, made and saved on the spot."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification

from hizoo_lite.base import ModelKind

VOCABULARY = 97
MAX_POSITIONS = 64

_AUTO = {
    "causal": AutoModelForCausalLM,
    "masked": AutoModelForMaskedLM,
    "classifier": AutoModelForSequenceClassification,
}


class Tiny(NamedTuple):
    """A configuration class with the arguments that make it tiny, and the kind of head it is tested with."""

    config_class: str
    arguments: dict[str, Any]
    kind: ModelKind

    def config(self, **changes: Any) -> transformers.PretrainedConfig:
        """A fresh configuration, with some arguments changed."""
        return getattr(transformers, self.config_class)(**{**self.arguments, **changes})


_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": MAX_POSITIONS,
    **_TOKENS,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 2}
_HEADS_OF_16 = {**_GROUPED, "head_dim": 16}
_OPT = {k: v for k, v in _COMMON.items() if k != "intermediate_size"}
_GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": MAX_POSITIONS,
    **_TOKENS,
}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

TINY_CONFIGS: dict[str, Tiny] = {
    "llama": Tiny("LlamaConfig", _GROUPED, "causal"),
    "mistral": Tiny("MistralConfig", {**_GROUPED, "sliding_window": 8}, "causal"),
    "qwen2": Tiny("Qwen2Config", {**_GROUPED, "tie_word_embeddings": True}, "causal"),
    "qwen3": Tiny("Qwen3Config", _HEADS_OF_16, "causal"),
    "gemma2": Tiny(
        "Gemma2Config",
        {
            **_HEADS_OF_16,
            "attn_logit_softcapping": 0.5,
            "final_logit_softcapping": 5.0,
            "query_pre_attn_scalar": 16,
            "sliding_window": 8,
        },
        "causal",
    ),
    "phi3": Tiny("Phi3Config", _GROUPED, "causal"),
    "opt": Tiny("OPTConfig", {**_OPT, "ffn_dim": 128, "word_embed_proj_dim": 64, "dropout": 0.0}, "causal"),
    "gpt_neox": Tiny("GPTNeoXConfig", {**_COMMON, "hidden_dropout": 0.0}, "causal"),
    "gpt2": Tiny("GPT2Config", _GPT2, "causal"),
    "roberta": Tiny(
        "RobertaConfig",
        {**_COMMON, **_NO_DROPOUT, "max_position_embeddings": MAX_POSITIONS + 2, "type_vocab_size": 1},
        "masked",
    ),
    "bert": Tiny("BertConfig", {**_COMMON, **_NO_DROPOUT}, "masked"),
}

#: Their blocks are given position biases of shape (rows * heads, 1, length).
ALIBI_CONFIGS: dict[str, Tiny] = {
    "bloom": Tiny(
        "BloomConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 64, "n_layer": 2, "n_head": 4, **_TOKENS},
        "causal",
    ),
    "falcon": Tiny(
        "FalconConfig",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "alibi": True,
            **_TOKENS,
        },
        "causal",
    ),
}

_RELATIVE = {
    **_COMMON,
    **_NO_DROPOUT,
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "max_relative_positions": 24,
}

#: Their blocks apply linears to codes of relative positions too, (1, codes, features).
RELATIVE_CONFIGS: dict[str, Tiny] = {
    "deberta": Tiny("DebertaConfig", _RELATIVE, "masked"),
    "deberta_v2": Tiny(
        "DebertaV2Config",
        {**_RELATIVE, "position_buckets": 24, "share_att_key": True, "norm_rel_ebd": "layer_norm"},
        "masked",
    ),
    "deberta_v2_own_codes": Tiny("DebertaV2Config", {**_RELATIVE, "share_att_key": False}, "masked"),
}

#: Their heads ask the trunk's output for more than hidden states; Gemma 4's blocks share keys and values.
ASKING_CONFIGS: dict[str, Tiny] = {
    "gemma4": Tiny(
        "Gemma4TextConfig",
        {
            **_HEADS_OF_16,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "sliding_window": 8,
            "num_kv_shared_layers": 2,
            "global_head_dim": 16,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 16,
        },
        "causal",
    ),
    "doge": Tiny("DogeConfig", _GROUPED, "causal"),
}

#: The head of its classifier has a norm beside a linear layer.
MODERNBERT = Tiny(
    "ModernBertConfig", {**_COMMON, "bos_token_id": 1, "cls_token_id": 1, "sep_token_id": 2}, "masked"
)


def make_tiny(
    name: str, *, kind: ModelKind | None = None, seed: int = 0, **changes: Any
) -> transformers.PreTrainedModel:
    """A tiny float32 model in eval mode whose parameters depend on `seed` alone.

    Matrices are normal with a standard deviation of 1/sqrt(in_features), embeddings 1, norms and biases
    0.1 around what their layer starts with, so that every parameter matters to the logits.
    """
    tiny = {**TINY_CONFIGS, **ALIBI_CONFIGS, **RELATIVE_CONFIGS, **ASKING_CONFIGS, "modernbert": MODERNBERT}[
        name
    ]
    # transformers 5.17 picks sdpa for Gemma2 by itself, which silently leaves out the cap on the logits
    eager = name in ("bloom", *RELATIVE_CONFIGS) or "attn_logit_softcapping" in tiny.arguments
    model = _AUTO[kind or tiny.kind].from_config(
        tiny.config(**changes), dtype=torch.float32, attn_implementation="eager" if eager else "sdpa"
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                start = 0.0 if path.endswith("bias") or name.startswith("gemma") else 1.0
                parameter.copy_(start + 0.1 * noise)
            else:
                parameter.copy_(noise / math.sqrt(parameter.shape[-1]))
    return model.eval()


def save_tiny(
    name: str,
    folder: Path,
    *,
    kind: ModelKind | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **changes: Any,
) -> transformers.PreTrainedModel:
    """Save a tiny model to `folder` in `dtype`; returns it in float32 with the values that were saved."""
    model = make_tiny(name, kind=kind, seed=seed, **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
    copy.deepcopy(model).to(dtype).save_pretrained(folder)
    return model


def tiny_batch(rows: int = 3, length: int = 12, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Random token ids (rows, length) without special tokens, and a right-padded attention mask."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCABULARY, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, length - 2 * row :] = 0
    return torch.where(mask.bool(), ids, 0), mask
