"""Random numbers of a GPU that are those of every other one: an own Philox4x32-10, in torch's integer ops.

torch's CUDA generator hands its numbers to threads, of which each model of GPU has a number of its own, so a
seed gives other noise on another one. Here a number is a function of its index and of a key alone (Salmon et
al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), and normal values are made of uniform ones by
Box and Muller (Annals of Mathematical Statistics 29, 1958). Integers and uniform values are the same on every
device, always. Logarithm, sine and cosine are those of the device's library of mathematics: the last bits
of normal values may differ between GPUs of different vendors and between versions of torch or CUDA.

Nothing is copied from the host, so nothing waits. A tile is drawn in slices, whose temporaries are bounded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

#: Counters of a slice, each of which gives four numbers: 14 MiB of temporaries. Launches, 80 a slice, then
#: take as long as the bytes that they move.
SLICE = 1 << 18
#: Bytes that drawing an element reads and writes: in each of ten rounds 32 for the products of a counter, 48
#: and 32 for their halves with the other words and with the key, then about 300; a counter has four elements.
MOVED_BYTES = (10 * (32 + 48 + 32) + 300) // 4

_WORDS, _ROUNDS = 4, 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = (1 << 32) - 1
_EVEN, _ODD = slice(0, None, 2), slice(1, None, 2)

_Four = tuple[Tensor, Tensor, Tensor, Tensor]


def philox(counter: Sequence[Tensor], key: int) -> _Four:
    """Philox4x32-10 of counters.

    Args:
        counter: four words of 32 bits, as int32. The first is (n,), the others are (n,) or (1,).
        key: 64 bits.

    Returns:
        Four words, as int32, (n,) each. Views of larger memory.
    """
    device, count = counter[0].device, len(counter[0])
    # A word lies in the lower half of an int64 whose upper half stays zero, as an unsigned number.
    wide = torch.zeros(2, count, dtype=torch.int64, device=device)
    even = wide.view(torch.int32)[:, _EVEN]  # every machine that torch runs on has the lower half first
    even[0].copy_(counter[0])
    even[1].copy_(counter[2])
    odd = (counter[1], counter[3])
    products = [torch.empty_like(wide) for _ in range(2)]
    for number in range(_ROUNDS):
        product = products[number % 2]
        for row, multiplier in enumerate(_MULTIPLIERS):
            torch.mul(wide[row], multiplier, out=product[row])  # modulo 2^64
        low, high = product.view(torch.int32)[:, _EVEN], product.view(torch.int32)[:, _ODD]
        for row, weyl in enumerate(_WEYL):
            word = torch.bitwise_xor(high[1 - row], odd[row], out=even[row])
            word.bitwise_xor_(_signed((key >> 32 * row) + number * weyl))
        odd = (low[1], low[0])  # read in the next round, whose product is the other one
    return even[0], odd[0], even[1], odd[1]


def _signed(word: int) -> int:
    """The lowest 32 bits as an int32."""
    word &= _MASK
    return word - (1 << 32) if word >> 31 else word


def fill_normal(out: Tensor, key: int) -> Tensor:
    """Fill a contiguous float32 tensor with standard normal values, a function of index and key."""
    _in_slices(out, key, 0, _write_normal)
    return out


def _write_normal(words: _Four, out: Tensor) -> None:
    for pair in (0, 2):
        radius, angle = _radius(words[pair]), _angle(words[pair + 1])
        torch.mul(radius, torch.cos(angle), out=out[:, pair])
        torch.mul(radius, angle.sin_(), out=out[:, pair + 1])


def _radius(word: Tensor) -> Tensor:
    """sqrt(-2 ln u), u in (0, 1]: at most 6.7, and never infinite."""
    counted = word.long().bitwise_and_(_MASK).add_(1)
    return counted.float().mul_(2.0**-32).log_().mul_(-2.0).sqrt_()


def _angle(word: Tensor) -> Tensor:
    """Uniform in [-pi, pi], where float32 is finer than in [0, 2 pi]."""
    return word.float().mul_(math.pi * 2.0**-31)


class PhiloxUniform:
    """`base.Uniform` of a key: every call has numbers of its own."""

    def __init__(self, key: int) -> None:
        self.key, self._calls = key, 0

    def fill(self, out: Tensor) -> Tensor:
        """Multiples of 2^-24 in [0, 1), into a contiguous float32 tensor."""
        _in_slices(out, self.key, self._calls, _write_uniform)
        self._calls += 1
        return out


def _write_uniform(words: _Four, out: Tensor) -> None:
    for column, word in enumerate(words):
        torch.mul((word >> 8).bitwise_and_((1 << 24) - 1), 2.0**-24, out=out[:, column])


def _in_slices(out: Tensor, key: int, call: int, write: Callable[[_Four, Tensor], None]) -> None:
    """Call `write` with words, (n,) each, and what is made of them, (n, 4), until `out` is full.

    The counter is (index of the row of four, 0, call, 0). Elements that are left over get a row of their own.
    """
    flat = out.view(-1)
    rows, left = divmod(flat.numel(), _WORDS)
    whole = flat[: rows * _WORDS].view(rows, _WORDS)
    for first in range(0, rows, SLICE):
        part = whole[first : first + SLICE]
        write(_words(first, len(part), call, key, out.device), part)
    if left:
        row = torch.empty(1, _WORDS, dtype=out.dtype, device=out.device)
        write(_words(rows, 1, call, key, out.device), row)
        flat[rows * _WORDS :].copy_(row[0, :left])


def _words(first: int, count: int, call: int, key: int, device: torch.device) -> _Four:
    index = torch.empty(count, dtype=torch.int32, device=device)
    torch.arange(first, first + count, out=index)
    zero = torch.zeros(1, dtype=torch.int32, device=device)
    return philox((index, zero, torch.full_like(zero, call), zero), key)
