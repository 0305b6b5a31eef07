"""Which models llama.cpp computes as transformers does, and what a GGUF file says of them.

One line for each model type. Names of tensors and keys are the `gguf` package's. What llama.cpp computes in
one way only (activations, gemma2's attention scale, RoPE) is compared with the model's configuration; a
model that asks for another way is refused. Two things differ from the Hugging Face checkpoints:

- llama.cpp rotates neighbouring pairs of a head of LLAMA's, transformers one half against the other: the rows
  of queries and keys are put in that order (`permute` of llama.cpp's converter).
- gemma2 multiplies by 1 + weight in its norms, llama.cpp by what is stored.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hizoo_lite.errors import UserError
from hizoo_lite.extras import need


class Architecture(NamedTuple):
    """A model type of transformers as llama.cpp knows it."""

    name: str  # of gguf.MODEL_ARCH
    activation: str  # the only one that llama.cpp computes
    biases: tuple[str, ...]  # settings of the configuration that may add some
    ropes: tuple[str, ...] = ()
    permuted: bool = False
    norm_offset: float = 0.0
    tied_only: bool = False  # its head is the embeddings, always


_LLAMA = Architecture(
    "LLAMA", "silu", ("attention_bias", "mlp_bias"), ("default", "linear", "llama3"), permuted=True
)
ARCHITECTURES: dict[str, Architecture] = {
    "llama": _LLAMA,  # SmolLM2, too
    "mistral": _LLAMA,
    "qwen2": Architecture("QWEN2", "silu", (), ("default", "linear")),
    "qwen3": Architecture("QWEN3", "silu", (), ("default", "linear")),
    "gemma2": Architecture("GEMMA2", "gelu_pytorch_tanh", (), ("default",), norm_offset=1.0, tied_only=True),
    "gpt2": Architecture("GPT2", "gelu_new", ()),
}

#: Layers, by which llama.cpp tells Gemma 2 27B, whose scores are scaled by hidden size / heads.
_GEMMA2_27B_LAYERS = 46


def find(config: Any) -> Architecture:
    """That of a causal model. UserError for others, and for settings that llama.cpp does not compute."""
    model_type = config.model_type
    if model_type not in ARCHITECTURES:
        raise UserError(f"--to: got gguf for a {model_type} model; allowed: {', '.join(ARCHITECTURES)}")
    architecture = ARCHITECTURES[model_type]
    for field, got, allowed in _settings(config, architecture):
        if got not in allowed:
            raise UserError(
                f"--to: got gguf for a {model_type} model with {field} {got!r}; llama.cpp computes it with "
                f"{' or '.join(map(repr, allowed))} only; allowed: --to merged, onnx"
            )
    return architecture


def _settings(config: Any, architecture: Architecture) -> list[tuple[str, Any, tuple[Any, ...]]]:
    """What must be as llama.cpp has it: field, value, allowed ones."""
    names = ("hidden_activation", "activation_function", "hidden_act")  # gemma2 has the last in vain
    activation = next(name for name in names if getattr(config, name, None) is not None)
    found: list[tuple[str, Any, tuple[Any, ...]]] = [
        (activation, getattr(config, activation), (architecture.activation,))
    ]
    for bias in ("attention_bias", "mlp_bias"):
        if bias not in architecture.biases:
            found.append((bias, bool(getattr(config, bias, False)), (False,)))
    if architecture.ropes:
        found.append(("rope_type", _rope(config).get("rope_type"), architecture.ropes))
    if config.model_type == "gpt2":
        found.append(("scale_attn_weights", config.scale_attn_weights, (True,)))
        found.append(("scale_attn_by_inverse_layer_idx", config.scale_attn_by_inverse_layer_idx, (False,)))
        found.append(("add_cross_attention", config.add_cross_attention, (False,)))
    if config.model_type == "gemma2":
        layers = range(config.num_hidden_layers)
        types = ["full_attention" if layer % 2 else "sliding_attention" for layer in layers]
        found.append(("layer_types", config.layer_types, (types,)))
        found.append(("query_pre_attn_scalar", config.query_pre_attn_scalar, (_gemma2_scale(config),)))
        for cap in ("attn_logit_softcapping", "final_logit_softcapping"):
            value = getattr(config, cap)
            found.append((cap, value, ("a number" if value is None else value,)))
    return found


def _gemma2_scale(config: Any) -> int:
    """What llama.cpp divides scores by the root of."""
    if config.num_hidden_layers == _GEMMA2_27B_LAYERS:
        return int(config.hidden_size) // int(config.num_attention_heads)
    return int(config.head_dim)


def _rope(config: Any) -> dict[str, Any]:
    return getattr(config, "rope_parameters", None) or {}


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def context_length(config: Any) -> int:
    """Positions at which the two compute the same: not beyond a window that llama.cpp has not."""
    length = int(config.max_position_embeddings)
    window = getattr(config, "sliding_window", None)
    slides = config.model_type == "mistral" or "sliding_attention" in (
        getattr(config, "layer_types", None) or ()
    )
    if config.model_type != "gemma2" and window is not None and slides:
        return min(length, int(window))
    return length


def write_parameters(writer: Any, config: Any, architecture: Architecture) -> None:
    """The keys of the architecture, to a `gguf.GGUFWriter`."""
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(context_length(config))
    writer.add_embedding_length(config.hidden_size)
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
    writer.add_feed_forward_length(inner or 4 * config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    if not architecture.ropes:  # GPT-2
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(_head_dim(config))
    writer.add_value_length(_head_dim(config))
    writer.add_rope_dimension_count(_head_dim(config))
    rope = _rope(config)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(need("gguf", "gguf", "--to gguf").RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if config.model_type == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
        writer.add_sliding_window(config.sliding_window)


def rope_factors(config: Any) -> np.ndarray | None:
    """By what llama.cpp divides each frequency, float32 (head_dim / 2,); None if it divides by 1.

    Those of Llama 3.1 (rope type llama3), from the frequencies that transformers computes.
    """
    rope = _rope(config)
    if rope.get("rope_type") != "llama3":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    size = _head_dim(config)
    powers = torch.arange(0, size, 2, dtype=torch.float64) / size
    factors = float(rope["rope_theta"]) ** -powers / scaled.double()
    return factors.float().numpy()


class Names:
    """What llama.cpp calls a model's tensors, and the order of their rows there."""

    def __init__(self, config: Any, architecture: Architecture) -> None:
        gguf = need("gguf", "gguf", "--to gguf")
        self._map = gguf.get_tensor_name_map(
            gguf.MODEL_ARCH[architecture.name], int(config.num_hidden_layers)
        )
        self._config, self._permuted = config, architecture.permuted

    def of(self, name: str) -> str:
        """llama.cpp's name of a parameter. UserError for one that it has no place for."""
        found = self._map.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise UserError(
                f"--to: got gguf, but llama.cpp has no place for {name} of a {self._config.model_type} model"
            )
        return str(found)

    def rows(self, name: str) -> np.ndarray | None:
        """Which row of a parameter (name of the module tree) goes to each place; None if all stay."""
        layer = name.rpartition(".")[0].rpartition(".")[2]
        if not self._permuted or layer not in ("q_proj", "k_proj"):
            return None
        config = self._config
        heads = config.num_attention_heads if layer == "q_proj" else config.num_key_value_heads
        order = np.arange(heads * _head_dim(config)).reshape(heads, 2, -1)
        return order.swapaxes(1, 2).reshape(-1)
