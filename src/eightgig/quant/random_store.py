"""A store of random weights in a model's true shape, made in seconds: for benchmarks and trials.

The numbers are of the size that trained weights have, so that activations and losses stay finite;
otherwise they mean nothing.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor

from eightgig.models.layout import other_tensor_shapes
from eightgig.models.spec import DecoderSpec, LayerSpec
from eightgig.quant.build import MANIFEST_FILE
from eightgig.quant.layout import ITEM_BYTES, Quantization, layer_layout, stored_dtype
from eightgig.quant.manifest import FORMAT_VERSION, Manifest, StoredBlob, StoredTable, StoredTensor
from eightgig.quant.mapping import write_parts
from eightgig.quant.nf4 import (
    DYNAMIC_TABLE,
    NF4_CODE,
    NF4_TABLE,
    dense_view,
    dtype_of,
    dynamic_map,
)
from eightgig.quant.parts import OTHER_FILE, TABLES
from eightgig.quant.store import Store
from eightgig.run import to_json, write_json

_SLICE_BYTES = 64 << 20
_MAX_WORKERS = 16
# Root mean square of numbers spread evenly over [1, 2), and of the 16 NF4 codes.
_MANTISSA_RMS = math.sqrt(7 / 3)
_CODE_RMS = math.sqrt(sum(code * code for code in NF4_CODE) / len(NF4_CODE))
# Block maxima lie within this share of their mean.
_ABSMAX_SPREAD = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class _Bits:
    """How a float's bits are laid out."""

    integer: type[np.uint16] | type[np.uint32]
    sign_and_mantissa: int
    exponent_shift: int
    exponent_bias: int


_BITS: Mapping[str, _Bits] = {
    "bfloat16": _Bits(
        integer=np.uint16, sign_and_mantissa=0x807F, exponent_shift=7, exponent_bias=127
    ),
    "float16": _Bits(
        integer=np.uint16, sign_and_mantissa=0x83FF, exponent_shift=10, exponent_bias=15
    ),
    "float32": _Bits(
        integer=np.uint32, sign_and_mantissa=0x807FFFFF, exponent_shift=23, exponent_bias=127
    ),
}


def random_store(
    decoder: DecoderSpec,
    folder: Path,
    *,
    quantization: Quantization = "nf4",
    dtype: str = "bfloat16",
    seed: int,
    alias_layers: bool,
) -> Store:
    """Write a store of random weights into `folder` and open it.

    Args:
        decoder: Shapes.
        folder: Where to write; made if missing, what it holds is written over.
        quantization: How linears are kept; 4-bit ones are drawn as codes, not quantised.
        dtype: Of what is dense, and of the model in 16 bit.
        seed: Of all numbers.
        alias_layers: Layers of one type share one file, an untied head is the embedding, and the
            per-layer embedding is a file of zeros without blocks: a model whose weights exceed disk
            and memory can be timed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(max_workers=min(_MAX_WORKERS, os.cpu_count() or 1)) as pool:
        layers = _write_layers(
            _LayerWriter(decoder, folder, quantization, dtype, seed), pool, alias_layers
        )
        tables = {}
        for number, name in enumerate(TABLES):
            shape = other_tensor_shapes(decoder).get(name)
            if shape is None or (name == "head" and alias_layers):
                continue
            table = StoredTable(file=name, offset_bytes=0, shape=(shape[0], shape[1]), dtype=dtype)
            is_empty = name == "ple" and alias_layers
            _write_table(folder, table, pool, None if is_empty else (seed, 1, number))
            tables[name] = table
    _write_other(decoder, folder, dtype, seed)
    is_four_bit = quantization == "nf4"
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        key=folder.name,
        source="random weights",
        quantization=quantization,
        layers=layers,
        embedding=tables["embedding"],
        head=tables.get("head", tables["embedding"]),
        ple=tables.get("ple"),
        other_file=OTHER_FILE,
        code_tables={NF4_TABLE: NF4_CODE, DYNAMIC_TABLE: dynamic_map()} if is_four_bit else {},
    )
    write_json(folder / MANIFEST_FILE, manifest)
    return Store.open(folder)


@dataclass(frozen=True, slots=True)
class _LayerWriter:
    """Writes the file of one layer."""

    decoder: DecoderSpec
    folder: Path
    quantization: Quantization
    dtype: str
    seed: int

    def layout(self, layer: LayerSpec) -> tuple[dict[str, StoredTensor], int]:
        """Places of the layer's tensors, and its size."""
        return layer_layout(self.decoder, layer, dtype=self.dtype, quantization=self.quantization)

    def write(self, layer: LayerSpec) -> StoredBlob:
        """Draw all tensors of `layer` and write them."""
        places, size_bytes = self.layout(layer)
        rng = _rng(self.seed, 0, layer.index)
        blob = torch.zeros(size_bytes, dtype=torch.uint8)
        tensors = {
            name: self._fill(blob, name, place, layer, rng) for name, place in places.items()
        }
        file = f"layer-{layer.index:03d}.blob"
        sha256 = write_parts(self.folder / file, [blob], flush=False)
        return StoredBlob(file=file, size_bytes=size_bytes, sha256=sha256, tensors=tensors)

    def _fill(
        self,
        blob: Tensor,
        name: str,
        place: StoredTensor,
        layer: LayerSpec,
        rng: np.random.Generator,
    ) -> StoredTensor:
        if place.format == "nf4":
            return _fill_four_bit(blob, place, rng)
        view = dense_view(blob, place)
        if name in ("q_norm", "k_norm"):
            # Scores of unit size, whatever the attention multiplies them with.
            view.fill_((self.decoder.attention_scale * math.sqrt(layer.head_dim)) ** -0.5)
        elif place.dtype == "float32" and len(place.shape) == 1:
            view.fill_(1.0)
        else:
            numbers = _random_numbers(rng, view.numel(), place.dtype, std=place.shape[-1] ** -0.5)
            view.view(-1).view(torch.uint8).numpy()[:] = numbers
        return place


def _write_layers(
    writer: _LayerWriter, pool: ThreadPoolExecutor, alias_layers: bool
) -> tuple[StoredBlob, ...]:
    layers = writer.decoder.layers
    if not alias_layers:
        return tuple(pool.map(writer.write, layers))
    kinds = [json.dumps(to_json(writer.layout(layer))) for layer in layers]
    first: dict[str, LayerSpec] = {}
    for kind, layer in zip(kinds, layers, strict=True):
        first.setdefault(kind, layer)
    blobs = dict(zip(first, pool.map(writer.write, first.values()), strict=True))
    return tuple(blobs[kind] for kind in kinds)


def _fill_four_bit(blob: Tensor, place: StoredTensor, rng: np.random.Generator) -> StoredTensor:
    """Random codes, and maxima that make the root mean square of the weights in^-0.5."""
    data = blob.numpy()
    mean = np.float32(place.shape[-1] ** -0.5 / _CODE_RMS)
    nested = place.nested
    assert nested is not None, "the own format is doubly quantised"
    for offset_bytes, size_bytes in (
        (place.offset_bytes, place.size_bytes),
        (place.absmax_offset_bytes, place.absmax_count),
    ):
        data[offset_bytes : offset_bytes + size_bytes] = _random_bytes(rng, size_bytes)
    scales = data[nested.offset_bytes : nested.offset_bytes + 4 * nested.count].view(np.float32)
    scales[:] = mean * _ABSMAX_SPREAD
    return replace(place, nested=replace(nested, mean=float(mean)))


def _write_table(
    folder: Path, table: StoredTable, pool: ThreadPoolExecutor, seeds: tuple[int, ...] | None
) -> None:
    """Write random numbers of root mean square D^-0.5, or a file without blocks."""
    rows, columns = table.shape
    path = folder / table.file
    row_bytes = columns * ITEM_BYTES[table.dtype]
    with path.open("wb") as file:
        file.truncate(rows * row_bytes)
    if seeds is None:
        return
    step = max(_SLICE_BYTES // row_bytes, 1)

    def write_rows(first_row: int) -> None:
        count = min(step, rows - first_row) * columns
        numbers = _random_numbers(_rng(*seeds, first_row), count, table.dtype, std=columns**-0.5)
        with path.open("r+b") as file:
            file.seek(first_row * row_bytes)
            file.write(numbers.data)

    list(pool.map(write_rows, range(0, rows, step)))


def _write_other(decoder: DecoderSpec, folder: Path, dtype: str, seed: int) -> None:
    tensors = {}
    for name, shape in other_tensor_shapes(decoder).items():
        if name in TABLES:
            continue
        tensor = torch.ones(shape, dtype=dtype_of(stored_dtype(name, dtype)))
        if tensor.dim() == 2:
            rng = _rng(seed, 2)
            numbers = _random_numbers(rng, tensor.numel(), dtype, std=shape[-1] ** -0.5)
            tensor.view(-1).view(torch.uint8).numpy()[:] = numbers
        tensors[name] = tensor
    write_parts(folder / OTHER_FILE, [safetensors.torch.save(tensors)])


def _random_numbers(
    rng: np.random.Generator, count: int, dtype: str, *, std: float
) -> NDArray[np.uint8]:
    """Bytes of `count` floats with random sign and mantissa and one exponent: |x| in [1, 2) 2^e.

    Faster than a normal distribution by an order of magnitude; its root mean square is the power of
    two times `_MANTISSA_RMS` that is nearest to `std`.
    """
    bits = _BITS[dtype]
    exponent = round(math.log2(std / _MANTISSA_RMS))
    numbers = _random_bytes(rng, count * ITEM_BYTES[dtype]).view(bits.integer)
    np.bitwise_and(numbers, bits.integer(bits.sign_and_mantissa), out=numbers)
    exponent_field = (exponent + bits.exponent_bias) << bits.exponent_shift
    np.bitwise_or(numbers, bits.integer(exponent_field), out=numbers)
    return numbers.view(np.uint8)


def _random_bytes(rng: np.random.Generator, size_bytes: int) -> NDArray[np.uint8]:
    words = rng.integers(0, 1 << 64, size=-(-size_bytes // 8), dtype=np.uint64)
    return words.view(np.uint8)[:size_bytes]


def _rng(*seeds: int) -> np.random.Generator:
    return np.random.Generator(np.random.SFC64(list(seeds)))
