"""NF4: quantisation through bitsandbytes, and the plain definition of dequantisation.

A tensor is cut into blocks of `block_size` values in memory order. Each block keeps its largest
magnitude (absmax) and a 4-bit index per value into a table of 16 numbers. With double quantisation
the maxima, less their mean, are quantised again to 8 bits, in blocks of 256.

bitsandbytes quantises, because its CPU code rounds the maxima differently from its CUDA code and
we want its bytes on either. Dequantisation stands here: it is bitsandbytes' bit for bit, but writes
in place, into strided views, straight from a stored blob. Not here: the fused GPU kernel.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from eightgig.quant.manifest import StoredTensor

BLOCK_SIZE = 64
NESTED_BLOCK_SIZE = 256
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)

NF4_TABLE = "nf4"
FP4_TABLE = "fp4"
DYNAMIC_TABLE = "dynamic"

NF4_CODE = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""Quantiles of the normal distribution, as in bitsandbytes and the QLoRA paper (2305.14314)."""

_FP4_MAGNITUDES = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
FP4_CODE = tuple(sign * magnitude / 12 for sign in (1, -1) for magnitude in _FP4_MAGNITUDES)
"""1 sign, 2 exponent, 1 mantissa bit, as in bitsandbytes; only in checkpoints of others."""

# Values per step. On the CPU a step's temporaries stay in the cache; on a GPU launches count more.
_CPU_SLICE = 1 << 19
_GPU_SLICE = 1 << 26


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class QuantizedTensor:
    """A tensor in NF4.

    Attributes:
        codes: Two codes a byte, the first in the high half, (ceil(n / 2),) uint8.
        absmax: Block maxima, (ceil(n / block_size),): uint8 when `nested_absmax` is set, else
            float32.
        nested_absmax: Maxima of the blocks of maxima, float32; None without double quantisation.
        mean: Subtracted from the maxima before they were quantised; a float32 number.
        block_size: Values per block.
        nested_block_size: Maxima per nested maximum.
        shape: Of the original.
    """

    codes: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    mean: float
    block_size: int
    nested_block_size: int = NESTED_BLOCK_SIZE
    shape: tuple[int, ...]


def dynamic_map() -> tuple[float, ...]:
    """The signed 8-bit table (256 numbers in [-1, 1]) of nested maxima, as in bitsandbytes."""
    from bitsandbytes.functional import create_dynamic_map  # slow to import; readers do not need it

    return tuple(create_dynamic_map().tolist())


def quantize_nf4(
    weight: Tensor,
    *,
    block_size: int = BLOCK_SIZE,
    nested: bool = True,
    offset: float | None = None,
    device: torch.device | None = None,
) -> QuantizedTensor:
    """Quantise `weight` as bitsandbytes' `quantize_4bit(..., quant_type="nf4")` does.

    It goes slice by slice, so that a mapped file larger than memory may be passed, and only a slice
    of it is on `device` at a time. The bytes are those of one call on the whole tensor.

    Args:
        weight: Contiguous, bfloat16, float16 or float32, any shape.
        block_size: Values per block, one of `BLOCK_SIZES`.
        nested: Quantise the maxima, too (double quantisation).
        offset: Mean of the maxima to subtract; None: computed. It is a float32 sum, whose last bits
            depend on device and number of threads.
        device: Where to compute, None: where `weight` is.

    Returns:
        The parts, on `device`.

    Raises:
        ValueError: bitsandbytes does not know the block size or the dtype.
    """
    from bitsandbytes import functional  # slow to import, and readers do not need it

    device = weight.device if device is None else device
    flat = weight.reshape(-1)
    step = _GPU_SLICE if device.type == "cuda" else _CPU_SLICE
    codes, absmax = [], []
    for start in range(0, flat.numel(), step):
        part = flat[start : start + step].to(device)
        part_codes, state = functional.quantize_4bit(
            part, blocksize=block_size, quant_type="nf4", compress_statistics=False
        )
        codes.append(part_codes.reshape(-1))
        absmax.append(state.absmax)
    maxima = torch.cat(absmax)
    nested_absmax, mean = None, 0.0
    if nested:
        mean_tensor = maxima.mean() if offset is None else maxima.new_tensor(offset)
        maxima, state = functional.quantize_blockwise(
            maxima - mean_tensor, blocksize=NESTED_BLOCK_SIZE
        )
        nested_absmax, mean = state.absmax, float(mean_tensor)
    return QuantizedTensor(
        codes=torch.cat(codes),
        absmax=maxima,
        nested_absmax=nested_absmax,
        mean=mean,
        block_size=block_size,
        shape=tuple(weight.shape),
    )


def write_quantized(blob: Tensor, tensor: StoredTensor, quantized: QuantizedTensor) -> StoredTensor:
    """Put the parts of `quantized` where `tensor` says; returns `tensor` with the true mean.

    Args:
        blob: uint8, on the host.
        tensor: The place, see `quant.layout`.
        quantized: The parts, on any device.
    """
    parts = [(tensor.offset_bytes, tensor.size_bytes, quantized.codes)]
    nested = tensor.nested
    if nested is None:
        assert quantized.nested_absmax is None, tensor
        parts.append((tensor.absmax_offset_bytes, 4 * tensor.absmax_count, quantized.absmax))
    else:
        assert quantized.nested_absmax is not None, tensor
        parts.append((tensor.absmax_offset_bytes, tensor.absmax_count, quantized.absmax))
        parts.append((nested.offset_bytes, 4 * nested.count, quantized.nested_absmax))
        tensor = replace(tensor, nested=replace(nested, mean=quantized.mean))
    for offset_bytes, size_bytes, part in parts:
        source = part.contiguous().view(torch.uint8)
        assert source.numel() == size_bytes, f"{source.numel()} of {size_bytes} bytes, {tensor}"
        blob[offset_bytes : offset_bytes + size_bytes].copy_(source)
    return tensor


def code_table_tensors(
    code_tables: Mapping[str, tuple[float, ...]], device: torch.device
) -> dict[str, Tensor]:
    """The manifest's tables as float32 tensors on `device`, for `dequantize`."""
    return {
        name: torch.tensor(values, dtype=torch.float32, device=device)
        for name, values in code_tables.items()
    }


def dense_view(blob: Tensor, tensor: StoredTensor) -> Tensor:
    """The dense tensor in `blob`, in place: its own dtype and shape, no copy."""
    assert tensor.format == "dense", tensor
    return _view(blob, tensor.offset_bytes, tensor.size_bytes, dtype_of(tensor.dtype)).view(
        tensor.shape
    )


def dequantize(
    blob: Tensor, tensor: StoredTensor, code_tables: Mapping[str, Tensor], *, out: Tensor
) -> Tensor:
    """Write one stored tensor as numbers: the definition that kernels are tested against.

    Equal bit for bit to bitsandbytes' `dequantize_4bit`: code * absmax in float32, then one
    rounding to the dtype of `out`. Nested maxima are table[code] * nested_absmax, rounded to
    float32, plus the mean.

    Args:
        blob: The layer, uint8 (size_bytes,), or a longer slot that starts with it.
        tensor: What to read.
        code_tables: float32 tables on the blob's device, see `code_table_tensors`.
        out: Of shape `tensor.shape` and any float dtype, on the blob's device. Of nf4, a matrix
            whose rows may lie apart.

    Returns:
        `out`.
    """
    if tensor.format == "dense":
        return out.copy_(dense_view(blob, tensor))
    num_rows, num_columns = tensor.shape
    codes = blob[tensor.offset_bytes : tensor.offset_bytes + tensor.size_bytes]
    absmax = block_maxima(blob, tensor, code_tables)
    pairs = _pair_table(code_tables[tensor.code_table])
    step_rows = _rows_per_slice(tensor, _GPU_SLICE if blob.is_cuda else _CPU_SLICE)
    for first_row in range(0, num_rows, step_rows):
        last_row = min(first_row + step_rows, num_rows)
        start, stop = first_row * num_columns, last_row * num_columns
        part = codes[start // 2 : -(-stop // 2)]
        values = torch.index_select(pairs, 0, part.int()).view(torch.float32)[: stop - start]
        scales = absmax[start // tensor.block_size : -(-stop // tensor.block_size)]
        _scale_blocks(values, scales, tensor.block_size)
        out[first_row:last_row].copy_(values.view(-1, num_columns))
    return out


def block_maxima(blob: Tensor, tensor: StoredTensor, code_tables: Mapping[str, Tensor]) -> Tensor:
    """The block maxima of an nf4 tensor in `blob`, float32 (absmax_count,)."""
    start, count, nested = tensor.absmax_offset_bytes, tensor.absmax_count, tensor.nested
    if nested is None:
        return _view(blob, start, 4 * count, torch.float32)
    codes = blob[start : start + count]
    maxima = torch.index_select(code_tables[nested.code_table], 0, codes.int())
    scales = _view(blob, nested.offset_bytes, 4 * nested.count, torch.float32)
    _scale_blocks(maxima, scales, nested.block_size)
    return maxima.add_(nested.mean)


def dtype_of(name: str) -> torch.dtype:
    """The dtype by the name that the manifest uses."""
    return {
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
        "float32": torch.float32,
    }[name]


def _scale_blocks(values: Tensor, scales: Tensor, block_size: int) -> None:
    """Multiply block i of the flat `values` by scales[i], in place; the last may be shorter."""
    num_full = values.numel() // block_size
    full = values[: num_full * block_size].view(num_full, block_size)
    full.mul_(scales[:num_full, None])
    values[num_full * block_size :].mul_(scales[num_full:])


def _pair_table(code: Tensor) -> Tensor:
    """Table byte -> its two float32 values, as one int64 each: a look-up moves eight bytes."""
    pairs = torch.stack([code.repeat_interleave(16), code.repeat(16)], dim=1)  # (256, 2)
    return pairs.view(torch.int64).view(256)


def _rows_per_slice(tensor: StoredTensor, slice_size: int) -> int:
    """Rows of about `slice_size` values that begin at a block and at a whole byte."""
    num_columns = tensor.shape[1]
    return aligned_rows(slice_size // num_columns, num_columns, math.lcm(2, tensor.block_size))


def aligned_rows(num_rows: int, num_columns: int, whole: int) -> int:
    """About `num_rows`, but a number of rows whose values are a multiple of `whole`."""
    unit = whole // math.gcd(whole, num_columns)
    return max(num_rows // unit, 1) * unit


def _view(blob: Tensor, offset_bytes: int, size_bytes: int, dtype: torch.dtype) -> Tensor:
    return blob[offset_bytes : offset_bytes + size_bytes].view(dtype)
