"""The noise z: a pure function of (run seed, step, parameter name, direction).

Never stored and never through a global seed: any tensor of any step can be drawn again, in any order,
on any machine. The generator is numpy's counter-based Philox with a 128-bit key hashed from the
arguments, so that numpy alone replays a run bit for bit on CPU, on CUDA and beside onnxruntime.
Normal, not +-1, unless an estimator says so: if curvature is learnt, z^2 must vary for the diagonal to be
seen.

Weights inside the blocks have too many elements for that (10.8 ms a million, against 2.8 of torch's
normal_ on the same core). Their z is drawn tile by tile of rows where they are, from a hash of (run seed,
step, parameter name, first row): on CPU by torch's Mersenne twister, whose stream does not depend on the
number of threads, on a GPU by a Philox of our own (`philox.py`), whose numbers do not depend on the model of
GPU as those of torch do. The two differ, so a run in the weights replays on its own kind of device only.
torch's CPU generator uses 32 bits of its seed: of the 13 000 tiles that 7e9 weights have, two are alike in
one step of fifty, which does no harm. torch is imported there alone.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol

import numpy as np

from hizoo_lite.arrays import Array, Arrays

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from hizoo_lite.base import NoiseLaw


def generator(seed: int, *words: int | str) -> np.random.Generator:
    """A fresh numpy generator whose stream is a pure function of the arguments."""
    text = "\x1f".join([str(int(seed)), *map(str, words)])
    key = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")
    return np.random.Generator(np.random.Philox(key=key))


#: The generators by name, for records: of parameters in memory, and of weights by kind of device.
GENERATORS = {"parameters": "numpy-philox", "cpu": "torch-cpu", "cuda": "philox-4x32-10"}


def drawn(
    seed: int,
    step: int,
    name: str,
    shape: Sequence[int],
    direction: int = 0,
    out: np.ndarray | None = None,
    law: NoiseLaw = "normal",
) -> np.ndarray:
    """z of parameter `name` at `step`, of one of the step's directions: `shape`, float32.

    out: to be filled, in place of a new array. law: standard normal, or signs, which are those of the normal.
    """
    words = (name, direction) if direction else (name,)
    z = generator(seed, step, *words).standard_normal(tuple(shape), dtype=np.float32, out=out)
    return z if law == "normal" else np.copysign(np.float32(1.0), z, out=z)


def drawn_along(
    seed: int, step: int, name: str, shape: Sequence[int], directions: int, law: NoiseLaw = "normal"
) -> np.ndarray:
    """`drawn` of every direction of a step: (directions, *shape) float32."""
    out = np.empty((directions, *shape), dtype=np.float32)
    for direction in range(directions):
        drawn(seed, step, name, shape, direction, out[direction, ...], law)
    return out


def normal(seed: int, step: int, name: str, shape: Sequence[int]) -> Tensor:
    """`drawn` as a tensor, on CPU."""
    import torch

    return torch.from_numpy(drawn(seed, step, name, shape))


class Uniform(Protocol):
    """Random numbers for rounding; every call gives new ones."""

    def fill(self, out: Tensor) -> Tensor:
        """Fill a contiguous float32 tensor with multiples of 2^-24 in [0, 1), and give it back."""


class TorchUniform:
    """`Uniform` of a generator of torch's."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def fill(self, out: Tensor) -> Tensor:
        """See `Uniform.fill`."""
        return out if out.is_meta else out.uniform_(generator=self.generator)


def draws_philox(device: torch.device) -> bool:
    """Whether the noise of weights on a device is that of `philox.py`: on every GPU."""
    from hizoo_lite.device import like

    return like(device) == "cuda"


def tile_normal(seed: int, step: int, name: str, first_row: int, out: Tensor) -> Tensor:
    """Fill `out`, contiguous float32, with z of rows `first_row` .. of a weight at `step`.

    From the generator of out's device in `GENERATORS`. A function of the shape of `out` as well: a tile is
    always drawn whole.
    """
    key = _key(seed, "normal", step, name, first_row)
    if draws_philox(out.device):
        from hizoo_lite.philox import fill_normal

        return fill_normal(out, key)
    return out if out.is_meta else out.normal_(generator=_torch_generator(key))


def tile_rounding(seed: int, step: int, name: str, first_row: int, device: torch.device) -> Uniform:
    """What rounds a tile's update at random, independent of its z."""
    key = _key(seed, "rounding", step, name, first_row)
    if draws_philox(device):
        from hizoo_lite.philox import PhiloxUniform

        return PhiloxUniform(key)
    return TorchUniform(_torch_generator(key))


def _key(seed: int, *words: int | str) -> int:
    """64 bits that are a pure function of the arguments."""
    text = "\x1f".join([str(int(seed)), *map(str, words)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _torch_generator(key: int) -> torch.Generator:
    import torch

    return torch.Generator().manual_seed(key)


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
        arrays: Arrays,
        directions: int = 1,
        law: NoiseLaw = "normal",
    ) -> None:
        self.seed, self.directions, self.law = seed, directions, law
        self.shapes = dict(shapes)
        self._arrays = arrays
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
            found = drawn_along(self.seed, step, name, self.shapes[name], self.directions, self.law)
            return self._arrays.from_numpy(found)

        return dict(zip(self.shapes, self._workers.map(draw, self.shapes), strict=True))
