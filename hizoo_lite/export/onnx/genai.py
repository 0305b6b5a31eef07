"""genai_config.json: what onnxruntime-genai wants to know of a causal model.

Whether a text gets its special tokens is no setting of this file: genai's tokenizer adds them where the
program asks for it, `tokenizer.update_options(add_special_tokens="true")`, and then gives the ids of ours.
"""

from __future__ import annotations

from typing import Any

from hizoo_lite.edge.folder import GRAPH
from hizoo_lite.model.model import Model
from hizoo_lite.tasks.tokens import pad_id

GENAI_CONFIG = "genai_config.json"
#: Any decoder with the usual names of inputs and outputs.
_TYPE = "decoder"


def genai_config(model: Model, layers: list[tuple[int, int]]) -> dict[str, Any]:
    """The content of genai_config.json. layers: (heads, features of a head) of the cache."""
    config = model.config.get_text_config()
    generation = getattr(model.module, "generation_config", None)
    heads, features = layers[0]
    context = model.positions or 2048
    ends = getattr(generation, "eos_token_id", None)
    ends = config.eos_token_id if ends is None else ends
    tokenizer = model.tokenizer
    padding = config.pad_token_id if tokenizer is None else pad_id(tokenizer, model.vocabulary)
    return {
        "model": {
            "type": _TYPE,
            "bos_token_id": config.bos_token_id or 0,
            "eos_token_id": 0 if ends is None else ends,
            "pad_token_id": padding or 0,
            "context_length": context,
            "vocab_size": config.vocab_size,
            "decoder": {
                "session_options": {"provider_options": []},
                "filename": GRAPH,
                "head_size": features,
                "hidden_size": config.hidden_size,
                "num_attention_heads": config.num_attention_heads,
                "num_hidden_layers": len(layers),
                "num_key_value_heads": heads,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "do_sample": False,
            "max_length": context,
            "num_beams": 1,
            "past_present_share_buffer": False,
        },
    }
