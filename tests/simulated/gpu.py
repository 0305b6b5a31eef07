"""A GPU that is none: `--device simgpu` computes on the host and behaves like a device beside it.

torch's backend of its own name in pure Python (PrivateUse1; experimental, written for torch 2.13). A tensor
there wraps one of the host, so that every number is real and a run can be compared with one on a CPU. What
the host alone would not show is seen: a tensor of the host that meets one of the device is an error, live
bytes are counted by storage, an allocation beyond the cap is refused as CUDA's allocator refuses it, and what
makes the host wait for the device is counted with its line. Streams are one order; that of several is
looked at by `streams.py`.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from types import FrameType, MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from hizoo_lite import device as devices
from hizoo_lite.config import TrainConfig
from hizoo_lite.device import CONTEXT_BYTES
from hizoo_lite.quant import native

NAME = "simgpu"
PATTERN: str = next(field for field in fields(TrainConfig) if field.name == "device").metadata["pattern"]
#: Ops that take tensors of both devices: copies, and indexing, which CUDA does with indices of the host too.
_CROSSING = ("aten.copy_", "aten._copy_from", "aten._to_copy", "aten.index.", "aten.index_put", "aten.set_")


class Memory:
    """Bytes on the device: what lives, the most that did, and what is allowed."""

    def __init__(self) -> None:
        self.live_bytes = 0
        self.reset()

        self._storages: dict[int, Any] = {}
        self._lock = threading.RLock()

    def reset(self) -> None:
        """A card of 24 GiB with nothing on it but a context and what is live, and no cap."""
        self.total_bytes, self.outside_bytes = 24 << 30, CONTEXT_BYTES
        self.cap_bytes: int | None = None
        self.peak_bytes, self.refusals = self.live_bytes, 0

    def add(self, storage: torch.UntypedStorage) -> None:
        """A storage that may be new. Raises torch.OutOfMemoryError beyond the cap."""
        key, size = storage._cdata, storage.nbytes()
        with self._lock:
            if key in self._storages:
                return
            limit = self.total_bytes - self.outside_bytes if self.cap_bytes is None else self.cap_bytes
            if self.live_bytes + size > limit:
                self.refusals += 1
                raise torch.OutOfMemoryError(
                    f"simgpu out of memory: {size} wanted, {self.live_bytes} of {limit} live"
                )
            self.live_bytes += size
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)
            self._storages[key] = weakref.ref(storage, lambda _: self._drop(key, size))

    def _drop(self, key: int, size: int) -> None:
        with self._lock:
            self._storages.pop(key, None)
            self.live_bytes -= size


MEMORY = Memory()
#: What was launched, by op; and what made the host wait, by op and line.
LAUNCHES: collections.Counter[str] = collections.Counter()
#: Are told of every op before it runs: (op, args, kwargs).
WATCHERS: list[Callable[[Any, Any, Any], None]] = []
#: Bytes of the host that are page-locked, by address.
LOCKED: dict[int, int] = {}
#: The device below: "cpu", or "meta" for tensors of real shapes without memory or numbers.
BELOW = ["cpu"]
SYNCS: collections.Counter[str] = collections.Counter()


class DeviceTensor(Tensor):
    """A tensor of the device, over `raw` of the host."""

    raw: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, raw: Tensor) -> DeviceTensor:
        MEMORY.add(raw.untyped_storage())
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            raw.size(),
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=torch.device(NAME, 0),
        )
        made.raw = raw
        return made

    def untyped_storage(self) -> torch.UntypedStorage:
        """That of the host: its size and identity are those of the tensor's memory."""
        return self.raw.untyped_storage()

    def data_ptr(self) -> int:
        """An address that is the tensor's own."""
        return self.raw.data_ptr()

    def tolist(self) -> Any:
        """Through the host."""
        return self.cpu().tolist()

    def __repr__(self, **_: Any) -> str:
        return f"simgpu {self.raw!r}"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Op:
    """What is asked of an op at every launch."""

    def __init__(self, func: Any) -> None:
        self.name = name = str(func)
        self.crosses = name.startswith(_CROSSING)
        self.copies_to = name.startswith(("aten.copy_", "aten._copy_from"))
        self.makes_copy = name.startswith("aten._to_copy")
        self.reads_number = name.startswith("aten._local_scalar_dense")
        self.is_attention = name.startswith("aten.scaled_dot_product_attention")
        self.decodes = name == "bitsandbytes.dequantize_4bit.out"


_op = functools.cache(_Op)


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    """An op on the tensors of the host below."""
    op = _op(func)
    there: list[DeviceTensor] = []
    here: list[Tensor] = []
    _sort(args, there, here)
    _sort(kwargs.values(), there, here)
    if there and here and not op.crosses:
        raise RuntimeError(f"{op.name}: tensors on simgpu and on {here[0].device}, at {_line()}")
    device = kwargs.get("device")
    to_host = op.makes_copy and device is not None and device.type == "cpu"
    if there and (to_host or op.reads_number):
        SYNCS[f"{op.name} @ {_line()}"] += 1
    if op.copies_to and there and here and _waits(args, kwargs):
        SYNCS[f"{op.name} @ {_line()}"] += 1
    if op.is_attention:  # one kernel, as on CUDA where it is a fused one
        assert not kwargs.get("enable_gqa"), "no fused kernel of CUDA takes groups in float32"
    LAUNCHES[op.name] += 1
    for watcher in WATCHERS:
        watcher(func, args, kwargs)
    if op.decodes:
        return _decode(*args, **kwargs)
    if BELOW[0] == "meta" and there:
        if op.reads_number:
            return True  # models ask whether a mask hides nothing
        if to_host:
            return torch.zeros(there[0].shape, dtype=kwargs.get("dtype") or there[0].dtype)
    found = func(*_below(args), **{name: _below(value) for name, value in kwargs.items()})
    if to_host:
        return found
    return _above(found, {id(t.raw): t for t in there})


def _sort(values: Any, there: list[DeviceTensor], here: list[Tensor]) -> None:
    """The tensors among an op's arguments: of the device, and of the host but for its numbers."""
    for value in values:
        if isinstance(value, DeviceTensor):
            there.append(value)
        elif isinstance(value, Tensor):
            if value.ndim > 0:
                here.append(value)
        elif isinstance(value, list | tuple):
            _sort(value, there, here)


def _above(value: Any, known: dict[int, DeviceTensor]) -> Any:
    """On the device; what was written in place is the tensor that was given."""
    if isinstance(value, list | tuple):
        return type(value)([_above(part, known) for part in value])
    if not isinstance(value, Tensor):
        return value
    given = known.get(id(value))
    return DeviceTensor(value) if given is None else given


def _decode(
    codes: DeviceTensor,
    absmax: DeviceTensor,
    blocksize: int,
    bits: native.FourBits,
    shape: Any,
    dtype: torch.dtype,
    out: DeviceTensor,
) -> None:
    """The CUDA decoder's contract: whole blocks into `out`."""
    assert out.numel() == 2 * codes.numel() == absmax.numel() * blocksize
    assert tuple(out.shape) == tuple(shape)
    assert out.dtype == dtype
    if codes.raw.is_meta:
        return
    native.decode(codes.raw, absmax.raw, native.code_table(bits), out.raw.view(-1), 0, bits, blocksize)


def _below(value: Any) -> Any:
    if isinstance(value, DeviceTensor):
        return value.raw
    if isinstance(value, list | tuple):
        return type(value)([_below(part) for part in value])
    if isinstance(value, torch.device) and value.type == NAME:
        return torch.device(BELOW[0])
    return value


def _waits(args: Any, kwargs: Any) -> bool:
    """Whether the host waits for a copy: unless it asks not to, and into memory that is not page-locked."""
    target = args[0]
    blocking = kwargs.get("non_blocking", args[2] if len(args) > 2 else False) is False
    return blocking or not (isinstance(target, DeviceTensor) or _is_locked(target))


def _is_locked(tensor: Tensor) -> bool:
    first = tensor.data_ptr()
    return any(start <= first < start + size for start, size in LOCKED.items())


def _line() -> str:
    frame: FrameType | None = sys._getframe(1)  # `traceback` reads the source of every frame
    while frame is not None:
        name = frame.f_code.co_filename
        if "/hizoo_lite/" in name or "/transformers/" in name:
            place = name.split("site-packages/")[-1].split("/hizoo_lite/")[-1]
            return f"{place}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"


class _Point:
    """An event and a stream where there is one order: the host's."""

    def record(self, stream: Any = None) -> None:
        """Everything before has run."""

    def wait_event(self, event: Any) -> None:
        """It has been reached."""

    def synchronize(self) -> None:
        """Everything has run."""


class SimulatedGpu(devices.Gpu):
    """The device as `hizoo_lite.device` asks it."""

    type = NAME

    def count(self) -> int:
        return 1

    def device(self, index: int | None) -> torch.device:
        return torch.device(NAME, index or 0)

    def name(self, device: torch.device) -> str:
        return "a simulated GPU"

    def libraries(self) -> dict[str, str]:
        return {"torch": torch.__version__}

    def multiplies_bf16(self) -> bool:
        return False

    def synchronize(self, device: torch.device) -> None:
        SYNCS[f"synchronize @ {_line()}"] += 1

    def stream(self, device: torch.device) -> _Point:
        return _Point()

    def event(self, sleeps: bool = False) -> _Point:
        return _Point()

    def current_stream(self, device: torch.device) -> _Point:
        return _Point()

    def on_stream(self, stream: Any, device: torch.device) -> Any:
        assert device.index == 0
        return contextlib.nullcontext()

    def total_bytes(self, device: torch.device) -> int:
        return MEMORY.total_bytes

    def free_bytes(self, device: torch.device) -> int:
        return MEMORY.total_bytes - MEMORY.outside_bytes - MEMORY.live_bytes

    def held_bytes(self, device: torch.device) -> tuple[int, int]:
        return MEMORY.live_bytes, MEMORY.live_bytes

    def peak_bytes(self, device: torch.device) -> int:
        return MEMORY.peak_bytes

    def reset_peak(self, device: torch.device) -> None:
        MEMORY.peak_bytes = MEMORY.live_bytes

    def _limit(self, device: torch.device, limit_bytes: int | None) -> None:
        assert device.index == 0
        MEMORY.cap_bytes = limit_bytes

    def empty_cache(self) -> None:
        pass

    def page_lock(self, pointer: int, nbytes: int, device: torch.device) -> int:
        LOCKED[pointer] = nbytes
        return 0

    def page_unlock(self, pointer: int, device: torch.device) -> None:
        del LOCKED[pointer]


_setup_privateuseone_for_python_backend(NAME)
_FALLBACK, _OPS = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
_FALLBACK.fallback(lambda op, *args, **kwargs: _run(op, args, kwargs), "PrivateUse1")
for _each in (
    torch.ops.aten.scaled_dot_product_attention.default,
    torch.ops.aten.empty.memory_format,  # these with the dispatch to Python off: in torch.tensor(...)
    torch.ops.aten.empty_strided.default,
    torch.ops.aten._copy_from.default,
    torch.ops.aten._to_copy.default,
    torch.ops.aten.copy_.default,
):
    _OPS.impl(_each, lambda *args, _each=_each, **kwargs: _run(_each, args, kwargs), "PrivateUse1")


class _Attention(torch.autograd.Function):
    """scaled_dot_product_attention with its gradient, which is one op for autograd as well."""

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, options: Any) -> Any:
        ctx.save_for_backward(query, key, value)
        ctx.options = options
        return _run(torch.ops.aten.scaled_dot_product_attention.default, (query, key, value), options)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        with torch.enable_grad():
            here = [tensor.raw.detach().requires_grad_(True) for tensor in ctx.saved_tensors]
            options = {name: _below(value) for name, value in ctx.options.items()}
            out = torch.nn.functional.scaled_dot_product_attention(*here, **options)
        found = torch.autograd.grad(out, here, gradients[0].raw)
        return *map(DeviceTensor, found), None


def _attention(
    query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False,
    **named: Any,
) -> Any:  # fmt: skip
    options = {"attn_mask": attn_mask, "dropout_p": dropout_p, "is_causal": is_causal, **named}
    return _Attention.apply(query, key, value, options)


_OPS.impl(torch.ops.aten.scaled_dot_product_attention.default, _attention, "AutogradPrivateUse1")


def install() -> None:
    """`simgpu` is a device from here on, and a setting of a run."""
    devices.register(SimulatedGpu())
    _admit(f"{PATTERN}|{NAME}")


def _admit(pattern: str) -> None:
    """What `--device` may be."""
    setting = next(field for field in fields(TrainConfig) if field.name == "device")
    setting.metadata = MappingProxyType({**setting.metadata, "pattern": pattern})  # type: ignore[misc]


@contextmanager
def installed() -> Iterator[Memory]:
    """While this is open `simgpu` is a device, with nothing counted at first."""
    before = devices._KINDS.get(NAME)
    install()
    LAUNCHES.clear()
    SYNCS.clear()
    try:
        yield MEMORY
    finally:
        MEMORY.reset()
        if before is not None:
            devices.register(before)
        else:
            del devices._KINDS[NAME]
            _admit(PATTERN)
