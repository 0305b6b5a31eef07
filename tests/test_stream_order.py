"""Blocks that travel between host, disk and a GPU: nothing touches bytes that it is not ordered behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hizoo_lite.engine.load import load
from hizoo_lite.model.model import Model
from tests.simulated import streams
from tests.simulated.gpu import installed
from tests.test_stream import checkpoint, step_losses

#: Every kind of work once, from host memory or from disk.
FAST = {
    *(("disk", "passes"), ("host", "one slot"), ("disk", "some kept")),
    *(("host", "updates"), ("disk", "refused update")),
}


class Opened:
    """A model of four blocks in nf4, opened on the simulated GPU, and the losses of a pass."""

    def __init__(self, folder: Path) -> None:
        self.folder = checkpoint("llama", "nf4", folder, num_hidden_layers=4)
        with installed():
            self.wanted = step_losses(self.open("resident"), "llama")

    def open(self, residency: str) -> Model:
        return load(
            self.folder,
            compute_dtype="float32",
            device="simgpu",
            residency=residency,  # type: ignore[arg-type]
        )


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    return Opened(tmp_path_factory.mktemp("order"))


@pytest.mark.parametrize(
    ("where", "work"),
    [pytest.param(*one, marks=[] if one in FAST else [pytest.mark.grid]) for one in streams.SCENARIOS],
)
def test_the_order_of_streams_has_no_race(where: str, work: str, opened: Opened, tmp_path: Path) -> None:
    assert streams.races(opened.open, where, work, tmp_path, opened.wanted) == []


@pytest.mark.parametrize("name", streams.VARIANTS)
def test_a_fetcher_that_lacks_an_ordering_is_caught(name: str, opened: Opened, tmp_path: Path) -> None:
    code = streams.variant(name)
    for where, work in (("disk", "passes"), ("disk", "updates"), ("host", "updates")):  # from the quickest on
        found = streams.races(opened.open, where, work, tmp_path / where / work, opened.wanted, code)
        if found:
            assert any("is not after the" in race for race in found), found
            return
    pytest.fail("no scenario has caught it")


def test_what_is_ordered_is_no_race_and_what_is_not_is_one() -> None:
    world = streams.World()
    copies, buffer = streams.Stream(world, "copies"), torch.zeros(8)
    world.track(buffer, "buffer")

    def fill(part: slice) -> Callable[[], None]:
        return lambda: world.op(torch.ops.aten.zero_.default, (buffer[part],), {})

    def submit(stream: streams.Stream, work: Callable[[], None]) -> None:
        with world.on(stream):
            work()

    event = streams.Event(world)
    submit(copies, fill(slice(0, 4)))
    submit(world.compute, fill(slice(4, 8)))  # other bytes
    event.record(copies)
    world.compute.wait_event(event)
    submit(world.compute, fill(slice(2, 6)))  # the same ones, after them
    assert world.races == []
    submit(copies, fill(slice(0, 3)))
    assert len(world.races) == 1
    assert "buffer: write by stream copies" in world.races[0]
