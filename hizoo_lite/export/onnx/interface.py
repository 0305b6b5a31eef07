"""What the exported graph takes and gives: tokens, caches of keys and values, adapters, logits.

Names are those of onnxruntime-genai. Positions follow from the attention mask, so that rows may be padded on
either side; an adapter's inputs have defaults that change nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from hizoo_lite.engine.head import head_of
from hizoo_lite.errors import UserError
from hizoo_lite.export.onnx.linear import (
    AdapterDelta,
    HeadDelta,
    InputValues,
    Part,
    lora_inputs,
)
from hizoo_lite.export.onnx.skeleton import Skeleton
from hizoo_lite.export.onnx.trace import Input, following
from hizoo_lite.model.model import Model, first_position
from hizoo_lite.spaces.heads import head_layers

#: Sizes of the example's dynamic dimensions: above 1, and all different.
_BATCH, _LENGTH, _PAST, _RANK = 2, 3, 5, 7


class Interface(NamedTuple):
    """A module to trace, with the skeleton's module as its child `hf`, and what it is called with."""

    wrapper: nn.Module
    inputs: list[Input]
    outputs: list[str]
    layers: list[tuple[int, int]]  # of the cache: (heads, features of a head); empty without one


def interface(model: Model, skeleton: Skeleton, takes_adapters: bool = True) -> Interface:
    """That of the model's kind; `takes_adapters`: on every linear layer of the blocks and the head's."""
    values = InputValues()
    layers = _cache_layers(skeleton) if model.kind == "causal" else []
    adapters = _adapter_inputs(model, skeleton, values) if takes_adapters else []
    names = [given.name for given in adapters]
    if model.kind == "causal":
        total = Input("attention_mask", _ids(_LENGTH + _PAST), {0: "batch", 1: "total_length"})
        tokens = [*_token_inputs(["input_ids"], _LENGTH), total]
        caches = [
            Input(
                f"past_key_values.{index}.{part}",
                torch.zeros(_BATCH, heads, _PAST, features),
                {0: "batch", 2: "past_length"},
            )
            for index, (heads, features) in enumerate(layers)
            for part in ("key", "value")
        ]
        presents = [given.name.replace("past_key_values.", "present.", 1) for given in caches]
        wrapper: nn.Module = _Causal(skeleton.module, values, names)
        return Interface(wrapper, tokens + caches + adapters, ["logits", *presents], layers)
    tokens = _token_inputs(encoder_inputs(model), _LENGTH)
    wrapper = _Encoder(skeleton.module, values, [given.name for given in tokens], names)
    return Interface(wrapper, tokens + adapters, ["logits"], layers)


def encoder_inputs(model: Model) -> list[str]:
    """The token inputs of a masked model or classifier; token types only if there is more than one."""
    typed = "token_type_ids" in inspect.signature(model.module.forward).parameters
    several = typed and getattr(model.config, "type_vocab_size", 0) > 1
    return ["input_ids", "attention_mask", *(["token_type_ids"] if several else [])]


@final
class _Causal(nn.Module):
    """Logits at every position, and the caches grown by them."""

    def __init__(self, hf: nn.Module, inputs: InputValues, adapters: Sequence[str]) -> None:
        super().__init__()
        self.hf, self.inputs, self.adapters = hf, inputs, list(adapters)
        self.takes_positions = "position_ids" in inspect.signature(hf.forward).parameters
        self.first_position = first_position(hf)

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        """given: tokens, attention mask, key and value of every layer, then the adapter inputs."""
        input_ids, attention_mask, *rest = given
        caches = rest[: len(rest) - len(self.adapters)]
        self.inputs.values = dict(zip(self.adapters, rest[len(caches) :], strict=True))
        more: dict[str, Any] = {}
        if self.takes_positions:
            positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
            more["position_ids"] = positions[:, -input_ids.shape[1] :] + self.first_position
        out = self.hf(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=DynamicCache(list(zip(caches[::2], caches[1::2], strict=True))),
            use_cache=True,
            **more,
        )
        grown = [tensor for layer in out.past_key_values.layers for tensor in (layer.keys, layer.values)]
        return out.logits, *grown


@final
class _Encoder(nn.Module):
    """Logits at every position, or of the classes."""

    def __init__(
        self, hf: nn.Module, inputs: InputValues, tokens: Sequence[str], adapters: Sequence[str]
    ) -> None:
        super().__init__()
        self.hf, self.inputs, self.tokens, self.adapters = hf, inputs, list(tokens), list(adapters)

    def forward(self, *given: Tensor) -> tuple[Tensor]:
        """given: the token inputs, then the adapter inputs."""
        count = len(self.tokens)
        self.inputs.values = dict(zip(self.adapters, given[count:], strict=True))
        return (self.hf(**dict(zip(self.tokens, given[:count], strict=True))).logits,)


def _adapter_inputs(model: Model, skeleton: Skeleton, values: InputValues) -> list[Input]:
    """Hang a delta on every layer that an adapter may change; their inputs."""
    found: list[Input] = []
    adapted = [name for name in skeleton.linears if model.block_of(name) is not None]
    head = head_of(model.linears, model.trunk_name, model.config.vocab_size)
    if head is not None and model.kind != "classifier":  # which may have rows for labels
        adapted.append(head.name)
    for number, name in enumerate(adapted):
        skeleton.linears[name].delta = AdapterDelta(values)
        rows, columns = model.linears[name].weight.shape
        a, b = lora_inputs(name)
        found.append(Input(a, torch.zeros(columns, _RANK), {1: f"rank_{number}"}, _nothing(columns, 0)))
        found.append(Input(b, torch.zeros(_RANK, rows), {0: f"rank_{number}"}, _nothing(0, rows)))
    for name in head_layers(model):
        linear = skeleton.linears[name]
        weight, bias = linear.product.parts["weight"], linear.parts.get("bias")
        found.append(Input(f"{name}.weight", torch.zeros(weight.shape), {}, _as_float32(weight)))
        if bias is not None:
            found.append(Input(f"{name}.bias", torch.zeros(bias.shape), {}, bias))
        linear.delta = HeadDelta(values)
    return found


def _nothing(*shape: int) -> Part:
    return Part(shape, torch.float32, lambda: torch.zeros(shape))


def _as_float32(part: Part) -> Part:
    return Part(part.shape, torch.float32, lambda: part.read().float())


def _token_inputs(names: Sequence[str], length: int) -> list[Input]:
    return [Input(name, _ids(length), {0: "batch", 1: "sequence_length"}) for name in names]


def _ids(length: int) -> Tensor:
    return torch.zeros(_BATCH, length, dtype=torch.int64)


@torch.no_grad()
def _cache_layers(skeleton: Skeleton) -> list[tuple[int, int]]:
    """(heads, features of a head) of every layer's keys, as the model itself makes them."""
    with skeleton.mode, following(skeleton.module):
        out = skeleton.module(input_ids=_ids(_LENGTH), use_cache=True)
    cache = getattr(out, "past_key_values", None)
    layers = getattr(cache, "layers", None) or []
    keys = [key for layer in layers if (key := getattr(layer, "keys", None)) is not None and key.ndim == 4]
    if not keys or len(keys) != len(layers):
        name = type(skeleton.module).__name__
        raise UserError(f"{name} keeps no keys and values of its layers; it cannot be exported as causal")
    return [(key.shape[1], key.shape[3]) for key in keys]
