"""What a pass needs besides the weights: an upper bound, to decide how many blocks may stay on the device."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from hizoo_lite.model.linear import TILE_BYTES
from hizoo_lite.model.model import Model
from hizoo_lite.stream.chunks import Chunks
from hizoo_lite.stream.head import LOGITS_BYTES

_FLOAT32 = 4


class Widths(NamedTuple):
    """The sizes of a model that its activations have."""

    hidden: int
    widest: int  # the most features that a linear layer of a block takes or gives
    rotary: bool  # queries and keys are rotated into fresh tensors
    compute_bytes: int  # of an element of a product

    @classmethod
    def of(cls, config: Any, linears: Iterable[tuple[int, int]], compute_bytes: int) -> Widths:
        """From transformers' config and the (out, in) shapes of the blocks' linears."""
        text = config.get_text_config()
        rotary = getattr(text, "rope_parameters", None) or getattr(text, "rope_theta", None)
        hidden = int(text.hidden_size)
        return cls(hidden, max((max(s) for s in linears), default=hidden), rotary is not None, compute_bytes)


def pass_bytes(model: Model, rows: int, length: int, branches: int, trainable: int = 0) -> int:
    """Bytes of a traversal of `rows` sequences of `length` tokens in `branches` branches.

    trainable: parameters held in memory; their noise is there for two steps, their directions for one.
    """
    inside = [x.weight.shape for name, x in model.linears.items() if model.block_of(name) is not None]
    widths = Widths.of(model.config, inside, model.compute.itemsize)
    chunks = model.chunks(rows, length, branches)
    return activation_bytes(widths, chunks, rows, length, branches, model.device.type) + (
        5 * _FLOAT32 * trainable
    )


def activation_bytes(
    widths: Widths, chunks: Chunks, rows: int, length: int, branches: int, device_type: str
) -> int:
    """Bytes of the tensors that a traversal makes, at its worst moment."""
    hidden, widest = widths.hidden, widths.widest
    tokens = branches * rows * length
    chunk = branches * min(chunks.rows, rows) * length
    piece = -(-chunk // chunks.slices)  # what goes through the MLP together
    between = 2 * _FLOAT32 * hidden * tokens if chunk < tokens else 0  # a block's whole input and output
    attention = 9 if widths.rotary else 7  # residual, norm, query, key, value, their rotations, two results
    attention_bytes = attention * _FLOAT32 * hidden * chunk
    mlp_bytes = 3 * _FLOAT32 * (hidden * chunk + widest * piece)  # residual, norm, result; gate, up, product
    tile_bytes = TILE_BYTES[device_type]
    tile_height = max(64, tile_bytes // (hidden * widths.compute_bytes))
    operands = widths.compute_bytes * max(hidden * chunk, widest * piece)
    product = widths.compute_bytes * max(min(hidden, tile_height) * chunk, min(widest, tile_height) * piece)
    in_a_block = between + max(attention_bytes, mlp_bytes) + operands + product + tile_bytes
    head = 3 * _FLOAT32 * hidden * tokens + 4 * LOGITS_BYTES  # logits in float32 and float64, temporaries
    return max(in_a_block, head + tile_bytes)
