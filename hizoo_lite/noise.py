"""The noise z: a pure function of (run seed, step, parameter name, direction).

Never stored and never through a global seed: any tensor of any step can be drawn again, in any order,
on any machine. The generator is numpy's counter-based Philox with a 128-bit key hashed from the
arguments, so that numpy alone replays a run bit for bit on CPU, on CUDA and beside onnxruntime.
Normal, not +-1: where curvature is learnt, z^2 must vary for the diagonal to be seen.

Weights inside the blocks have too many elements for that (10.8 ms a million, against 2.8 of torch's
normal_ on the same core). Their z is drawn tile by tile of rows by torch's own generator of the device,
seeded with a hash of (run seed, step, parameter name, first row): on CPU a Mersenne twister, whose stream
does not depend on the number of threads, on CUDA a Philox. The two differ, so a run in the weights replays
on its own kind of device only. torch's CPU generator uses 32 bits of its seed: of the 13 000 tiles that
7e9 weights have, two are alike in one step of fifty, which does no harm. torch is imported there alone.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from hizoo_lite.arrays import Arrays, host_arrays
from hizoo_lite.base import Array

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def generator(seed: int, *words: int | str) -> np.random.Generator:
    """A fresh numpy generator whose stream is a pure function of the arguments."""
    text = "\x1f".join([str(int(seed)), *map(str, words)])
    key = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")
    return np.random.Generator(np.random.Philox(key=key))


#: The generators by name, for records: of parameters in memory, and of weights by device.
GENERATORS = {"parameters": "numpy-philox", "cpu": "torch-cpu", "cuda": "torch-cuda"}


def drawn(
    seed: int,
    step: int,
    name: str,
    shape: Sequence[int],
    direction: int = 0,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Standard normal z of parameter `name` at `step`, of one of the step's directions: `shape`, float32.

    out: to be filled, in place of a new array.
    """
    words = (name, direction) if direction else (name,)
    return generator(seed, step, *words).standard_normal(tuple(shape), dtype=np.float32, out=out)


def drawn_along(seed: int, step: int, name: str, shape: Sequence[int], directions: int) -> np.ndarray:
    """`drawn` of every direction of a step: (directions, *shape) float32."""
    out = np.empty((directions, *shape), dtype=np.float32)
    for direction in range(directions):
        drawn(seed, step, name, shape, direction, out[direction, ...])
    return out


def normal(seed: int, step: int, name: str, shape: Sequence[int]) -> Tensor:
    """`drawn` as a tensor, on CPU."""
    import torch

    return torch.from_numpy(drawn(seed, step, name, shape))


def tile_generator(device: torch.device, seed: int, *words: int | str) -> torch.Generator:
    """A fresh torch generator on `device` whose stream is a pure function of the other arguments."""
    from hizoo_lite.device import kind_of

    text = "\x1f".join([str(int(seed)), *map(str, words)])
    key = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
    return kind_of(device).generator(device).manual_seed(key)


def tile_normal(seed: int, step: int, name: str, first_row: int, out: Tensor) -> Tensor:
    """Fill `out`, contiguous float32, with z of rows `first_row` .. of a weight at `step`.

    From torch's generator of out's device ("torch-cpu" or "torch-cuda" in `GENERATORS`). A function of the
    shape of `out` as well: a tile is always drawn whole.
    """
    return out.normal_(generator=tile_generator(out.device, seed, "normal", step, name, first_row))


def tile_rounding(seed: int, step: int, name: str, first_row: int, device: torch.device) -> torch.Generator:
    """The generator that rounds a tile's update at random, independent of its z."""
    return tile_generator(device, seed, "rounding", step, name, first_row)


#: That draw the noise of one step.
MOST_THREADS = 8


class StepNoise:
    """All z of a step for a fixed set of tensors, drawn one step ahead in threads.

    numpy fills arrays without holding the interpreter lock, so the next step's noise costs nothing
    while a traversal computes. Because every draw is pure, neither drawing ahead nor the number of threads
    can change a result.
    """

    def __init__(
        self,
        seed: int,
        shapes: Mapping[str, Sequence[int]],
        arrays: Arrays | None = None,
        directions: int = 1,
    ) -> None:
        self.seed, self.directions = seed, directions
        self.shapes = dict(shapes)
        self._arrays = arrays or host_arrays()
        # Half of the cores, since a CPU may compute meanwhile; one is slower than a GPU's step.
        threads = max(1, min(MOST_THREADS, (os.cpu_count() or 1) // 2))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="noise")
        self._workers = ThreadPoolExecutor(threads, thread_name_prefix="noise")
        self._ahead: tuple[int, Future[dict[str, Array]]] | None = None

    def __call__(self, step: int) -> dict[str, Array]:
        """z of every tensor at `step`, by name, (directions, *shape) float32, on CPU.

        The next step is drawn meanwhile.
        """
        if self._ahead is not None and self._ahead[0] == step:
            drawn = self._ahead[1].result()
        else:
            drawn = self._draw(step)
        self._ahead = (step + 1, self._thread.submit(self._draw, step + 1))
        return drawn

    def close(self) -> None:
        """End the threads."""
        self._thread.shutdown(cancel_futures=True)
        self._workers.shutdown(cancel_futures=True)

    def _draw(self, step: int) -> dict[str, Array]:
        def draw(name: str) -> Array:
            found = drawn_along(self.seed, step, name, self.shapes[name], self.directions)
            return self._arrays.from_numpy(found)

        return dict(zip(self.shapes, self._workers.map(draw, self.shapes), strict=True))
