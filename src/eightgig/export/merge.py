"""Merged weights: the base model's own files, with the adapter added to the linears it adapts.

Names, dtypes, shapes and files are those of the original checkpoint. Its headers are copied as they
are, so that every tensor keeps its place; tensors without an adapter are copied byte for byte.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eightgig.adapters.tensors import plan_file
from eightgig.errors import Finding
from eightgig.export.folder import ExportProgress, OutputFolder
from eightgig.export.source import TORCH_DTYPES, TunedWeights
from eightgig.models.checkpoint import quantized_parts
from eightgig.models.headers import INDEX_FILE, MAX_HEADER_BYTES, SINGLE_FILE, read_json
from eightgig.models.spec import ModelSpec
from eightgig.quant.build import Download
from eightgig.quant.parts import file_bytes
from eightgig.units import MIB

_WORK = "merging"
_COPY_BYTES = 64 * MIB


def merged_bytes(weights: TunedWeights) -> int:
    """Bytes of the merged safetensors files."""
    spec = weights.spec
    if spec.quantization is None:
        return sum(file_bytes(spec).values())
    return sum(_dense_bytes(weights, name) for name in _dense_names(spec))


def write_merged(
    output: OutputFolder,
    weights: TunedWeights,
    checkpoint: Path | Download,
    observe: Callable[[object], None],
    *,
    check: Callable[[str], None] = lambda _: None,
) -> None:
    """Write the merged safetensors files and their index; everything else is the caller's.

    Args:
        output: Where to.
        weights: Base model and adapter.
        checkpoint: The base model's folder, or how its files are fetched one by one.
        observe: Called with an `ExportProgress` for every file.
        check: Called with the name of every file that has been written, while its original is
            still there.

    Raises:
        OSError: The disk is full, or fails.
        ModelError: The checkpoint changed while it was read.
    """
    if weights.spec.quantization is not None:
        _write_dense(output, weights, observe, check)
        return
    folder = checkpoint if isinstance(checkpoint, Path) else checkpoint.folder
    sizes = file_bytes(weights.spec)
    done_bytes, total_bytes = 0, sum(sizes.values())
    for file in sorted(sizes):
        if isinstance(checkpoint, Download):
            checkpoint.fetch(file)
        output.write(file, _file_parts(weights, folder, file))
        check(file)
        done_bytes += sizes[file]
        observe(ExportProgress(work=_WORK, done_bytes=done_bytes, total_bytes=total_bytes))
        if isinstance(checkpoint, Download):
            checkpoint.delete(file)
    if not (folder / SINGLE_FILE).exists() and (folder / INDEX_FILE).exists():
        output.copy(folder / INDEX_FILE)


def precision_findings(weights: TunedWeights) -> tuple[Finding, ...]:
    """What was lost before the adapter was added: a warning where the base was in 4 bit."""
    spec = weights.spec
    if spec.quantization is None:
        return ()
    four_bit = sum(weights.is_four_bit(name) for name in spec.tensors)
    return (
        Finding(
            severity="warning",
            code="export.from_4_bit",
            message=f"{spec.name} is stored in 4 bit: {four_bit} of its weights were made 16 bit "
            "from those 4 bits before the adapter was added.",
            why="What was rounded away when it was quantised is gone; the merged model is as "
            "exact as the 4-bit one, and takes four times the space.",
            fix="To merge into the original weights, name them: --base FOLDER_OR_HUB_ID of the "
            "unquantised model.",
        ),
    )


def config_without_quantization(folder: Path) -> bytes:
    """config.json of the base model without its `quantization_config`."""
    config = read_json(folder / "config.json", max_bytes=MAX_HEADER_BYTES)
    config.pop("quantization_config", None)
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode("utf-8")


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, as they lie in a file."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _file_parts(weights: TunedWeights, folder: Path, file: str) -> Iterator[bytes | memoryview]:
    """The bytes of one merged safetensors file, in order."""
    specs = [item for item in weights.spec.tensors.items() if item[1].file == file]
    specs.sort(key=lambda item: (item[1].offset_bytes, item[1].size_bytes))
    with (folder / file).open("rb") as source:
        header_bytes = int.from_bytes(source.read(8), "little")
        source.seek(0)
        yield source.read(8 + header_bytes)
        for name, spec in specs:
            # Bytes that belong to no tensor keep those that do at their offsets.
            yield source.read(spec.offset_bytes - source.tell())
            if name in weights.adapted_names:
                for block in weights.blocks(name):
                    yield tensor_bytes(block.to(TORCH_DTYPES[spec.dtype]))
                source.seek(spec.size_bytes, 1)
            else:
                yield from _copied(source, spec.size_bytes)
        yield source.read()


def _copied(source: Any, size_bytes: int) -> Iterator[bytes]:
    while size_bytes > 0:
        part = source.read(min(size_bytes, _COPY_BYTES))
        if not part:
            return
        size_bytes -= len(part)
        yield part


def _dense_names(spec: ModelSpec) -> list[str]:
    """Every weight of a 4-bit checkpoint, without the parts that describe the 4 bits."""
    parts = {
        full_name
        for name in spec.tensors
        for part, full_name in (quantized_parts(spec.tensors, name) or {}).items()
        if part != "codes"
    }
    return sorted(set(spec.tensors) - parts)


def _dense_bytes(weights: TunedWeights, name: str) -> int:
    if not weights.is_four_bit(name):
        return weights.spec.tensors[name].size_bytes
    dtype, shape = weights.layout(name)
    return prod(shape) * TORCH_DTYPES[dtype].itemsize


def _write_dense(
    output: OutputFolder,
    weights: TunedWeights,
    observe: Callable[[object], None],
    check: Callable[[str], None],
) -> None:
    """A 4-bit checkpoint in 16 bit, under the same file names."""
    spec = weights.spec
    names = _dense_names(spec)
    sizes = {name: _dense_bytes(weights, name) for name in names}
    done_bytes, total_bytes = 0, sum(sizes.values())
    files = sorted({spec.tensors[name].file for name in names})
    for file in files:
        inside = [name for name in names if spec.tensors[name].file == file]
        output.write(file, _dense_parts(weights, inside))
        check(file)
        done_bytes += sum(sizes[name] for name in inside)
        observe(ExportProgress(work=_WORK, done_bytes=done_bytes, total_bytes=total_bytes))
    if len(files) > 1:
        index = {
            "metadata": {"total_size": total_bytes},
            "weight_map": {name: spec.tensors[name].file for name in names},
        }
        output.write(INDEX_FILE, (json.dumps(index, indent=2) + "\n").encode("utf-8"))


def _dense_parts(weights: TunedWeights, names: list[str]) -> Iterator[bytes | memoryview]:
    layouts = {name: weights.layout(name) for name in names}
    order, header = plan_file(
        {name: (*layouts[name], _dense_bytes(weights, name)) for name in names}
    )
    yield header
    for name in order:
        if name in weights.adapted_names or weights.is_four_bit(name):
            for block in weights.blocks(name):
                yield tensor_bytes(block.to(TORCH_DTYPES[layouts[name][0]]))
        else:
            yield weights.raw(name)
