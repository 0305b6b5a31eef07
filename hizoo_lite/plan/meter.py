"""Counts the bytes of tensors while they live, without there being any: for tensors on the meta device.

A model that runs on the meta device makes every tensor it would make, with shape and dtype and without
memory. This mode sees each as an operation makes it and again when it is dropped, so the most that is alive
together is known exactly, for any architecture, in milliseconds. What kernels take inside of an operation is
not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


class MemoryMeter(TorchDispatchMode):
    """`live` is what is alive now by category; `worst` a copy of it at the peak; `peaks` peaks by category.

    A tensor belongs to the category that is set when it is made; a peak is named after the category then.
    """

    def __init__(self) -> None:
        super().__init__()
        self.category = "between"
        self.live: dict[str, int] = {}
        self.worst: dict[str, int] = {}
        self.peaks: dict[str, int] = {}
        self._known: dict[int, Any] = {}  # storages by address

    @property
    def peak_bytes(self) -> int:
        """The most that was alive together."""
        return sum(self.worst.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return False  # models ask whether a mask hides nothing: it does hide something
        kwargs = kwargs or {}
        for tensor in _tensors((args, *kwargs.values())):
            self._see(tensor, made=False)  # what was there before, such as weights
        out = _result(func, args, kwargs)
        for tensor in _tensors((out,)):
            self._see(tensor, made=True)
        return out

    def _see(self, tensor: Tensor, made: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes() if made else 0
        self._known[key] = weakref.ref(storage, partial(self._dropped, key, self.category, size))
        if size == 0:
            return
        self.live[self.category] = self.live.get(self.category, 0) + size
        total = sum(self.live.values())
        self.peaks[self.category] = max(self.peaks.get(self.category, 0), total)
        if total > self.peak_bytes:
            self.worst = dict(self.live)

    def _dropped(self, key: int, category: str, size: int, _: object) -> None:
        self._known.pop(key, None)
        if size:
            self.live[category] -= size


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Those of an operation's arguments or results, also in lists: all that operations take and give."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


class _Made(NamedTuple):
    """A tensor on meta: all that an operation there decides."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def again(self) -> Tensor:
        return torch.empty_strided(self.size, self.stride, dtype=self.dtype, device="meta")


#: What operations made, by themselves and what they were given; None if it has to be asked anew.
_MADE: dict[Any, _Made | None] = {}
#: Entries of it: a plan has hundreds, of lengths of its own.
_MOST = 20_000


def _result(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`func(*args, **kwargs)`, of which torch is asked once for each form of its operands.

    A product on meta takes torch 0.3 ms, since references in Python stand for its kernels there; a model has
    the same ones in every block, branch and chunk.
    """
    form = _form((torch.get_default_dtype(), func, args, tuple(kwargs.items())))
    if form is None:
        return func(*args, **kwargs)
    known = _MADE.get(form)
    if known is not None:
        return known.again()
    out = func(*args, **kwargs)
    if form not in _MADE:
        if len(_MADE) >= _MOST:
            _MADE.clear()
        _MADE[form] = _made(func, out, [*_tensors((args, *kwargs.values()))])
    return out


def _form(value: Any) -> Hashable:
    """What a result's form depends on; None if that is not known."""
    if isinstance(value, Tensor):
        is_plain = value.is_meta and type(value) in (Tensor, nn.Parameter)  # subclasses make their own
        return (value.shape, value.stride(), value.dtype) if is_plain else None
    if isinstance(value, list | tuple):
        forms = tuple(map(_form, value))
        return None if None in forms else forms
    if value is None:
        return ()
    return (type(value), value) if isinstance(value, Hashable) else None  # 1, 1.0 and True are equal


def _made(func: Any, out: Any, given: list[Tensor]) -> _Made | None:
    """None if it is no new tensor of its own on meta: a view, one of `given`, several."""
    aliases = any(each.alias_info is not None for each in (*func._schema.arguments, *func._schema.returns))
    if aliases or not isinstance(out, Tensor) or not out.is_meta:
        return None
    storages = {tensor.untyped_storage()._cdata for tensor in given}
    made = _Made(tuple(out.shape), out.stride(), out.dtype)
    own = out.untyped_storage()
    is_new = own._cdata not in storages and own.nbytes() == made.again().untyped_storage().nbytes()
    return made if is_new else None


class _FusedAttention(torch.autograd.Function):
    """scaled_dot_product_attention and its gradient: both keep a number for each query and head."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """All (rows, heads, length, features)."""
        rows, heads, length, _ = query.shape
        log_sums = query.new_empty(rows, heads, length, dtype=torch.float32)
        result = query.new_empty(rows, length, heads, value.shape[-1]).transpose(1, 2)
        ctx.save_for_backward(query, key, value, result, log_sums)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        """Of query, key and value."""
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


class KernelMemory(TorchFunctionMode):
    """What kernels take inside of an operation, if that is much.

    scaled_dot_product_attention as the fused kernels do it: no (length x length) matrix for each head. They
    make the result, a number for each query and head, and a float mask if a boolean one is given.
    logsumexp makes the exponentials.
    """

    def __init__(self, repeats_groups: bool = False) -> None:
        """repeats_groups: keys and values of fewer heads are repeated first, see `model/attention.py`."""
        super().__init__()
        self.repeats_groups = repeats_groups

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.logsumexp:
            exponentials = torch.empty_like(args[0])
            del exponentials
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        query, value = args[0], args[2]
        mask = kwargs.get("attn_mask", args[3] if len(args) > 3 else None)
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.empty(mask.shape, dtype=query.dtype, device=query.device)
        if torch.is_grad_enabled() and query.requires_grad:
            return _FusedAttention.apply(query, args[1], value)
        rows, heads, length, _ = query.shape
        repeated = []
        if self.repeats_groups and length > 1:
            repeated = [
                torch.empty(rows, heads, *part.shape[2:], dtype=part.dtype, device=part.device)
                for part in (args[1], value)
                if part.shape[1] != heads
            ]
        log_sums = query.new_empty(rows, heads, length, dtype=torch.float32)
        result = query.new_empty(rows, length, heads, value.shape[-1])
        del mask, log_sums, repeated
        return result.transpose(1, 2)
