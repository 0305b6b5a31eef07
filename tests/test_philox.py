"""An own Philox: its published answers, what is made of it, and how much memory that takes."""

from __future__ import annotations

import gc
import math

import pytest
import torch
from torch import Tensor

from hizoo_lite import noise, philox
from hizoo_lite.philox import PhiloxUniform, fill_normal
from tests.simulated.gpu import SYNCS, installed

KEY = 0x9E3779B97F4A7C15
FULL = 0xFFFFFFFF
#: Of Random123 1.14, tests/kat_vectors: counter, key, words.
ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((FULL,) * 4, (FULL,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def int32(*words: int) -> Tensor:
    return torch.tensor(words, dtype=torch.int64).to(torch.int32)


def unsigned(words: Tensor) -> list[int]:
    return [word & FULL for word in words.tolist()]


@pytest.mark.parametrize(("counter", "key", "wanted"), ANSWERS)
def test_the_answers_are_those_of_random123(
    counter: tuple[int, ...], key: tuple[int, int], wanted: tuple[int, ...]
) -> None:
    words = philox.philox([int32(word) for word in counter], key[0] | key[1] << 32)
    assert [unsigned(word) for word in words] == [[word] for word in wanted]


def test_many_counters_are_those_of_one() -> None:
    counters = [int32(*(counter[word] for counter, _, _ in ANSWERS)) for word in range(4)]
    together = philox.philox(counters, KEY)
    for place in range(len(ANSWERS)):
        alone = philox.philox([word[place : place + 1] for word in counters], KEY)
        assert [word[place] for word in together] == [word[0] for word in alone]


def test_normal_values_have_the_moments_and_the_tails_of_a_normal() -> None:
    z = fill_normal(torch.empty(1 << 20, 4), KEY).double()
    count = z.numel()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        assert float((z**power).mean()) == pytest.approx(moment, abs=5 * math.sqrt(variance / count))
    for bound in (0.5, 1.0, 2.0, 3.0, 4.0, 5.0):
        chance = math.erfc(bound / math.sqrt(2)) / 2
        for side in (z, -z):
            found = int((side > bound).sum())
            assert abs(found - count * chance) <= 5 * math.sqrt(count * chance) + 1
    # neither the four of a counter nor neighbours know of each other, nor do their sizes
    for values in (z, z.square() - 1):
        products = values.T @ values / len(z)
        limit = 5 * float(values.square().mean()) / math.sqrt(len(z))
        assert (products - torch.diag(products.diag())).abs().max() < limit
        assert abs(float((values[1:] * values[:-1]).mean())) < limit


def test_no_word_makes_an_infinite_value() -> None:
    ends = int32(0, 1, FULL, 1 << 31, (1 << 31) - 1)
    radius, angle = philox._radius(ends), philox._angle(ends)
    assert float(radius[0]) == pytest.approx(math.sqrt(64 * math.log(2)))
    assert torch.isfinite(radius).all()
    assert (radius >= 0).all()
    assert (angle.abs() <= math.pi + 1e-6).all()


@pytest.mark.parametrize("elements", [1, 3, 4, 4 * 64, 4 * 1000 + 3])
def test_slices_do_not_show(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn() -> list[Tensor]:
        source = PhiloxUniform(KEY)
        return [
            fill_normal(torch.full((elements,), torch.nan), KEY),
            *(source.fill(torch.full((elements,), torch.nan)) for _ in range(2)),
        ]

    at_once = drawn()
    monkeypatch.setattr(philox, "SLICE", 64)
    for one, other in zip(at_once, drawn(), strict=True):
        assert torch.isfinite(one).all()
        assert torch.equal(one, other)


def test_uniform_values_are_new_ones_at_every_call_and_lie_below_one() -> None:
    source = PhiloxUniform(KEY)
    first, second = (source.fill(torch.empty(1000, 100)) for _ in range(2))
    assert torch.equal(first, PhiloxUniform(KEY).fill(torch.empty(1000, 100)))
    for drawn in (first, second):
        assert 0 <= float(drawn.min()) < 1e-3
        assert 1 - 1e-3 < float(drawn.max()) < 1
        assert float(drawn.mean()) == pytest.approx(0.5, abs=5 / math.sqrt(12 * drawn.numel()))
        assert torch.equal(drawn * 2**24, (drawn * 2**24).round())
    together = (first.double() - 0.5) * (second.double() - 0.5)
    assert abs(float(together.mean())) < 5 / 12 / math.sqrt(first.numel())


def test_a_gpu_draws_what_a_cpu_would_by_the_same_function(monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn(device: str) -> list[Tensor]:
        made = torch.empty(37, 33, device=device)
        z = noise.tile_normal(1, 2, "a", 64, made).cpu().clone()
        rounding = noise.tile_rounding(1, 2, "a", 64, made.device)
        return [z, rounding.fill(made).cpu().clone(), rounding.fill(made[:, 0].clone()).cpu()]

    with installed():
        there, plain = drawn("simgpu"), drawn("cpu")
        monkeypatch.setattr(noise, "draws_philox", lambda device: True)
        here = drawn("cpu")
    assert all(map(torch.equal, there, here))
    assert not any(map(torch.equal, there, plain))


def test_tile_noise_is_a_pure_function_of_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "draws_philox", lambda device: True)

    def draw(*arguments: int | str) -> Tensor:
        return noise.tile_normal(*arguments, out=torch.empty(8, 33))  # type: ignore[arg-type]

    first = draw(1, 2, "a", 64)
    assert torch.equal(first, draw(1, 2, "a", 64))
    for other in ((2, 2, "a", 64), (1, 3, "a", 64), (1, 2, "b", 64), (1, 2, "a", 0)):
        assert not torch.equal(first, draw(*other))


@pytest.mark.parametrize("elements", [4 * 1000 + 3, 1 << 16, (1 << 18) + 5])
def test_drawing_takes_the_memory_that_is_planned_and_waits_for_nothing(
    elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(philox, "SLICE", 1 << 14)
    with installed() as memory:
        out = torch.empty(elements, device="simgpu")
        gc.collect()
        for draw in (lambda: fill_normal(out, KEY), lambda: PhiloxUniform(KEY).fill(out)):
            memory.peak_bytes = held = memory.live_bytes
            draw()
            taken = memory.peak_bytes - held
            assert 0.8 * workspace_bytes(elements) < taken <= workspace_bytes(elements) + 64
        assert not SYNCS
    assert workspace_bytes(1 << 30) == 52 << 14


#: Bytes of temporaries a counter: the counter, two words in 64 bits, and the two products of two rounds.
COUNTER_BYTES = 4 + 16 + 2 * 16


def workspace_bytes(elements: int) -> int:
    """What drawing a tensor of so many elements takes at most, beside the tensor."""
    return COUNTER_BYTES * min(philox.SLICE, -(-elements // 4))
