"""Which linear layers a space trains, and how a model is taken over from the space before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

from hizoo_lite.engine.block import each_block
from hizoo_lite.errors import UserError
from hizoo_lite.model.model import Model

#: Query and value, or the fused layer that holds them, if PEFT has no default.
_ATTENTION_FAMILIES = (
    ("q_proj", "v_proj"),
    ("query", "value"),
    ("qkv_proj",),
    ("query_key_value",),
    ("c_attn",),
)


#: How many of a model's blocks are trained, counted from the top. "auto": a third, see `resolve_targets`.
Blocks = int | Literal["all", "auto"]
#: The share of the blocks that "auto" trains.
AUTO_SHARE = 3


def release(model: Model) -> None:
    """Take every delta off the model, and give its weights the updates that wait for them."""
    if model.pending is not None:
        for _ in each_block(model):
            pass
        model.pending = None
    for linear in model.linears.values():
        linear.delta = None
    restore(model)


def restore(model: Model) -> None:
    """Give parameters that came with an adapter, such as the norm of a head, the model's own values again."""
    for name, value in model.originals.items():
        model.module.get_parameter(name).data.copy_(value)
    model.originals = {}


def resolve_targets(model: Model, targets: str | Sequence[str], blocks: Blocks = "all") -> list[str]:
    """Full names of the linear layers of the top `blocks` that `targets` chooses, in model order.

    "auto" is the top third, all if a name says which block it is of. Directions in the lowest third
    of SmolLM2-135M hold most of the curvature and a fifth of the progress a step: with one direction for all,
    they set the rate of the others (tools/LOG.md). Raises UserError if `targets` chooses nothing.
    """
    inside = [name for name in model.linears if name.startswith(model.block_prefix + ".")]
    chosen = _chosen(model, targets, inside)
    count = 1 + max((_block(model, name) for name in inside), default=0)
    blocks = settled(blocks, targets, count)
    if blocks == count:
        return chosen
    if type(blocks) is not int or not 1 <= blocks <= count:
        raise UserError(f"--blocks: got {blocks!r}, allowed: auto, all, 1 to {count}, those of the model")
    kept = [name for name in chosen if _block(model, name) >= count - blocks]
    for wanted in set(_names(targets)) - {"attention", "all-linear"}:
        if not any(_is_named(name, wanted) for name in kept):
            raise UserError(
                f"--targets: {wanted!r} is not in the top {blocks} of {count} blocks; allowed: --blocks all"
            )
    return kept


def settled(blocks: Blocks, targets: str | Sequence[str], count: int) -> int:
    """How many of a model's `count` blocks `blocks` means for `targets`, which may name some of them."""
    if blocks == "auto":
        return count if names_blocks(targets) else -(-count // AUTO_SHARE)
    return count if blocks == "all" else blocks


def names_blocks(targets: str | Sequence[str]) -> bool:
    """Whether names of layers say which blocks they are in."""
    return any(part.isdigit() for name in _names(targets) for part in name.split("."))


def in_top(model: Model, name: str, blocks: int | Literal["all"]) -> bool:
    """Whether a layer is in one of the top `blocks`."""
    return blocks == "all" or _block(model, name) >= len(model.blocks) - blocks


def _names(targets: str | Sequence[str]) -> list[str]:
    return [name.strip() for name in targets.split(",")] if isinstance(targets, str) else list(targets)


def _block(model: Model, name: str) -> int:
    return int(name.removeprefix(model.block_prefix + ".").split(".", 1)[0])


def _chosen(model: Model, targets: str | Sequence[str], inside: Sequence[str]) -> list[str]:
    """The layers of all blocks that `targets` names."""
    if targets == "all-linear":
        return list(inside)
    wanted = _names(targets)
    if wanted == ["attention"]:
        wanted = _attention_names(model.config.model_type, inside)
    unknown = [w for w in wanted if not any(_is_named(n, w) for n in inside)]
    if unknown:
        raise UserError(
            f"--targets: no linear layer named {unknown[0]!r}; "
            f"allowed are attention, all-linear, {_leaves(inside)}"
        )
    return [n for n in inside if any(_is_named(n, w) for w in wanted)]


def _is_named(name: str, wanted: str) -> bool:
    return name == wanted or name.endswith("." + wanted)


def _attention_names(model_type: str, inside: Sequence[str]) -> list[str]:
    """Query and value: PEFT's default layers, else the first family of names that the blocks have."""
    known = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model_type)
    leaves = {name.rsplit(".", 1)[-1] for name in inside}
    for family in [known, *_ATTENTION_FAMILIES] if known else _ATTENTION_FAMILIES:
        if set(family) <= leaves:
            return list(family)
    raise UserError(f"--targets: no default for {model_type!r}; name some of {_leaves(inside)}")


def _leaves(names: Sequence[str]) -> str:
    return ", ".join(sorted({name.rsplit(".", 1)[-1] for name in names}))
