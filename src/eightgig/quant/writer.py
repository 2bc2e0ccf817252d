"""Writing the parts of a store: one layer, one table, the small rest."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from eightgig.errors import ModelError
from eightgig.models.layout import other_tensor_shapes
from eightgig.models.spec import ModelSpec, linear_shapes
from eightgig.quant.four_bit import FourBitTensor
from eightgig.quant.layout import Quantization, layer_layout, stored_dtype
from eightgig.quant.manifest import StoredBlob, StoredTensor
from eightgig.quant.mapping import write_parts
from eightgig.quant.nf4 import (
    DYNAMIC_TABLE,
    NF4_CODE,
    NF4_TABLE,
    dense_view,
    dtype_of,
    dynamic_map,
    quantize_nf4,
    write_quantized,
)
from eightgig.quant.parts import Part, table_header, weight_bytes
from eightgig.quant.source import CheckpointSource
from eightgig.run import from_json, write_json

_TABLE_SLICE_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class FinishedLayer:
    """What is written beside a layer's file when it is complete."""

    blob: StoredBlob
    code_tables: Mapping[str, tuple[float, ...]]


def finished_path(folder: Path, part: Part) -> Path:
    """Where the description of a finished layer stands until the manifest is written."""
    return folder / f"{part.file}.json"


def read_finished(folder: Path, part: Part) -> FinishedLayer | None:
    """The description of a layer that was finished; None if it was not."""
    try:
        return from_json(FinishedLayer, json.loads(finished_path(folder, part).read_bytes()))
    except (OSError, ValueError):
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class PartWriter:
    """Writes parts into the store's folder.

    Attributes:
        spec: The model.
        source: Its checkpoint.
        folder: The store.
        quantization: How linears are kept.
        device: Where to quantise.
        advance: Called with the bytes of the checkpoint that have been used up.
    """

    spec: ModelSpec
    source: CheckpointSource
    folder: Path
    quantization: Quantization
    device: torch.device
    advance: Callable[[int], None]

    def write(self, part: Part) -> None:
        """Write one part, flushed to the disk and whole when it appears.

        Raises:
            OSError: The disk is full, or fails.
            ModelError: The checkpoint is damaged.
        """
        if part.kind == "layer":
            self._write_layer(part)
        elif part.kind == "table":
            self._write_table(part)
        else:
            tensors = {name: self._numbers(part, name) for name in part.names}
            write_parts(self.folder / part.file, [safetensors.torch.save(tensors)])
            self.advance(part.source_bytes)

    def _write_layer(self, part: Part) -> None:
        layer = self.spec.decoder.layers[part.index]
        four_bit = {
            name: stored
            for name in linear_shapes(self.spec.decoder, layer)
            if (stored := self.source.four_bit(part.names[name])) is not None
        }
        places, size_bytes = layer_layout(
            self.spec.decoder,
            layer,
            dtype=self.spec.dtype,
            quantization=self.quantization,
            formats={name: stored.four_bit_format for name, stored in four_bit.items()},
        )
        blob = torch.zeros(size_bytes, dtype=torch.uint8)
        tensors: dict[str, StoredTensor] = {}
        code_tables: dict[str, tuple[float, ...]] = {}
        for name, place in places.items():
            tensors[name], tables = self._fill(blob, part, name, place, four_bit.get(name))
            code_tables |= tables
        sha256 = write_parts(self.folder / part.file, [blob])
        stored_blob = StoredBlob(
            file=part.file, size_bytes=size_bytes, sha256=sha256, tensors=tensors
        )
        finished = FinishedLayer(blob=stored_blob, code_tables=code_tables)
        write_json(finished_path(self.folder, part), finished)

    def _fill(
        self,
        blob: Tensor,
        part: Part,
        name: str,
        place: StoredTensor,
        stored: FourBitTensor | None,
    ) -> tuple[StoredTensor, Mapping[str, tuple[float, ...]]]:
        """Put one tensor into the blob; returns what stands there, and the tables it needs."""
        full_name = part.names[name]
        tables: Mapping[str, tuple[float, ...]] = {}
        if place.format == "dense":
            numbers = self._numbers(part, name)
            dense_view(blob, place).copy_(numbers.view(place.shape))
        elif stored is not None:
            place = replace(write_quantized(blob, place, stored.quantized), dtype=stored.dtype)
            tables = stored.code_tables
        else:
            weight = self.source.read(full_name).to(dtype_of(self.spec.dtype))
            quantized = quantize_nf4(weight, device=self.device)
            if not math.isfinite(quantized.mean):
                raise _not_finite(full_name)
            place = write_quantized(blob, place, quantized)
            tables = {NF4_TABLE: NF4_CODE, DYNAMIC_TABLE: dynamic_map()}
        self.advance(weight_bytes(self.spec, full_name))
        return place, tables

    def _numbers(self, part: Part, name: str) -> Tensor:
        """A dense tensor as it is stored: norms with the family's offset."""
        numbers = self.source.numbers(part.names[name])
        dtype = dtype_of(stored_dtype(name, self.spec.dtype))
        if name.endswith("_norm"):
            return numbers.to(dtype) + self.spec.decoder.norm_offset
        return numbers.to(dtype)

    def _write_table(self, part: Part) -> None:
        name, full_name = next(iter(part.names.items()))
        dtype = dtype_of(self.spec.dtype)
        num_rows, num_columns = other_tensor_shapes(self.spec.decoder)[name]
        step = max(_TABLE_SLICE_BYTES // (num_columns * dtype.itemsize), 1)

        def pieces() -> Iterator[Tensor | bytes]:
            yield table_header(self.spec, name)
            row = 0
            for piece in self._rows(full_name, num_rows, step):
                yield piece.to(dtype)
                start, row = row, row + len(piece)
                done = [part.source_bytes * each // num_rows for each in (start, row)]
                self.advance(done[1] - done[0])

        write_parts(self.folder / part.file, pieces())

    def _rows(self, full_name: str, num_rows: int, step: int) -> Iterator[Tensor]:
        """A table as numbers, about `step` rows at a time."""
        stored = self.source.four_bit(full_name)
        if stored is not None:
            yield from (some.dequantize() for some in stored.split(step))
            return
        for first_row in range(0, num_rows, step):
            yield self.source.read(full_name, slice(first_row, min(first_row + step, num_rows)))


def _not_finite(name: str) -> ModelError:
    return ModelError(
        f"The weight {name} of the checkpoint holds numbers that are not finite.",
        why="NaN or infinity in one weight makes every output NaN.",
        fix="Download the checkpoint again; if it stays so, the model itself is damaged.",
    )
