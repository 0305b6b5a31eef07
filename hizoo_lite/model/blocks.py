"""Where the transformer blocks of a Hugging Face model are, without a table of architectures.

The blocks are the outermost ModuleList whose members are all of one class that the model names in
`_no_split_modules`, or that holds a large part of the model's parameters.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from hizoo_lite.errors import UserError

#: A list of layers that is not named in `_no_split_modules` must hold this share of all parameters.
_LARGE_SHARE = 0.2
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def no_linear(module: nn.Module, path: str, shape: tuple[int, ...]) -> UserError:
    """That a parameter of a block, by its name in `module`, is of a kind that has no packed form."""
    layer = module.get_submodule(path.rpartition(".")[0])
    what = (
        "is of a convolution" if isinstance(layer, _CONVOLUTIONS) else "is no linear layer (fused experts?)"
    )
    return UserError(
        f"{type(module).__name__}: {path} {tuple(shape)} {what}; this architecture is not supported"
    )


class Blocks(NamedTuple):
    """The transformer layers and where they hang in the module tree."""

    prefix: str  # e.g. "model.layers"; block i is f"{prefix}.{i}"
    modules: list[nn.Module]


def find_blocks(module: nn.Module) -> Blocks:
    """The transformer blocks of a Hugging Face model, in order.

    Raises `UserError` if no list of layers qualifies.
    """
    named = set(getattr(module, "_no_split_modules", None) or ())
    total = sum(p.numel() for p in module.parameters())
    found: list[tuple[str, nn.ModuleList]] = []
    for name, child in module.named_modules():
        if not isinstance(child, nn.ModuleList) or len(child) == 0 or len({type(m) for m in child}) != 1:
            continue
        if any(name.startswith(outer + ".") for outer, _ in found):
            continue
        share = sum(p.numel() for p in child.parameters()) / max(total, 1)
        if type(child[0]).__name__ in named or share > _LARGE_SHARE:
            found.append((name, child))
    if not found:
        raise UserError(f"model: no list of transformer blocks found in {type(module).__name__}")
    if len(found) > 1:
        names = ", ".join(name for name, _ in found)
        raise UserError(
            f"model: {type(module).__name__} has several stacks of blocks ({names}); "
            "one stack (decoder-only or encoder-only) is supported"
        )
    prefix, layers = found[0]
    return Blocks(prefix, list(layers))
