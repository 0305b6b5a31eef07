"""What is asked of a device, with one answer for each kind: CPU, CUDA, and what is registered beside them.

No other module calls `torch.cuda`. So a GPU of another kind, a simulated one above all (tests/simulated), is
one subclass of `Gpu` and one call of `register`; figures that are chosen by kind hold for every GPU, see
`like`. A device gets its index once, when it is chosen: torch takes a missing one for the thread's current
device in some places and refuses it in others.
"""

from __future__ import annotations

import contextlib
import os
import platform
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, final

import psutil
import torch

from hizoo_lite.errors import BudgetError, UserError
from hizoo_lite.process import resident, trim
from hizoo_lite.units import format_bytes

#: What a process has of a GPU beside its tensors: CUDA's context and the kernels of libraries. Not measured
#: by this project yet; typical of CUDA 12.
CONTEXT_BYTES = 600 << 20
#: What a run asks of the libraries of a GPU, unless the environment says otherwise; read when they start.
#: expandable_segments: a nearly full card is not lost in fragments, since a budget counts what is reserved.
#: CUBLAS_WORKSPACE_CONFIG: the same products give the same bits. NCCL_*: nothing of size is exchanged, and
#: accelerate refuses to start on pairs of consumer cards that cannot do it.
_DEFAULTS = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "NCCL_P2P_DISABLE": "1",
    "NCCL_IB_DISABLE": "1",
}
_ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
_TF32 = "NVIDIA_TF32_OVERRIDE"
CPUINFO = Path("/proc/cpuinfo")


class Event(Protocol):
    """A point in a stream."""

    def record(self, stream: Any = None) -> None:
        """What was submitted to the stream until now is before this point."""

    def synchronize(self) -> None:
        """The host waits until the point is reached."""


class Stream(Protocol):
    """An order of work on a device."""

    def wait_event(self, event: Any) -> None:
        """What is submitted from now on is after the event."""

    def synchronize(self) -> None:
        """The host waits until all of it is done."""


class Kind(ABC):
    """One kind of device. `device` always has its index if there is one."""

    type: ClassVar[str]  # as in torch.device(type)
    like: Literal["cpu", "cuda"]  # whose figures hold

    # ---------------------------------------------------------------------------------- what there is

    @abstractmethod
    def count(self) -> int:
        """How many are here."""

    @abstractmethod
    def device(self, index: int | None) -> torch.device:
        """The device of an index; None: the one that is current here."""

    def name(self, device: torch.device) -> str | None:
        """What its maker calls it; None of a CPU."""
        return None

    def libraries(self) -> dict[str, str]:
        """Versions of what chooses its kernels."""
        return {}

    @abstractmethod
    def multiplies_bf16(self) -> bool:
        """Whether it has instructions for products of bf16."""

    @abstractmethod
    def prepare(self) -> None:
        """Once before its first use. `UserError` if the environment makes it compute otherwise."""

    # -------------------------------------------------------------------------------------------- order

    @abstractmethod
    def synchronize(self, device: torch.device) -> None:
        """Wait until everything that was submitted is done."""

    def on_default_stream(self, device: torch.device) -> AbstractContextManager[Any]:
        """While this is open work goes to the stream that libraries without a notion of streams use."""
        return contextlib.nullcontext()

    # ------------------------------------------------------------------------------------------- memory

    @abstractmethod
    def total_bytes(self, device: torch.device) -> int:
        """All of its memory."""

    @abstractmethod
    def free_bytes(self, device: torch.device) -> int:
        """What nobody has of it."""

    @abstractmethod
    def taken_bytes(self, device: torch.device) -> int:
        """What this process has allocated of it."""

    def allowance(self, budget_bytes: int, device: torch.device) -> int:
        """What may be allocated in all under a budget of the process."""
        return budget_bytes

    @abstractmethod
    def empty_cache(self) -> None:
        """Give back what is kept for later allocations."""


@final
class Cpu(Kind):
    """The host as the compute device."""

    type, like = "cpu", "cpu"

    def count(self) -> int:
        """There is one."""
        return 1

    def device(self, index: int | None) -> torch.device:
        """Without an index."""
        return torch.device("cpu")

    def multiplies_bf16(self) -> bool:
        """avx512_bf16 or amx_bf16 in Linux's list of CPU flags."""
        if platform.machine().lower() not in ("x86_64", "amd64") or not CPUINFO.exists():
            return False
        text = CPUINFO.read_text(encoding="ascii", errors="replace")
        flags = next((line for line in text.splitlines() if line.startswith("flags")), "")
        return not {"avx512_bf16", "amx_bf16"}.isdisjoint(flags.split())

    def prepare(self) -> None:
        """Nothing."""

    def synchronize(self, device: torch.device) -> None:
        """Nothing is under way."""

    def total_bytes(self, device: torch.device) -> int:
        """RAM."""
        return int(psutil.virtual_memory().total)

    def free_bytes(self, device: torch.device) -> int:
        """RAM that is available."""
        return int(psutil.virtual_memory().available)

    def taken_bytes(self, device: torch.device) -> int:
        """Anonymous memory; all of it if the system does not tell."""
        return resident().held_bytes

    def empty_cache(self) -> None:
        """The heap's freed pages."""
        trim()


@final
class Meta(Kind):
    """Tensors without memory: a model that is only planned. See `meta_as`."""

    type = "meta"

    def __init__(self, stands_for: Literal["cpu", "cuda"]) -> None:
        self.like = stands_for

    def count(self) -> int:
        """None: it cannot be chosen."""
        return 0

    def device(self, index: int | None) -> torch.device:
        """Without an index."""
        return torch.device("meta")

    def multiplies_bf16(self) -> bool:
        """It multiplies nothing."""
        return False

    def prepare(self) -> None:
        """Nothing."""

    def synchronize(self, device: torch.device) -> None:
        """Nothing is under way."""

    def total_bytes(self, device: torch.device) -> int:
        """None."""
        return 0

    def free_bytes(self, device: torch.device) -> int:
        """None."""
        return 0

    def taken_bytes(self, device: torch.device) -> int:
        """None."""
        return 0

    def empty_cache(self) -> None:
        """Nothing is kept."""


class Gpu(Kind):
    """A device beside the host, with streams and an allocator of torch's. The interface of the others."""

    like = "cuda"

    def __init__(self) -> None:
        self._caps: dict[torch.device, int] = {}

    @abstractmethod
    def name(self, device: torch.device) -> str:
        """What its maker calls it."""

    def prepare(self) -> None:
        """See `Kind.prepare`: products are exact from here on."""
        _refuse_tf32()
        exact_products()

    # -------------------------------------------------------------------------------------------- order

    @abstractmethod
    def stream(self, device: torch.device) -> Stream:
        """A new stream beside that of the computation."""

    @abstractmethod
    def event(self, sleeps: bool = False) -> Event:
        """A new event, recorded nowhere. sleeps: who waits for it on the host leaves the core to others."""

    @abstractmethod
    def current_stream(self, device: torch.device) -> Stream:
        """The stream that this thread submits to."""

    @abstractmethod
    def on_stream(self, stream: Any, device: torch.device) -> AbstractContextManager[Any]:
        """While this is open this thread submits to `stream`, of `device`."""

    def on(self, device: torch.device) -> AbstractContextManager[Any]:
        """While this is open `device` is the one that libraries launch on which are not told of any."""
        return contextlib.nullcontext()

    def capability(self, device: torch.device) -> tuple[int, int]:
        """Of its instructions, such as (8, 9); (0, 0) if there is no such number."""
        return 0, 0

    # ------------------------------------------------------------------------------------------- memory

    @abstractmethod
    def held_bytes(self, device: torch.device) -> tuple[int, int]:
        """What is allocated, and what the allocator has of the device for that or for later."""

    def taken_bytes(self, device: torch.device) -> int:
        """What is allocated."""
        return self.held_bytes(device)[0]

    @abstractmethod
    def peak_bytes(self, device: torch.device) -> int:
        """The most that was allocated since `reset_peak`."""

    @abstractmethod
    def reset_peak(self, device: torch.device) -> None:
        """Begin to look for a peak anew."""

    @abstractmethod
    def _limit(self, device: torch.device, limit_bytes: int | None) -> None:
        """The allocator may reserve so much; None: all there is."""

    def allowance(self, budget_bytes: int, device: torch.device) -> int:
        """The budget less this process's context, and no more than what others leave of the device.

        A cap that is in force is not exceeded: others may have ended since it was set.
        """
        left = self.total_bytes(device) - self.outside_bytes(device)
        return min(budget_bytes - CONTEXT_BYTES, left, self._caps.get(device, left))

    def outside_bytes(self, device: torch.device) -> int:
        """What is taken of the device but not by the allocator: contexts, libraries, other programs."""
        used = self.total_bytes(device) - self.free_bytes(device)
        return max(0, used - self.held_bytes(device)[1])

    @contextmanager
    def capped(self, budget_bytes: int, device: torch.device) -> Iterator[int]:
        """While this is open the allocator has the budget's allowance, which is given, and no more."""
        allowed = self.allowance(budget_bytes, device)
        if allowed <= 0:
            outside = format_bytes(max(CONTEXT_BYTES, self.outside_bytes(device)))
            raise BudgetError(
                f"--device-budget: got {format_bytes(budget_bytes)}, but {outside} of the device "
                "are taken by the CUDA context, libraries and other processes"
            )
        self._limit(device, allowed)
        self._caps[device] = allowed
        try:
            yield allowed
        finally:
            del self._caps[device]
            self._limit(device, None)

    # -------------------------------------------------------------------------------------- host memory

    @abstractmethod
    def page_lock(self, pointer: int, nbytes: int, device: torch.device) -> int:
        """Lock these bytes of the host; an error's number, 0 if it was done."""

    @abstractmethod
    def page_unlock(self, pointer: int, device: torch.device) -> None:
        """Undo `page_lock`."""


@final
class Cuda(Gpu):
    """torch.cuda."""

    type = "cuda"

    def count(self) -> int:
        return torch.cuda.device_count() if torch.cuda.is_available() else 0

    def device(self, index: int | None) -> torch.device:
        return torch.device("cuda", torch.cuda.current_device() if index is None else index)

    def name(self, device: torch.device) -> str:
        return str(torch.cuda.get_device_properties(device).name)

    def libraries(self) -> dict[str, str]:
        return {"torch": torch.__version__, "cuda": str(torch.version.cuda)}

    def capability(self, device: torch.device) -> tuple[int, int]:
        return torch.cuda.get_device_capability(device)

    def on(self, device: torch.device) -> AbstractContextManager[Any]:
        return torch.cuda.device(device)

    def multiplies_bf16(self) -> bool:
        return torch.cuda.is_bf16_supported(including_emulation=False)

    def synchronize(self, device: torch.device) -> None:
        torch.cuda.synchronize(device)

    @contextmanager
    def on_default_stream(self, device: torch.device) -> Iterator[None]:
        """After what the current stream has, and before what it gets."""
        current, default = torch.cuda.current_stream(device), torch.cuda.default_stream(device)
        if current == default:
            yield
            return
        default.wait_stream(current)
        try:
            with torch.cuda.device(device), torch.cuda.stream(default):
                yield
        finally:
            current.wait_stream(default)

    def stream(self, device: torch.device) -> Stream:
        return torch.cuda.Stream(device)

    def event(self, sleeps: bool = False) -> Event:
        return torch.cuda.Event(blocking=sleeps)

    def current_stream(self, device: torch.device) -> Stream:
        return torch.cuda.current_stream(device)

    @contextmanager
    def on_stream(self, stream: Any, device: torch.device) -> Iterator[None]:
        with torch.cuda.device(device), torch.cuda.stream(stream):
            yield

    def total_bytes(self, device: torch.device) -> int:
        """Asked without a context, which would take some of it."""
        return int(torch.cuda.get_device_properties(device).total_memory)

    def free_bytes(self, device: torch.device) -> int:
        return int(torch.cuda.mem_get_info(device)[0])

    def held_bytes(self, device: torch.device) -> tuple[int, int]:
        """Zeros before the first use."""
        stats = torch.cuda.memory_stats_as_nested_dict(device)
        allocated, reserved = (
            int(stats[key]["all"]["current"]) if key in stats else 0
            for key in ("allocated_bytes", "reserved_bytes")
        )
        return allocated, reserved

    def peak_bytes(self, device: torch.device) -> int:
        return int(torch.cuda.max_memory_allocated(device))

    def reset_peak(self, device: torch.device) -> None:
        torch.cuda.reset_peak_memory_stats(device)

    def _limit(self, device: torch.device, limit_bytes: int | None) -> None:
        share = 1.0 if limit_bytes is None else min(1.0, limit_bytes / self.total_bytes(device))
        torch.cuda.set_per_process_memory_fraction(share, device)

    def empty_cache(self) -> None:
        torch.cuda.empty_cache()

    def page_lock(self, pointer: int, nbytes: int, device: torch.device) -> int:
        """Exactly these bytes, where torch's pinned allocator rounds up to a power of two and keeps them."""
        status = int(torch.cuda.cudart().cudaHostRegister(pointer, nbytes, 0))
        if status != 0:
            _forget_error(device)
        return status

    def page_unlock(self, pointer: int, device: torch.device) -> None:
        if int(torch.cuda.cudart().cudaHostUnregister(pointer)) != 0:
            _forget_error(device)


def _forget_error(device: torch.device) -> None:
    """CUDA keeps the last error, and torch would raise it at the next launch, whatever that is."""
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device=device)


# --------------------------------------------------------------------------------------------- choice

_KINDS: dict[str, Kind] = {"cpu": Cpu(), "cuda": Cuda()}


def register(kind: Kind) -> None:
    """From now on there is a device of this kind, by its type's name."""
    _KINDS[kind.type] = kind


@contextmanager
def meta_as(device: torch.device | str) -> Iterator[torch.device]:
    """While this is open the meta device, which is given, stands for one like `device`, here or not."""
    register(Meta(like(device)))
    try:
        yield torch.device("meta")
    finally:
        del _KINDS["meta"]


def has(name: str) -> bool:
    """Whether there is a device of this type here."""
    return name in _KINDS and _KINDS[name].count() > 0


def kind_of(device: torch.device | str) -> Kind:
    """The kind of a device, or of a device's type."""
    return _KINDS[device if isinstance(device, str) else device.type]


def gpu_of(device: torch.device) -> Gpu:
    """The kind of a device that is a GPU."""
    kind = kind_of(device)
    assert isinstance(kind, Gpu)
    return kind


def is_gpu(device: torch.device | str) -> bool:
    """Whether it is a device beside the host."""
    return isinstance(kind_of(device), Gpu)


def like(device: torch.device | str) -> Literal["cpu", "cuda"]:
    """The device whose figures hold for one: every GPU has those of CUDA."""
    return kind_of(device).like


def choose_type(wanted: str) -> tuple[str, int | None]:
    """Type and index of a wanted device; `auto` is CUDA if there is one, else CPU.

    Raises `UserError` if the device is not there, or is one GPU of several processes.
    """
    _set_defaults()
    if wanted == "auto":
        return ("cuda" if _KINDS["cuda"].count() else "cpu"), None
    allowed = f"allowed are auto, {', '.join(_KINDS)}"
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise UserError(f"device: got {wanted!r}, {allowed}") from error
    if device.type not in _KINDS:
        raise UserError(f"device: got {wanted!r}, {allowed}")
    count = kind_of(device).count()
    if (device.index or 0) >= count:
        raise UserError(f"device: got {wanted!r}, but there are {count} {device.type.upper()} devices here")
    if is_gpu(device) and device.index is not None and _is_launched():
        raise UserError(
            f"device: got {wanted!r}, but a launcher has started {os.environ['WORLD_SIZE']} processes, which "
            f"would share it; allowed: {device.type}, of which each takes its own"
        )
    return device.type, device.index


def choose_device(wanted: str) -> torch.device:
    """The device of `choose_type`, with its index: of a rank its own, otherwise the current one."""
    name, index = choose_type(wanted)
    kind = kind_of(name)
    if index is None and isinstance(kind, Gpu) and _is_launched():
        index = int(os.environ.get("LOCAL_RANK", "0")) % kind.count()
    return kind.device(index)


def _is_launched() -> bool:
    return os.environ.get("WORLD_SIZE", "1") != "1"


# ------------------------------------------------------------------------------------------ precision


def _set_defaults() -> None:
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    if not any(name in os.environ for name in _ALLOCATOR):
        os.environ[_ALLOCATOR[0]] = "expandable_segments:True"


def _refuse_tf32() -> None:
    value = os.environ.get(_TF32, "")
    if value not in ("", "0"):
        raise UserError(
            f"{_TF32}: got {value}; allowed: 0, or unset: it would round the float32 products that a step "
            "is the small difference of to 10 bits"
        )


def exact_products() -> None:
    """Products of float32 in float32, sums of 16-bit products in float32, whatever was set before."""
    matmul = torch.backends.cuda.matmul
    matmul.allow_tf32 = False
    matmul.allow_bf16_reduced_precision_reduction = False
    matmul.allow_fp16_reduced_precision_reduction = False
