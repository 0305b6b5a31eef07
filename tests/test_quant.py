"""Stored forms: the bytes are bitsandbytes' own, and unpacking is exact for every shape and row range."""

from __future__ import annotations

import json

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor

from hizoo_lite.errors import UserError
from hizoo_lite.quant import FourBitWeight, Int8Weight, PlainWeight, from_checkpoint, native, pack, pack_rows
from hizoo_lite.quant import rows as row_module

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GOOD_SHAPES = [(64, 128), (7, 64), (33, 192), (1, 256), (300, 64)]
#: in_features that are no multiple of the block size, odd ones and odd numbers of rows among them.
BAD_SHAPES = [(64, 96), (5, 80), (3, 1504), (7, 33), (8, 33), (1, 1), (5, 63), (129, 65)]
#: Mean error of 4-bit codes with blocks of 64 on unit normal values: NF4 0.073, FP4 0.096 (measured);
#: a misplaced absmax or nibble gives 0.14 and more.
MEAN_ERROR = {"nf4": 0.08, "fp4": 0.11}
#: A whole-matrix mean over few elements scatters; smaller matrices only get the bit-exact comparison.
ELEMENTS_FOR_A_MEAN = 2000


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain_reference(weight: FourBitWeight) -> Tensor:
    """Nibble by nibble through the code table, with absmax undone in plain torch; float32."""
    elements = weight.shape[0] * weight.shape[1]
    nibbles = torch.tensor([half for byte in weight.codes.tolist() for half in (byte >> 4, byte & 15)])[
        :elements
    ]
    absmax = weight.absmax
    if weight.double_quant:
        scale = weight.nested_absmax.repeat_interleave(256)[: absmax.numel()]
        absmax = weight.nested_table[absmax.long()] * scale + weight.offset
    values = weight.table[nibbles] * absmax.repeat_interleave(weight.blocksize)[:elements]
    return values.view(weight.shape)


def unpacked(weight: FourBitWeight | Int8Weight | PlainWeight, dtype: torch.dtype) -> Tensor:
    return weight.unpack(torch.full(weight.shape, float("nan"), dtype=dtype))


@pytest.mark.parametrize("bits", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", GOOD_SHAPES + BAD_SHAPES)
def test_four_bit_bytes_equal_bitsandbytes(bits, double_quant, shape):
    weight = normal(*shape)
    packed = pack(weight, bits, double_quant=double_quant)
    codes, state = bnb.quantize_4bit(weight, blocksize=64, quant_type=bits, compress_statistics=double_quant)
    assert torch.equal(packed.codes, codes.view(-1))
    assert torch.equal(packed.absmax, state.absmax)
    if double_quant:
        assert torch.equal(packed.nested_absmax, state.state2.absmax)
        assert torch.equal(packed.nested_table, state.state2.code)
        assert torch.equal(packed.offset, state.offset)


@pytest.mark.parametrize("bits", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", GOOD_SHAPES)
def test_unpacking_equals_bitsandbytes_dequantization(bits, double_quant, dtype, shape):
    weight = normal(*shape)
    codes, state = bnb.quantize_4bit(weight, blocksize=64, quant_type=bits, compress_statistics=double_quant)
    state.dtype = dtype
    got = unpacked(pack(weight, bits, double_quant=double_quant), dtype)
    assert torch.equal(got, bnb.dequantize_4bit(codes, state))


@pytest.mark.parametrize("bits", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", BAD_SHAPES)
def test_unpacking_equals_the_code_table_where_rows_are_not_whole_blocks(bits, double_quant, dtype, shape):
    weight = normal(*shape)
    packed = pack(weight, bits, double_quant=double_quant)
    got = unpacked(packed, dtype)
    assert torch.equal(got, plain_reference(packed).to(dtype))
    if weight.numel() >= ELEMENTS_FOR_A_MEAN:
        assert (got.float() - weight).abs().mean() < MEAN_ERROR[bits]


@pytest.mark.parametrize("columns", [64, 96, 33, 80])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_row_range_equals_those_rows_of_the_whole(columns, dtype):
    # 600 rows of 64 make more than 256 blocks: ranges begin inside of the second level's blocks too
    packed = pack(normal(600, columns), "nf4")
    whole = unpacked(packed, dtype)
    for first, count in [(0, 1), (1, 1), (2, 3), (63, 2), (64, 64), (255, 7), (300, 300), (599, 1), (5, 0)]:
        out = torch.full((count, columns), float("nan"), dtype=dtype)
        assert torch.equal(packed.unpack(out, first), whole[first : first + count]), (first, count)


@pytest.mark.parametrize("bits", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("columns", [96, 33, 64])
def test_quantizing_in_row_chunks_equals_quantizing_whole(bits, columns, monkeypatch):
    weight = normal(200, columns).to(torch.bfloat16)
    whole = pack(weight, bits)
    monkeypatch.setattr(row_module, "CHUNK_ELEMENTS", 700)
    asked = []

    def read(start, stop):
        asked.append((start, stop))
        return weight[start:stop]

    chunked = pack_rows(read, (200, columns), bits, dtype=weight.dtype)
    assert len(asked) > 2
    assert all(torch.equal(a, b) for a, b in zip(chunked.buffers(), whole.buffers(), strict=True))


def test_torch_decoder_equals_native_kernel(monkeypatch):
    packed = pack(normal(70, 128), "nf4")
    native_result = unpacked(packed, torch.bfloat16)
    monkeypatch.setattr(native, "_kernel_is_exact", lambda *_: False)
    monkeypatch.setattr(native, "_TORCH_CHUNK", 100)  # chunks that end inside a byte's block
    assert torch.equal(unpacked(packed, torch.bfloat16), native_result)


def test_a_kernel_that_is_wrong_is_not_used(monkeypatch, caplog):
    native._kernel_is_exact.cache_clear()
    monkeypatch.setattr(native, "_call_kernel", lambda kernel, codes, absmax, out, blocksize: out.fill_(1.0))
    try:
        packed = pack(normal(4, 128), "nf4")
        assert torch.equal(unpacked(packed, torch.float32), plain_reference(packed))
        assert "is not exact here" in caplog.text
    finally:
        native._kernel_is_exact.cache_clear()


def test_a_missing_kernel_falls_back_to_torch(monkeypatch, caplog):
    def missing(*_):
        raise RuntimeError("Method not available")

    native._kernel_is_exact.cache_clear()
    monkeypatch.setattr(native, "_call_kernel", missing)
    try:
        packed = pack(normal(4, 128), "fp4")
        assert torch.equal(unpacked(packed, torch.float32), plain_reference(packed))
        assert "no native fp4 decoder" in caplog.text
    finally:
        native._kernel_is_exact.cache_clear()


def test_unpacking_leaves_the_packed_bytes_alone():
    for bits in ("nf4", "fp4", "int8", "none"):
        packed = pack(normal(40, 96), bits)
        before = {name: buffer.clone() for name, buffer in packed.state_dict().items()}
        for dtype in DTYPES:
            unpacked(packed, dtype)
        assert len(before) > 0
        assert all(torch.equal(before[n], b) for n, b in packed.state_dict().items()), bits


def test_double_quantization_stores_little_over_half_a_byte_a_parameter():
    weight = normal(1024, 1024)
    tables_bytes = 16 * 4 + 256 * 4 + 4
    blocks = weight.numel() // 64
    assert pack(weight, "nf4").nbytes() == weight.numel() // 2 + blocks + blocks // 256 * 4 + tables_bytes
    assert pack(weight, "nf4", double_quant=False).nbytes() == weight.numel() // 2 + blocks * 4 + 16 * 4


@pytest.mark.parametrize("stored", DTYPES)
def test_int8_codes_equal_bitsandbytes(stored):
    weight = normal(37, 50).to(stored)
    codes, absmax, _ = bnb.int8_vectorwise_quant(weight.half())
    packed = pack(weight, "int8")
    assert torch.equal(packed.codes, codes)
    assert torch.equal(packed.scb, absmax)


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_codes_times_row_scale_equal_bitsandbytes_dequantization(dtype):
    packed = pack(normal(37, 50), "int8")
    out = unpacked(packed, dtype)
    assert torch.equal(out * 128, packed.codes.to(dtype))
    assert packed.row_scale.dtype == torch.float32
    expected = bnb.int8_vectorwise_dequant(packed.codes, packed.scb)
    # bitsandbytes multiplies by a rounded 1/127, we multiply by 128 / 127: one unit in the last place, twice
    torch.testing.assert_close(out.float() * packed.row_scale[:, None], expected, rtol=3e-7, atol=0)
    assert torch.equal(packed.unpack(torch.empty(3, 50, dtype=dtype), 20), out[20:23])


def test_plain_weight_is_ready_only_in_its_own_dtype_and_shares_memory():
    weight = normal(6, 10).to(torch.bfloat16)
    plain = pack(weight, "none")
    assert plain.ready(torch.bfloat16).data_ptr() == weight.data_ptr()
    assert plain.ready(torch.float32) is None
    assert torch.equal(plain.unpack(torch.empty(2, 10), 3), weight[3:5].float())
    assert pack(normal(6, 10), "nf4").ready(torch.float32) is None


def saved_by_bitsandbytes(weight: Tensor, bits: str, double_quant: bool = True, storage=torch.uint8) -> dict:
    codes, state = bnb.quantize_4bit(
        weight, blocksize=64, quant_type=bits, compress_statistics=double_quant, quant_storage=storage
    )
    return {"weight": codes, **{f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}}


@pytest.mark.parametrize("bits", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_tensors_saved_by_bitsandbytes_are_taken_over_as_they_are(bits, double_quant, storage):
    weight = normal(24, 64)
    tensors = saved_by_bitsandbytes(weight, bits, double_quant, storage)
    got, expected = from_checkpoint(tensors), pack(weight, bits, double_quant=double_quant)
    assert (got.shape, got.bits) == ((24, 64), bits)
    assert all(torch.equal(a, b) for a, b in zip(got.buffers(), expected.buffers(), strict=True))


def changed_state(tensors: dict, **changes: object) -> dict:
    key = next(key for key in tensors if "quant_state" in key)
    state = {**json.loads(bytes(tensors[key].tolist())), **changes}
    return {**tensors, key: torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)}


def without(tensors: dict, name: str) -> dict:
    return {key: value for key, value in tensors.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: changed_state(t, blocksize=48), r"layer: .* blocksize 48"),
        (lambda t: changed_state(t, quant_type="nf5"), r"quant_type 'nf5'"),
        (lambda t: changed_state(t, shape=[8]), r"two dimensions"),
        (lambda t: changed_state(t, shape=[8, 640]), r"2560 bytes of codes .* wanted, got 256"),
        (lambda t: changed_state(t, nested_blocksize=128), r"nested_blocksize 128; allowed is 256"),
        (lambda t: without(t, "weight.absmax"), r"weight\.absmax is missing"),
        (lambda t: without(t, "weight.nested_absmax"), r"weight\.nested_absmax is missing"),
        (lambda t: {**t, "weight.quant_map": torch.zeros(16)}, r"not the nf4 table"),
        (
            lambda t: {**t, "weight.quant_state.bitsandbytes__nf4": torch.zeros(3, dtype=torch.uint8)},
            r"is not JSON",
        ),
        (
            lambda t: {
                **t,
                "weight.quant_state.bitsandbytes__nf4": torch.tensor(list(b"{}"), dtype=torch.uint8),
            },
            r"lacks \['blocksize', 'quant_type', 'shape'\]",
        ),
        (
            lambda t: {**t, "weight.quant_state.bitsandbytes__fp4": torch.zeros(3, dtype=torch.uint8)},
            r"one weight\.quant_state",
        ),
    ],
)
def test_four_bit_tensors_that_do_not_fit_are_refused_by_name(change, message):
    tensors = change(saved_by_bitsandbytes(normal(8, 64), "nf4"))
    with pytest.raises(UserError, match=message):
        from_checkpoint(tensors, name="layer")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"weight": torch.zeros(2, 3, dtype=torch.int8), "SCB": torch.zeros(3)}, r"layer: 8-bit weight"),
        ({"SCB": torch.zeros(3)}, r"weight and SCB wanted"),
        (
            {
                "weight": torch.zeros(3, 3, dtype=torch.int8),
                "SCB": torch.zeros(3),
                "weight_format": torch.tensor(2, dtype=torch.uint8),
            },
            r"weight_format 2",
        ),
        ({}, r"weight is missing"),
        ({"weight": torch.zeros(3, 3, dtype=torch.int32)}, r"layer: weight: .*int32"),
    ],
)
def test_other_tensors_that_do_not_fit_are_refused_by_name(tensors, message):
    with pytest.raises(UserError, match=message):
        from_checkpoint(tensors, name="layer")


@pytest.mark.parametrize("bits", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(bits, value):
    weight = normal(4, 64)
    weight[2, 3] = value
    with pytest.raises(UserError, match=r"layer\.weight: holds values that are not finite"):
        pack(weight, bits, name="layer.weight")


def test_int8_refuses_values_beyond_float16():
    with pytest.raises(UserError, match=r"not finite \(in float16\)"):
        pack(normal(4, 64) * 1e6, "int8")


def test_unknown_bits_are_refused():
    with pytest.raises(UserError, match=r"bits: got 'int3', allowed are nf4, fp4, int8, none"):
        pack(normal(4, 64), "int3")


@pytest.mark.parametrize(
    ("out", "first", "message"),
    [
        (torch.empty(2, 63), 0, r"\(rows, 64\) wanted"),
        (torch.empty(64, 2).t(), 0, r"contiguous"),
        (torch.empty(2, 64), 7, r"rows 7 \.\. 9 are outside of a matrix of 8 rows"),
        (torch.empty(2, 64), -1, r"rows -1"),
        (torch.empty(2, 64, dtype=torch.float64), 0, r"got torch\.float64"),
    ],
)
@pytest.mark.parametrize("bits", ["nf4", "int8", "none"])
def test_unpacking_refuses_outputs_that_do_not_fit(bits, out, first, message):
    with pytest.raises(ValueError, match=message):
        pack(normal(8, 64), bits).unpack(out, first)


def test_constructors_refuse_wrong_sizes():
    with pytest.raises(ValueError, match="bytes of codes"):
        FourBitWeight("nf4", (2, 64), torch.zeros(3, dtype=torch.uint8), torch.zeros(2))
    with pytest.raises(ValueError, match="int8 codes"):
        Int8Weight(torch.zeros(2, 2), torch.zeros(2))
    with pytest.raises(ValueError, match="weight: "):
        PlainWeight(torch.zeros(2))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("bits", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", GOOD_SHAPES + BAD_SHAPES)
def test_cuda_unpacking_equals_cpu_unpacking(bits, dtype, shape):
    packed = pack(normal(*shape), bits)
    on_cpu = unpacked(packed, dtype)
    packed = packed.cuda()
    first, count = shape[0] // 3, shape[0] - shape[0] // 3
    out = torch.empty(count, shape[1], dtype=dtype, device="cuda")
    torch.cuda.set_sync_debug_mode("error")  # nothing may wait for the device
    try:
        packed.unpack(out, first)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(out.cpu(), on_cpu[first:])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("bits", ["nf4", "fp4"])
def test_cuda_quantizing_in_chunks_equals_bitsandbytes(bits):
    weight = normal(3000, 256).cuda().to(torch.bfloat16)
    codes, state = bnb.quantize_4bit(weight, blocksize=64, quant_type=bits, compress_statistics=True)
    packed = pack(weight, bits)
    assert torch.equal(packed.codes, codes.view(-1))
    assert torch.equal(packed.absmax, state.absmax)
