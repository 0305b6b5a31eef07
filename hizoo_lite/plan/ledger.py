"""Every byte of a run has a category: predicted by the planner, and counted on live objects here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hizoo_lite.base import Curvature, Space
from hizoo_lite.device import like
from hizoo_lite.engine.residency import Streamed
from hizoo_lite.engine.storage import DiskSource, HostSource
from hizoo_lite.model.model import Model
from hizoo_lite.optimizers.exact import ExactAdam

#: Who owns memory, and what that is.
CATEGORIES: Mapping[str, str] = {
    "framework": "interpreter and libraries; on a GPU its context",
    "embeddings_and_head": "embeddings, heads, poolers",
    "block_slots": "two buffers that streamed blocks pass through",
    "resident_blocks": "packed linears of the blocks that stay",
    "small_parameters": "norms, biases, code tables, buffers",
    "adapters": "trainable tensors in memory",
    "curvature": "state of Sigma",
    "moments": "of parameters with exact gradients, two each",
    "noise": "z of two steps, directions of one",
    "scratch": "reused buffers: weight tile, operands, product",
    "between_blocks": "embeddings, inputs and outputs of blocks, masks",
    "batch_states": "hidden states of a batch, as they are kept",
    "boundaries": "inputs of blocks whose gradients are to come",
    "attention": "inside of attention",
    "mlp": "inside of the MLP",
    "logits": "hidden states at labels, logits, log-probabilities",
    "update": "temporaries of an update of weights",
    "loading": "buffers of checksums and of one tensor while loading",
    "cache": "keys and values, while an evaluation writes",
    "heap": "freed memory that the allocator keeps",
    "prefetch_buffers": "page-locked buffers between disk and device",
    "pinned_host": "blocks and large matrices in host memory",
    "changed_blocks": "file of changed blocks",
    "hidden_states": "file of the training examples' hidden states below the first trained block",
}
_ON_DISK = ("changed_blocks", "hidden_states")


@dataclass(frozen=True)
class Ledger:
    """Bytes by category. On a CPU there is one memory, called device; `host` is empty."""

    device: Mapping[str, int] = field(default_factory=dict)
    host: Mapping[str, int] = field(default_factory=dict)
    disk: Mapping[str, int] = field(default_factory=dict)

    @property
    def device_bytes(self) -> int:
        """Of all categories."""
        return sum(self.device.values())

    @property
    def host_bytes(self) -> int:
        """Of all categories."""
        return sum(self.host.values())

    def to_json(self) -> dict[str, dict[str, int]]:
        """Categories that hold something."""
        return {
            place: {k: v for k, v in getattr(self, place).items() if v}
            for place in ("device", "host", "disk")
        }


def measure(model: Model, space: Space, curvature: Curvature, exact: ExactAdam | None = None) -> Ledger:
    """What the live objects of a run hold now: the bytes of their tensors, shared memory counted once.

    What lives only inside of a step (activations, noise of one) and what no tensor holds (framework, heap)
    is not there to be counted.
    """
    count = _Count()
    found = dict.fromkeys(CATEGORIES, 0)
    if isinstance(model.residency, Streamed):
        found["block_slots"] = count.tensors(model.residency._slots)
        found["resident_blocks"] = count.tensors(model.residency._kept.values())
        found["pinned_host"] = _in_host_memory(model, count)
        found["prefetch_buffers"] = count.tensors(getattr(model.residency._fetcher, "_staging", ()))
        found["changed_blocks"] = _changed_bytes(model)
    for category, size in _held(model, space, count).items():
        found[category] += size
    found["scratch"] = count.tensors(model.scratch._buffers.values())
    found["curvature"] = count.tensors(_tensors_of(_state(curvature)))
    found["moments"] = 0 if exact is None else count.tensors(exact.moments)
    return _placed(found, like(model.device))


def held(model: Model, space: Space) -> dict[str, int]:
    """The same of a model on the meta device, whose tensors have none: what a space and all weights would."""
    return _held(model, space, _Count(meta=True))


def _held(model: Model, space: Space, count: _Count) -> dict[str, int]:
    stored = [
        s.tensor for n, x in model.linears.items() if model.block_of(n) is not None for s in x.weight.stored()
    ]
    beside = [] if space.weights is None else space.weights.held
    return {
        "adapters": count.tensors(
            [*space.parameters.values(), *space.exact.values(), *space.frozen.values(), *beside]
        ),
        "resident_blocks": count.tensors(stored),
        "embeddings_and_head": count.tensors(_outside(model)),
        "small_parameters": count.tensors([*model.module.parameters(), *model.module.buffers()]),
    }


def tensor_bytes(value: Any) -> int:
    """Bytes of all tensors in nested containers, shared memory counted once."""
    return _Count().tensors(_tensors_of(value))


def _placed(found: dict[str, int], device_type: str) -> Ledger:
    disk = {name: found.pop(name) for name in _ON_DISK}
    if device_type == "cpu":
        return Ledger(found, {}, disk)
    on_host = {name: found.pop(name) for name in ("curvature", "prefetch_buffers", "pinned_host")}
    return Ledger(found, on_host, disk)


class _Count:
    """Counts each storage once."""

    def __init__(self, meta: bool = False) -> None:
        """meta: what is on the meta device counts; else it is offloaded, and does not."""
        self._seen: set[int] = set()
        self._meta = meta

    def tensors(self, tensors: Iterable[Tensor]) -> int:
        """Bytes of the storages that were not counted before."""
        total = 0
        for tensor in tensors:
            if tensor.is_meta and not self._meta:
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata if self._meta else storage.data_ptr()
            if key not in self._seen:
                self._seen.add(key)
                total += storage.nbytes()
        return total


def _outside(model: Model) -> list[Tensor]:
    """Embeddings and the matrices of linears outside of the blocks."""
    found = [m.weight for m in model.module.modules() if isinstance(m, nn.Embedding)]
    heads = [x.weight for name, x in model.linears.items() if model.block_of(name) is None]
    return found + [buffer for weight in heads for buffer in weight.buffers()]


def _in_host_memory(model: Model, count: _Count) -> int:
    """Blocks that a host source keeps, and large matrices that stay with it."""
    assert isinstance(model.residency, Streamed)
    fetcher = model.residency._fetcher
    blocks = 0
    if fetcher is not None and isinstance(fetcher.source, HostSource):
        blocks = count.tensors(fetcher.source._blocks.values())
    offloaded = (
        sum(model.checkpoint.nbytes(name) for name in model.offloaded)
        if model.residency.name == "host"
        else 0
    )
    return blocks + offloaded


def _state(curvature: Any) -> dict[str, Any]:
    """Without the Sigma of the last step, which is dropped as the next one begins."""
    return {name: value for name, value in vars(curvature).items() if not name.startswith("_drawn")}


def _changed_bytes(model: Model) -> int:
    assert isinstance(model.residency, Streamed)
    fetcher = model.residency._fetcher
    if fetcher is None or not isinstance(fetcher.source, DiskSource):
        return 0
    return fetcher.source._stride * len(fetcher.source._changed)


def _tensors_of(value: Any) -> list[Tensor]:
    """Every tensor in nested containers."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in _tensors_of(item)]
    return []


def category_list(predicted: Mapping[str, int], measured: Mapping[str, int]) -> list[dict[str, Any]]:
    """Both sides by category, the planner's order first."""
    measured = {category: size for category, size in measured.items() if size}
    names = [*predicted, *(name for name in measured if name not in predicted)]
    return [
        {"owner": name, "predicted_bytes": predicted.get(name), "measured_bytes": measured.get(name)}
        for name in names
    ]
