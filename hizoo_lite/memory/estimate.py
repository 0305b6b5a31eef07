"""What a pass needs besides the weights: an upper bound, to decide how many blocks may stay on the device."""

from __future__ import annotations

from hizoo_lite.model.linear import TILE_BYTES
from hizoo_lite.model.model import Model
from hizoo_lite.stream.chunks import LEAST_TOKENS
from hizoo_lite.stream.head import LOGITS_BYTES

_FLOAT32 = 4


def pass_bytes(model: Model, rows: int, length: int, branches: int, trainable: int = 0) -> int:
    """Bytes of a traversal of `rows` sequences of `length` tokens in `branches` branches.

    trainable: parameters held in memory; their noise is there for two steps, their directions for one.
    """
    linears = [linear for name, linear in model.linears.items() if model.block_of(name) is not None]
    hidden = int(model.config.get_text_config().hidden_size)
    widest = max((max(linear.in_features, linear.out_features) for linear in linears), default=hidden)
    chunk = -(-rows // branches) if model.branch_chunk == "auto" else min(model.branch_chunk, rows)
    tokens = branches * rows * length
    inside = min(tokens, max(branches * chunk * length, LEAST_TOKENS[model.device.type]))
    compute = model.compute.itemsize
    between = 4 * _FLOAT32 * hidden * tokens  # a block's input and output, the final norm's, the embedding's
    attention = 6 * _FLOAT32 * hidden * inside  # norm, query, key, value, their rotation, result
    mlp = (3 * _FLOAT32 + compute) * widest * inside  # gate, up, their product; operands
    tile = TILE_BYTES[model.device.type] * (2 + inside // max(widest, 1))  # weights, and a tile's product
    logits = 4 * LOGITS_BYTES  # float32, the same in float64, temporaries
    return between + attention + mlp + tile + logits + 5 * _FLOAT32 * trainable
