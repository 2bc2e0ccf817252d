"""NF4 against bitsandbytes: the same bytes, and the same numbers bit for bit."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes import functional
from torch import Tensor

from eightgig.quant import nf4
from eightgig.quant.layout import FourBitFormat, four_bit_layout
from eightgig.quant.manifest import StoredTensor
from eightgig.quant.nf4 import (
    DYNAMIC_TABLE,
    FP4_CODE,
    FP4_TABLE,
    NF4_CODE,
    NF4_TABLE,
    QuantizedTensor,
    code_table_tensors,
    dequantize,
    dynamic_map,
    quantize_nf4,
    write_quantized,
)

# Rows that are no whole blocks, blocks that are no whole nested blocks, one row, one block.
SHAPES = [(1, 64), (3, 22), (7, 96), (64, 64), (130, 128), (33, 1026), (257, 640)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TABLES = {NF4_TABLE: NF4_CODE, FP4_TABLE: FP4_CODE, DYNAMIC_TABLE: dynamic_map()}


def make_weight(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers with outliers, exact zeros and a block of zeros."""
    generator = torch.Generator().manual_seed(sum(shape))
    weight = torch.randn(shape, generator=generator) * 0.02
    flat = weight.view(-1)
    flat[::97] *= 30
    flat[5::41] = 0
    if flat.numel() >= 256:
        flat[128:192] = 0
    return weight.to(dtype)


def pack(
    quantized: QuantizedTensor, *, table: str = NF4_TABLE, dtype: str = "float32"
) -> tuple[Tensor, StoredTensor]:
    nested_size = quantized.nested_block_size if quantized.nested_absmax is not None else None
    stored, size_bytes = four_bit_layout(
        quantized.shape,
        dtype=dtype,
        four_bit_format=FourBitFormat(
            block_size=quantized.block_size, nested_block_size=nested_size, code_table=table
        ),
    )
    blob = torch.zeros(size_bytes, dtype=torch.uint8)
    return blob, write_quantized(blob, stored, quantized)


def from_bitsandbytes(
    weight: Tensor, *, block_size: int = 64, nested: bool = True, kind: str = "nf4"
) -> tuple[QuantizedTensor, Tensor, functional.QuantState]:
    codes, state = functional.quantize_4bit(
        weight, blocksize=block_size, quant_type=kind, compress_statistics=nested
    )
    quantized = QuantizedTensor(
        codes=codes.reshape(-1),
        absmax=state.absmax,
        nested_absmax=state.state2.absmax if nested else None,
        mean=state.offset.item() if nested else 0.0,
        block_size=block_size,
        shape=tuple(weight.shape),
    )
    return quantized, codes, state


def their_numbers(codes: Tensor, state: functional.QuantState, dtype: torch.dtype) -> Tensor:
    # As one row: with AVX-512 bitsandbytes reads wrong maxima where rows are no whole blocks
    # (backends/cpu, 0.50.2); its CUDA kernels do not.
    shape = state.shape
    state.shape, state.dtype = torch.Size([shape.numel()]), dtype
    numbers = functional.dequantize_4bit(codes, state)
    state.shape = shape
    return numbers.view(shape)


def our_numbers(quantized: QuantizedTensor, dtype: torch.dtype, *, table: str = "nf4") -> Tensor:
    blob, stored = pack(quantized, table=table)
    tables = code_table_tensors(TABLES, torch.device("cpu"))
    return dequantize(blob, stored, tables, out=torch.empty(quantized.shape, dtype=dtype))


def assert_same_bytes(left: QuantizedTensor, right: QuantizedTensor) -> None:
    assert torch.equal(left.codes, right.codes)
    assert torch.equal(left.absmax, right.absmax)
    assert left.absmax.dtype == right.absmax.dtype
    assert left.mean == right.mean
    if left.nested_absmax is None or right.nested_absmax is None:
        assert left.nested_absmax is right.nested_absmax
    else:
        assert torch.equal(left.nested_absmax, right.nested_absmax)


def test_the_tables_are_those_of_bitsandbytes() -> None:
    cpu = torch.device("cpu")
    tables = code_table_tensors(TABLES, cpu)
    assert torch.equal(tables[NF4_TABLE], functional.get_4bit_type("nf4", device=cpu))
    assert torch.equal(tables[FP4_TABLE], functional.get_4bit_type("fp4", device=cpu))
    _, state = functional.quantize_blockwise(torch.ones(64))
    assert torch.equal(tables[DYNAMIC_TABLE], state.code)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_bytes_equal_those_of_bitsandbytes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = make_weight(shape, dtype)
    theirs, _, _ = from_bitsandbytes(weight)
    assert_same_bytes(quantize_nf4(weight, offset=theirs.mean), theirs)
    assert_same_bytes(quantize_nf4(weight), theirs)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("block_size", [32, 128, 4096])
def test_bytes_of_other_formats_equal_those_of_bitsandbytes(block_size: int, nested: bool) -> None:
    weight = make_weight((70, 130))
    theirs, _, _ = from_bitsandbytes(weight, block_size=block_size, nested=nested)
    assert_same_bytes(quantize_nf4(weight, block_size=block_size, nested=nested), theirs)


def test_a_weight_quantised_in_slices_equals_one_quantised_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight = make_weight((130, 128))
    whole, _, _ = from_bitsandbytes(weight)
    monkeypatch.setattr(nf4, "_CPU_SLICE", 4096)  # of 16,640 values
    assert_same_bytes(quantize_nf4(weight), whole)


def test_the_given_offset_is_subtracted_from_the_maxima() -> None:
    weight = make_weight((64, 64))
    usual = quantize_nf4(weight)
    moved = quantize_nf4(weight, offset=usual.mean / 2)
    assert moved.mean == pytest.approx(usual.mean / 2)
    assert torch.equal(moved.codes, usual.codes)
    assert not torch.equal(moved.absmax, usual.absmax)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_numbers_equal_those_of_bitsandbytes(
    shape: tuple[int, int], nested: bool, dtype: torch.dtype
) -> None:
    quantized, codes, state = from_bitsandbytes(make_weight(shape), nested=nested)
    assert torch.equal(our_numbers(quantized, dtype), their_numbers(codes, state, dtype))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("block_size", nf4.BLOCK_SIZES)
def test_numbers_equal_those_of_bitsandbytes_for_every_block_size(
    block_size: int, kind: str
) -> None:
    weight = make_weight((70, 130))
    quantized, codes, state = from_bitsandbytes(weight, block_size=block_size, kind=kind)
    ours = our_numbers(quantized, torch.bfloat16, table=kind)
    assert torch.equal(ours, their_numbers(codes, state, torch.bfloat16))


def test_maxima_that_come_back_negative_equal_those_of_bitsandbytes() -> None:
    weight = make_weight((64, 64))
    weight[:32] *= 1e-4  # far below the mean: code * nested maximum + mean crosses 0
    quantized, codes, state = from_bitsandbytes(weight)
    theirs = their_numbers(codes, state, torch.float32)
    assert torch.equal(our_numbers(quantized, torch.float32), theirs)


@pytest.mark.parametrize("shape", [(3, 5), (9, 65), (1, 1)])
def test_an_odd_number_of_values_reads_back_value_by_value(shape: tuple[int, int]) -> None:
    quantized = quantize_nf4(make_weight(shape), nested=False)
    nibbles = [half for byte in quantized.codes.tolist() for half in (byte >> 4, byte & 15)]
    codes = torch.tensor(NF4_CODE)
    ours = our_numbers(quantized, torch.float32).view(-1)
    for position, value in enumerate(ours):
        assert value == codes[nibbles[position]] * quantized.absmax[position // 64], position


@pytest.mark.parametrize("shape", [(130, 128), (130, 96), (61, 22), (9, 65)])
def test_slices_of_rows_do_not_change_numbers(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    quantized = quantize_nf4(make_weight(shape))
    whole = our_numbers(quantized, torch.float32)
    monkeypatch.setattr(nf4, "_CPU_SLICE", 256)
    assert torch.equal(our_numbers(quantized, torch.float32), whole)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_may_lie_apart(dtype: torch.dtype) -> None:
    quantized = quantize_nf4(make_weight((33, 96)))
    blob, stored = pack(quantized)
    tables = code_table_tensors(TABLES, blob.device)
    scratch = torch.full((40, 112), torch.nan, dtype=dtype)
    out = scratch[2:35, :96]
    assert dequantize(blob, stored, tables, out=out) is out
    assert torch.equal(out, our_numbers(quantized, dtype))
    assert scratch[:, 96:].isnan().all()
    assert scratch[:2].isnan().all()


def test_a_blob_may_be_the_beginning_of_a_longer_slot() -> None:
    quantized = quantize_nf4(make_weight((33, 96)))
    blob, stored = pack(quantized)
    slot = torch.cat([blob, torch.full((512,), 255, dtype=torch.uint8)])
    tables = code_table_tensors(TABLES, blob.device)
    out = dequantize(slot, stored, tables, out=torch.empty(33, 96))
    assert torch.equal(out, our_numbers(quantized, torch.float32))


def test_a_dense_tensor_is_copied_and_converted() -> None:
    weight = make_weight((5, 6), torch.bfloat16)
    stored = StoredTensor(
        format="dense", shape=(5, 6), dtype="bfloat16", offset_bytes=256, size_bytes=60
    )
    blob = torch.zeros(512, dtype=torch.uint8)
    nf4.dense_view(blob, stored).copy_(weight)
    out = dequantize(blob, stored, {}, out=torch.empty(5, 8)[:, :6])
    assert torch.equal(out, weight.float())


def test_given_the_mean_bytes_do_not_depend_on_the_number_of_threads() -> None:
    weight = make_weight((512, 640))
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            results.append(quantize_nf4(weight, offset=0.0625))
    finally:
        torch.set_num_threads(threads)
    assert_same_bytes(*results)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_bytes_and_numbers_equal_those_of_bitsandbytes_on_the_gpu(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    device = torch.device("cuda")
    weight = make_weight(shape, dtype)
    theirs, codes, state = from_bitsandbytes(weight.to(device))
    ours = quantize_nf4(weight, device=device)
    assert_same_bytes(ours, theirs)
    blob, stored = pack(ours)
    tables = code_table_tensors(TABLES, device)
    out = torch.empty(shape, dtype=dtype, device=device)
    assert torch.equal(
        dequantize(blob.to(device), stored, tables, out=out), their_numbers(codes, state, dtype)
    )
