"""The memory budget while a run goes on: caps that the system enforces, and what to do when they are hit.

On CUDA torch's allocator gets what the budget leaves beside the context and the libraries. On Linux the
process's private writable memory is limited (RLIMIT_DATA) by what it has now and what the budget leaves of
anonymous memory: an allocation beyond it fails cleanly. That limit counts a thread's stack as a whole, most
of which is never touched, so it is set anew before each pass. Elsewhere, and for the host's budget of a run
on CUDA (whose driver maps memory of its own), the peak is only compared with the budget after each step that
is sampled. Whatever is hit, a pass is repeated in smaller chunks; its noise is the same, so is its result, to
the rounding of products with fewer rows.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from hizoo_lite.device import gpu_of, is_gpu, kind_of
from hizoo_lite.errors import BudgetError
from hizoo_lite.memory.limits import Budgets
from hizoo_lite.model.model import Model
from hizoo_lite.process import private_bytes, resident, thread_count
from hizoo_lite.units import format_bytes

Result = TypeVar("Result")

#: Halvings after which nothing of a pass is left to be made smaller: see `Model.chunks`.
MOST_CHUNK_HALVINGS = 10

#: What C++ allocators say when they are refused; on CPU there is no exception type of its own. The last are
#: the words of oneDNN and of cuBLAS and cuSPARSE, whose own memory is beside torch's.
_REFUSALS = (
    *("can't allocate memory", "out of memory", "not enough memory", "could not create a primitive"),
    *("status_alloc_failed", "cublas_status_not_initialized"),
)


#: A limit that rose by less is no reason to try again.
_NOTICEABLE_BYTES = 1 << 20


class Cap:
    """The system's limit of memory. This one is none, or cannot be set anew."""

    def renew(self, *, refused: bool = False) -> bool:
        """Set it anew; whether it allows more than before. `refused`: an allocation was."""
        return False


class Budget:
    """What a run may take of the device's memory, and of the host's if that is another one."""

    def __init__(
        self,
        limits: Budgets,
        model: Model,
        report: Callable[[str], None] = lambda text: None,
        cap: Cap | None = None,
    ) -> None:
        self.limits, self.model, self.report, self.cap = limits, model, report, cap or Cap()
        self.retries = 0  # passes that were repeated, or steps that went over

    def fitting(self, work: Callable[[], Result]) -> Result:
        """What `work` gives, repeated in smaller chunks for as long as memory runs out.

        Raises `BudgetError` if nothing smaller exists.
        """
        self.cap.renew()
        while True:
            try:
                return work()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            gc.collect()
            self._give_back()
            if not self.cap.renew(refused=True):
                self._smaller("memory ran out")

    def check(self, peak_bytes: int, host_peak_bytes: int | None = None) -> None:
        """After a step: chunks become smaller if its peak was over the budget.

        host_peak_bytes: of anonymous memory; None if the device is the host.
        """
        if _is_over(peak_bytes, self.limits.device_bytes):
            self._smaller(f"a peak of {format_bytes(peak_bytes)} was over the budget", stop=False)
        elif host_peak_bytes is not None and _is_over(host_peak_bytes, self.limits.host_bytes):
            peak = format_bytes(host_peak_bytes)
            self._smaller(f"a peak of {peak} on the host was over its budget", stop=False)

    def _smaller(self, why: str, stop: bool = True) -> None:
        self.retries += 1
        if self.model.chunk_halvings >= MOST_CHUNK_HALVINGS:
            if stop:
                given = self.limits.device_bytes
                limit = "the memory there is" if given is None else format_bytes(given)
                raise BudgetError(
                    f"--device-budget: {why} and nothing of a pass can be made smaller; {limit} is not enough"
                )
            return
        self.model.chunk_halvings += 1
        self.report(f"{why}: going on with smaller chunks (halved {self.model.chunk_halvings} times)")

    def _give_back(self) -> None:
        self.model.scratch.clear()
        kind_of(self.model.device).empty_cache()


def _is_over(size_bytes: int, limit_bytes: int | None) -> bool:
    return limit_bytes is not None and size_bytes > limit_bytes


@contextmanager
def enforced(limit_bytes: int | None, device: torch.device) -> Iterator[Cap]:
    """While this is open, the system refuses this process memory beyond the budget."""
    if limit_bytes is None:
        yield Cap()
    elif is_gpu(device):
        with gpu_of(device).capped(limit_bytes, device):
            yield Cap()
    else:
        with _data_cap(limit_bytes) as cap:
            yield cap


@contextmanager
def loading() -> Iterator[None]:
    """While this is open memory that is refused is a `BudgetError`: nothing can be made smaller yet."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise BudgetError(
            f"--device-budget: memory ran out while the model was loaded ({error}); "
            "--residency disk needs the least, see hizoo-lite plan"
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation was refused."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in text for words in _REFUSALS)


class _DataCap(Cap):
    """RLIMIT_DATA: what was mapped at first, and what the budget left of anonymous memory then.

    The limit counts what is mapped and never touched. The stacks of later threads are added. What the heap
    has given back is mapped still, and buffers of other sizes do not come to lie there: that is added if
    an allocation was refused although the budget is not used up. It can be touched again, so that a peak may
    pass the budget by some of it; then `Budget.check` makes chunks smaller.
    """

    def __init__(self, limit_bytes: int, taken: int, mapped: int) -> None:
        import resource

        self._resource, self._allowance = resource, mapped - taken
        self.before = resource.getrlimit(resource.RLIMIT_DATA)
        self._ceilings = [limit for limit in self.before if limit != resource.RLIM_INFINITY]
        stack_bytes = resource.getrlimit(resource.RLIMIT_STACK)[0]
        self._stack_bytes = 0 if stack_bytes == resource.RLIM_INFINITY else stack_bytes
        self._limit_bytes, self._threads = limit_bytes, thread_count()
        self._given_back = self._now = 0
        self.renew()

    def renew(self, *, refused: bool = False) -> bool:
        allowance = self._allowance + max(0, thread_count() - self._threads) * self._stack_bytes
        if refused:
            untouched = (private_bytes() or 0) - (resident().anon_bytes or 0)
            self._given_back = max(self._given_back, untouched - allowance)
        before, self._now = self._now, self._limit_bytes + allowance + self._given_back
        self._now = min([*self._ceilings, self._now])
        self._resource.setrlimit(self._resource.RLIMIT_DATA, (self._now, self.before[1]))
        return self._now > before + _NOTICEABLE_BYTES

    def close(self) -> None:
        self._resource.setrlimit(self._resource.RLIMIT_DATA, self.before)


@contextmanager
def _data_cap(limit_bytes: int) -> Iterator[Cap]:
    """A `_DataCap`; nothing if the system has no such limit."""
    taken, mapped = resident().anon_bytes, private_bytes()
    if taken is None or mapped is None:
        yield Cap()
        return
    if limit_bytes <= taken:
        raise BudgetError(
            f"--device-budget: got {format_bytes(limit_bytes)}, but this process has {format_bytes(taken)} "
            "before the model is loaded"
        )
    cap = _DataCap(limit_bytes, taken, mapped)
    try:
        yield cap
    finally:
        cap.close()
