"""What a store of a model consists of, its size and its name: no weights are read."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Literal

from eightgig.models.checkpoint import layer_tensor_names, other_tensor_names, quantized_parts
from eightgig.models.layout import other_tensor_shapes
from eightgig.models.read import WEIGHT_DTYPES
from eightgig.models.spec import ModelSpec, TensorSpec, linear_shapes
from eightgig.quant.four_bit import format_from_headers
from eightgig.quant.layout import ITEM_BYTES, Quantization, layer_layout, stored_dtype
from eightgig.quant.manifest import FORMAT_VERSION
from eightgig.quant.mapping import safetensors_header
from eightgig.quant.nf4 import dtype_of

PartKind = Literal["layer", "table", "other"]

TABLES = ("embedding", "head", "ple")
OTHER_FILE = "other.safetensors"

_KEY_DIGITS = 16
_KEY_NAME_LENGTH = 60
_COMMIT = re.compile(r"[0-9a-f]{40}")
# safetensors' own header of the few tensors in OTHER_FILE, for the sum of bytes.
_HEADER_BYTES = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One file of a store.

    Attributes:
        kind: A decoder layer, a table copied out of the checkpoint, or the small rest.
        file: Name of the file.
        index: Of the layer; 0 for the others.
        names: Short name -> full name of the tensors it is made of.
        source_bytes: What is read of the checkpoint.
        stored_bytes: Size of the file; of the rest, at most so many.
        source_files: Files of the checkpoint that it is made of.
    """

    kind: PartKind
    file: str
    index: int = 0
    names: Mapping[str, str]
    source_bytes: int
    stored_bytes: int = 0
    source_files: tuple[str, ...]


def store_parts(
    spec: ModelSpec, quantization: Quantization, *, copies_tables: bool = False
) -> tuple[Part, ...]:
    """The files that the store of `spec` needs, in order: layers, tables, the rest.

    Args:
        spec: The model, with the tensors of its checkpoint.
        quantization: How linears are kept.
        copies_tables: Whether embedding, head and per-layer embedding are copied into the store;
            if not, they are mapped where they are, as far as they lie aligned and dense.

    Raises:
        ModelError: The checkpoint lacks a tensor.
    """
    parts = [_layer_part(spec, index, quantization) for index in range(spec.decoder.num_layers)]
    others = other_tensor_names(spec)
    parts += [
        _table_part(spec, name, others[name])
        for name in own_tables(spec)
        if copies_tables or not is_mappable(spec, others[name])
    ]
    parts.append(_other_part(spec, {n: full for n, full in others.items() if n not in TABLES}))
    return tuple(parts)


def own_tables(spec: ModelSpec) -> tuple[str, ...]:
    """Which of `TABLES` the model has; a tied head is no table of its own."""
    return tuple(name for name in TABLES if name in other_tensor_shapes(spec.decoder))


def prepared_bytes(
    spec: ModelSpec, quantization: Quantization, *, copies_tables: bool = False
) -> int:
    """Bytes that the store of `spec` takes on the disk, see `store_parts`."""
    parts = store_parts(spec, quantization, copies_tables=copies_tables)
    return sum(part.stored_bytes for part in parts)


def is_mappable(spec: ModelSpec, name: str) -> bool:
    """Whether the tensor `name` of the checkpoint can be used where it is."""
    tensor = spec.tensors[name]
    dtype = WEIGHT_DTYPES.get(tensor.dtype)
    if dtype is None or quantized_parts(spec.tensors, name) is not None:
        return False
    return tensor.offset_bytes % ITEM_BYTES[dtype] == 0


def weight_bytes(spec: ModelSpec, name: str) -> int:
    """Bytes of the weight `name` in the checkpoint."""
    return sum(spec.tensors[piece].size_bytes for piece in _pieces(spec, name))


def table_header(spec: ModelSpec, name: str) -> bytes:
    """Head of the safetensors file that the table `name` is copied to."""
    shape = other_tensor_shapes(spec.decoder)[name]
    return safetensors_header(name, shape, dtype_of(spec.dtype))


def store_key(
    spec: ModelSpec, folder: Path, quantization: Quantization, *, copies_tables: bool = False
) -> str:
    """Name of the store's folder: the model's name, and a digest of what decides its content.

    Those are tensor headers and the hub commit or, for a folder of one's own, sizes and times of
    its files: hashing the weights would take minutes. Settings of the decoder do not enter, but for
    the offset that is added to stored norms.

    Args:
        spec: The model, with the tensors of its checkpoint.
        folder: Where the checkpoint lies.
        quantization: How linears are kept.
        copies_tables: Whether the store holds all tables itself.
    """
    content = {
        "format_version": FORMAT_VERSION,
        "quantization": quantization,
        "copies_tables": copies_tables,
        "family": spec.family,
        "dtype": spec.dtype,
        "norm_offset": spec.decoder.norm_offset,
        "origin": _origin(folder, spec.tensors.values()),
        "tensors": {
            name: [tensor.file, tensor.dtype, list(tensor.shape), tensor.offset_bytes]
            for name, tensor in sorted(spec.tensors.items())
        },
    }
    text = json.dumps(content, sort_keys=True)
    digest = hashlib.sha256(text.encode("utf-8")).hexdigest()[:_KEY_DIGITS]
    model = re.split(r"[/\\]", spec.name.rstrip("/\\"))[-1]
    model = re.sub(r"[^A-Za-z0-9._-]+", "-", model)[:_KEY_NAME_LENGTH]
    return f"{model}-{quantization}-{digest}"


def file_bytes(spec: ModelSpec) -> dict[str, int]:
    """Size of each file of the checkpoint, from the tensor headers."""
    sizes: dict[str, int] = {}
    for tensor in spec.tensors.values():
        end = tensor.offset_bytes + tensor.size_bytes
        sizes[tensor.file] = max(sizes.get(tensor.file, 0), end)
    return sizes


def in_download_order(parts: Iterable[Part], spec: ModelSpec) -> list[Part]:
    """`parts` so that each file of the checkpoint is needed for as short a time as possible."""
    position = {file: number for number, file in enumerate(sorted(file_bytes(spec)))}

    def files(part: Part) -> tuple[int, int]:
        numbers = [position[file] for file in part.source_files]
        return max(numbers), min(numbers)

    return sorted(parts, key=files)


def download_peak_bytes(
    parts: Sequence[Part], spec: ModelSpec, present: frozenset[str]
) -> tuple[int, int]:
    """Most bytes that a download file by file adds to the disk: of the checkpoint, and with parts.

    Args:
        parts: What is still to be built, in order.
        spec: The model.
        present: Files of the checkpoint that are there already.
    """
    sizes = file_bytes(spec)
    held, written = set(present), 0
    download_peak, total_peak = 0, 0
    start_bytes = sum(sizes[file] for file in present)
    for number, part in enumerate(parts):
        held |= set(part.source_files)
        written += part.stored_bytes
        download = sum(sizes[file] for file in held) - start_bytes
        download_peak = max(download_peak, download)
        total_peak = max(total_peak, download + written)
        held &= needed_files(parts[number + 1 :])
    return download_peak, total_peak


def needed_files(parts: Iterable[Part]) -> set[str]:
    """Files of the checkpoint that `parts` are made of."""
    return {file for part in parts for file in part.source_files}


def _layer_part(spec: ModelSpec, index: int, quantization: Quantization) -> Part:
    layer = spec.decoder.layers[index]
    names = layer_tensor_names(spec, index)
    formats = {
        name: four_bit_format
        for name, shape in linear_shapes(spec.decoder, layer).items()
        if (four_bit_format := format_from_headers(spec.tensors, names[name], shape))
    }
    stored, stored_bytes = layer_layout(
        spec.decoder, layer, dtype=spec.dtype, quantization=quantization, formats=formats
    )
    part = _part(spec, "layer", f"layer-{index:03d}.blob", {name: names[name] for name in stored})
    return replace(part, index=index, stored_bytes=stored_bytes)


def _table_part(spec: ModelSpec, name: str, full_name: str) -> Part:
    size_bytes = prod(other_tensor_shapes(spec.decoder)[name]) * ITEM_BYTES[spec.dtype]
    part = _part(spec, "table", f"{name}.safetensors", {name: full_name})
    return replace(part, stored_bytes=len(table_header(spec, name)) + size_bytes)


def _other_part(spec: ModelSpec, names: Mapping[str, str]) -> Part:
    shapes = other_tensor_shapes(spec.decoder)
    sizes = [prod(shapes[name]) * ITEM_BYTES[stored_dtype(name, spec.dtype)] for name in names]
    return replace(_part(spec, "other", OTHER_FILE, names), stored_bytes=sum(sizes) + _HEADER_BYTES)


def _part(spec: ModelSpec, kind: PartKind, file: str, names: Mapping[str, str]) -> Part:
    pieces = [spec.tensors[piece] for full in names.values() for piece in _pieces(spec, full)]
    return Part(
        kind=kind,
        file=file,
        names=names,
        source_bytes=sum(piece.size_bytes for piece in pieces),
        source_files=tuple(sorted({piece.file for piece in pieces})),
    )


def _pieces(spec: ModelSpec, name: str) -> tuple[str, ...]:
    """What the weight `name` consists of in the checkpoint: several tensors if it is in 4 bit."""
    parts = quantized_parts(spec.tensors, name)
    return (name,) if parts is None else tuple(parts.values())


def _origin(folder: Path, tensors: Iterable[TensorSpec]) -> object:
    if folder.parent.name == "snapshots" and _COMMIT.fullmatch(folder.name):
        return folder.name
    files = sorted({tensor.file for tensor in tensors})
    stats = [(file, (folder / file).stat()) for file in files]
    return [[file, stat.st_size, stat.st_mtime_ns] for file, stat in stats]
