"""The order of streams: what nothing orders and touches the same bytes is a race, whatever the timing was.

Streams, events and threads of the simulated GPU have vector clocks. Every op on a block's slot, a page-locked
block or a staging buffer is stamped with the stream it was submitted to, every read or write of a file with
its thread. Two accesses to the same bytes, of which one writes and neither is before the other by an event, a
stream, a submission or a thread's result, are a race. So the fetcher itself runs, and no delay or luck is
needed to see one. `VARIANTS` are fetchers that each lack one ordering: a test of the test.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from hizoo_lite import device as devices
from hizoo_lite.curvature import Grouped
from hizoo_lite.engine import fetch, residency, storage
from hizoo_lite.model.model import Model
from hizoo_lite.spaces import Dense
from tests.batches import tiny_task_batch
from tests.simulated.gpu import WATCHERS, DeviceTensor, SimulatedGpu, _line, _waits, installed

Clock = dict[str, int]
#: Where the blocks are, and what is done with them.
SCENARIOS = [
    (where, work)
    for where in ("host", "disk")
    for work in ("passes", "one slot", "some kept", "updates", "refused update")
]


class Access(NamedTuple):
    """Bytes of a buffer, touched by a stream or a thread at its own time."""

    actor: str
    time: int
    first: int
    last: int
    writes: bool
    line: str


class World:
    """Everything that has a clock, and the buffers that are looked at."""

    def __init__(self) -> None:
        self.races: list[str] = []
        self.compute, self.streams = Stream(self, "compute"), 1
        self._threads: dict[str, Clock] = {}
        self._buffers: dict[int, tuple[str, Tensor, list[Access]]] = {}  # by address; kept, so that it stays
        self._local, self._lock = threading.local(), threading.RLock()

    @property
    def thread(self) -> str:
        """The actor that this thread is."""
        return "thread " + threading.current_thread().name

    @property
    def clock(self) -> Clock:
        """This thread's."""
        return self._threads.setdefault(self.thread, {})

    @property
    def stream(self) -> Stream:
        """What this thread submits to."""
        return getattr(self._local, "stream", self.compute)

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        """While this is open this thread submits to `stream`."""
        before, self._local.stream = self.stream, stream
        try:
            yield
        finally:
            self._local.stream = before

    def track(self, tensor: Tensor, name: str) -> None:
        """Look at a buffer from now on."""
        below = tensor.raw if isinstance(tensor, DeviceTensor) else tensor
        with self._lock:
            self._buffers[below.untyped_storage().data_ptr()] = (name, below, [])

    def tracked(self, tensor: Tensor) -> bool:
        """Whether it lies in a buffer that is looked at."""
        return tensor.untyped_storage().data_ptr() in self._buffers

    def on_host(self, tensor: Tensor, writes: bool, line: str) -> None:
        """This thread itself touches a buffer."""
        if self.tracked(tensor):
            self.clock[self.thread] = self.clock.get(self.thread, 0) + 1
            self._touch(tensor, writes, self.thread, self.clock, line)

    def op(self, func: Any, args: Any, kwargs: Any) -> None:
        """An op that was submitted to this thread's stream, or that the host does itself."""
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        touched = [] if views else list(_tensors(func, args, kwargs))
        if not any(self.tracked(tensor) for tensor, _ in touched):
            return
        stream, line = self.stream, _line()
        clock = stream.submit()
        for tensor, writes in touched:
            if self.tracked(tensor):
                self._touch(tensor, writes, stream.name, clock, line)
        if (
            str(func).startswith(("aten.copy_", "aten._copy_from"))
            and _waits(args, kwargs)
            and _crosses(args)
        ):
            stream.synchronize()

    def _touch(self, tensor: Tensor, writes: bool, actor: str, clock: Clock, line: str) -> None:
        first, last = _extent(tensor)
        with self._lock:
            name, _, log = self._buffers[tensor.untyped_storage().data_ptr()]
            for other in log:
                apart = last <= other.first or other.last <= first or not (writes or other.writes)
                if not apart and clock.get(other.actor, 0) < other.time:
                    self.races.append(
                        f"{name}: {'write' if writes else 'read'} by {actor} ({line}) is not after the "
                        f"{'write' if other.writes else 'read'} by {other.actor} ({other.line})"
                    )
            mine = (actor, first, last, writes)
            log[:] = [x for x in log if (x.actor, x.first, x.last, x.writes) != mine]
            log.append(Access(actor, clock[actor], first, last, writes, line))


class Stream:
    """See `hizoo_lite.device.Stream`."""

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name, self.clock = world, f"stream {name}", Clock()

    def submit(self) -> Clock:
        """One op: after what its thread has done, and after what the stream has."""
        own = self.world.clock
        own[self.world.thread] = own.get(self.world.thread, 0) + 1
        _join(self.clock, own)
        self.clock[self.name] = self.clock.get(self.name, 0) + 1
        return self.clock

    def wait_event(self, event: Event) -> None:
        """What comes is after the event."""
        _join(self.clock, self.world.clock)
        _join(self.clock, event.clock)

    def synchronize(self) -> None:
        """This thread is after the stream."""
        _join(self.world.clock, self.clock)


class Event:
    """See `hizoo_lite.device.Event`."""

    def __init__(self, world: World) -> None:
        self.world, self.clock = world, Clock()

    def record(self, stream: Stream | None = None) -> None:
        """What the stream has until now."""
        self.clock = dict((stream or self.world.stream).submit())

    def synchronize(self) -> None:
        """This thread is after the event; after nothing where it was never recorded, as on CUDA."""
        _join(self.world.clock, self.clock)


class ClockedGpu(SimulatedGpu):
    """A simulated GPU whose streams have clocks."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world

    def stream(self, device: torch.device) -> Any:
        self.world.streams += 1
        return Stream(self.world, f"copies {self.world.streams}")

    def event(self, sleeps: bool = False) -> Any:
        return Event(self.world)

    def current_stream(self, device: torch.device) -> Any:
        return self.world.stream

    def on_stream(self, stream: Any, device: torch.device) -> Any:
        return self.world.on(stream)


class Pool:
    """A ThreadPoolExecutor whose jobs are after their submission, and before what asks for their results."""

    def __init__(self, count: int, thread_name_prefix: str, world: World) -> None:
        self._pool, self._world = ThreadPoolExecutor(count, thread_name_prefix=thread_name_prefix), world

    def submit(self, job: Callable[..., Any], *args: Any) -> Future[Any]:
        start, end = dict(self._world.clock), Clock()

        def run() -> Any:
            _join(self._world.clock, start)
            try:
                return job(*args)
            finally:
                end.update(self._world.clock)

        future = self._pool.submit(run)
        result = future.result

        def joined(timeout: float | None = None) -> Any:
            try:
                return result(timeout)
            finally:
                _join(self._world.clock, end)

        future.result = joined  # type: ignore[method-assign]
        return future

    def shutdown(self, **options: Any) -> None:
        self._pool.shutdown(**options)


def _join(clock: Clock, other: Mapping[str, int]) -> None:
    for actor, time in list(other.items()):
        clock[actor] = max(clock.get(actor, 0), time)


def _extent(tensor: Tensor) -> tuple[int, int]:
    """The bytes of its storage from its first to its last element."""
    if tensor.numel() == 0:
        return 0, 0
    first = tensor.storage_offset()
    span = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    return first * tensor.itemsize, (first + span) * tensor.itemsize


def _tensors(func: Any, args: Any, kwargs: Any) -> Iterator[tuple[Tensor, bool]]:
    """The tensors of an op, those of the host below, and whether it writes to them."""
    for number, argument in enumerate(func._schema.arguments):
        value = args[number] if number < len(args) else kwargs.get(argument.name)
        writes = argument.alias_info is not None and argument.alias_info.is_write
        for tensor in tree_leaves(value):
            if isinstance(tensor, Tensor) and not tensor.is_meta:
                yield (tensor.raw if isinstance(tensor, DeviceTensor) else tensor), writes


def _crosses(args: Any) -> bool:
    """Whether a copy is between the device and the host."""
    return isinstance(args[0], DeviceTensor) != isinstance(args[1], DeviceTensor)


@contextmanager
def watched(code: str | None = None) -> Iterator[World]:
    """While this is open blocks travel under a world's eyes; `code`: another text of engine/fetch.py."""
    world = World()
    module = ModuleType(fetch.__name__)
    exec(compile(code or original(), str(fetch.__file__), "exec"), module.__dict__)
    module.__dict__["ThreadPoolExecutor"] = lambda count, thread_name_prefix: Pool(
        count, thread_name_prefix, world
    )
    make, lock = module.__dict__["make_fetcher"], module.__dict__["page_lock"]

    def make_fetcher(where: Any, laid_out: Any, slots: Any, device: torch.device) -> Any:
        for number, slot in enumerate(slots):
            world.track(slot, f"slot {number}")
        return make(where, laid_out, slots, device)

    def staging(data: Tensor, device: torch.device) -> bool:
        world.track(data, "staging")
        return bool(lock(data, device))

    module.__dict__["page_lock"] = staging
    fill, read, write = storage.HostSource.fill, storage.DiskSource.read, storage.DiskSource.write

    def host_fill(self: Any, block: int, first: Any) -> None:
        fill(self, block, first)
        world.track(self.whole(block), f"host block {block}")
        world.on_host(self.whole(block), True, "HostSource.fill")

    def disk_read(self: Any, block: int, out: Tensor) -> None:
        world.on_host(out, True, "DiskSource.read")
        read(self, block, out)

    def disk_write(self: Any, block: int, data: Tensor) -> None:
        world.on_host(data, False, "DiskSource.write")
        write(self, block, data)

    with (
        installed(),
        patch.object(residency, "make_fetcher", make_fetcher),
        patch.object(storage.HostSource, "fill", host_fill),
        patch.object(storage.DiskSource, "read", disk_read),
        patch.object(storage.DiskSource, "write", disk_write),
    ):
        devices.register(ClockedGpu(world))
        WATCHERS.append(world.op)
        try:
            yield world
        finally:
            WATCHERS.remove(world.op)


def run(open_model: Callable[[str], Model], where: str, work: str, folder: Path, wanted: Tensor) -> None:
    """One of `SCENARIOS`, in a world. `wanted`: the losses of a pass; AssertionError for others."""
    from tests.test_stream import step_losses

    model = open_model(where)
    streamed: Any = model.residency
    if work == "one slot":
        streamed.slots = 1
    if work == "some kept":
        streamed._affordable = lambda *_: 2
    if "update" in work:
        _update(model, refuse=work.startswith("refused"), folder=folder)
    else:
        assert all(torch.equal(step_losses(model, "llama"), wanted) for _ in range(3))
    streamed.close()
    if work == "passes":  # laid out anew
        assert torch.equal(step_losses(model, "llama"), wanted)
        streamed.close()


def _update(model: Model, refuse: bool, folder: Path) -> None:
    """Two steps in the weights; where `refuse`, memory runs out in the middle of an update."""
    from tests.test_dense import make_stepper

    space = Dense(update="residual", targets=("q_proj", "k_proj", "v_proj"))  # drawing noise takes seconds
    space.attach(model, seed=0)
    stepper = make_stepper(model, space, Grouped())
    if refuse:
        weights: Any = space.weights
        part, left = weights._by_block[3][2], [1]
        move = part.move

        def refused(*args: Any) -> Any:
            if left:
                left.pop()
                raise MemoryError
            return move(*args)

        def again(work: Callable[[], Any]) -> Any:
            try:
                return work()
            except MemoryError:
                return work()

        part.move = refused
        stepper.traversal.guard = again  # type: ignore[attr-defined]
    for step in range(2):
        stepper.step(step, tiny_task_batch("causal"))
    space.save(folder)
    stepper.close()


def races(
    open_model: Callable[[str], Model],
    where: str,
    work: str,
    folder: Path,
    wanted: Tensor,
    code: str | None = None,
) -> list[str]:
    """Those of a scenario; of a variant also what it computes wrong."""
    with watched(code) as world:
        try:
            run(open_model, where, work, folder, wanted)
        except (AssertionError, RuntimeError) as error:
            if code is None:
                raise
            logging.getLogger(__name__).debug("a variant failed: %s", error)
            return [*world.races, f"{type(error).__name__}: {error}"]
        return world.races


def original() -> str:
    """The text of engine/fetch.py."""
    return Path(str(fetch.__file__)).read_text(encoding="utf-8")


_FILLED = "            self.slots[slot][:nbytes].copy_(host[:nbytes], non_blocking=True)\n"
_COPY_OUT = (
    "        with self._gpu.on_stream(self._copies, self._device):\n"
    "            self._copies.wait_event(updated)\n"
)
_OWN_STREAM = (
    "        outs = self.__dict__.setdefault('_outs', self._gpu.stream(self._device))\n"
    "        with self._gpu.on_stream(outs, self._device):\n"
    "            outs.wait_event(updated)\n"
)
#: Fetchers that each lack one ordering: what is replaced in engine/fetch.py, and by what.
VARIANTS: dict[str, tuple[str, str]] = {
    "a copy in does not wait for a free slot": (
        "            self._copies.wait_event(self._free[slot])\n",
        "",
    ),
    "the computation does not wait for a copy in": (
        "        self._gpu.current_stream(self._device).wait_event(self._ready[slot])\n",
        "",
    ),
    "a copy out does not wait for the update": ("            self._copies.wait_event(updated)\n", ""),
    "a free slot is not recorded": (
        "        self._free[slot].record(self._gpu.current_stream(self._device))\n",
        "",
    ),
    "a staging buffer is read into before it was copied from": (
        "        self._staged[slot].synchronize()  # in the thread: the loop goes on\n",
        "",
    ),
    "a copied staging buffer is not recorded": ("        self._staged[slot].record(self._copies)\n", ""),
    "a block is written before it was copied out": (
        "        self._ready[slot].synchronize()  # in the thread\n",
        "",
    ),
    "a filled slot is not recorded": (
        f"{_FILLED}            self._ready[slot].record(self._copies)\n",
        _FILLED,
    ),
    "copies out have a stream of their own": (_COPY_OUT, _OWN_STREAM),
}


def variant(name: str) -> str:
    """The text of a variant."""
    old, new = VARIANTS[name]
    text = original()
    assert text.count(old) == 1, f"engine/fetch.py has changed: {old!r} is there {text.count(old)} times"
    return text.replace(old, new)
