"""safetensors headers: where each tensor of a checkpoint lies, without reading any of it.

A file is 8 bytes of header size (little endian), the header as JSON, and the data. Nothing in a
header is believed before it is checked against the file.

Source: the safetensors format, https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any, NoReturn

from eightgig.errors import ModelError
from eightgig.models.spec import TensorSpec
from eightgig.units import format_bytes

MAX_HEADER_BYTES = 25_000_000
MAX_DIMENSIONS = 16
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

_ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip


def read_tensor_specs(folder: Path) -> dict[str, TensorSpec]:
    """All tensors of the checkpoint in `folder`, by name, from the headers alone.

    Raises:
        ModelError: No safetensors checkpoint, a missing or damaged file, an index that does not
            agree with its files.
    """
    # In this order, as Transformers and the hub do.
    if (folder / SINGLE_FILE).exists():
        return read_header(folder / SINGLE_FILE)
    index_path = folder / INDEX_FILE
    if index_path.exists():
        return _read_sharded(folder, read_weight_map(index_path))
    raise no_safetensors_error({path.name for path in folder.iterdir()}, str(folder))


def read_weight_map(index_path: Path) -> dict[str, str]:
    """Tensor name -> file name, from the index of a sharded checkpoint.

    Raises:
        ModelError: The index is too large, no JSON, or names something other than files beside it.
    """
    index = read_json(index_path, max_bytes=MAX_HEADER_BYTES)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        _refuse_file(index_path, "it holds no `weight_map`")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or "\\" in file:
            _refuse_file(index_path, f"it places {name!r} in {str(file)[:80]!r}, which is no file")
        if not file.endswith(".safetensors"):
            _refuse_file(index_path, f"{file!r} is no safetensors file")
    return weight_map


def read_header(path: Path) -> dict[str, TensorSpec]:
    """The tensors of one safetensors file, by name.

    Raises:
        ModelError: The file is cut off, or its header is too large, no JSON or contradicts itself.
    """
    try:
        with path.open("rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            header_bytes = int.from_bytes(file.read(8), "little")
            if file_bytes < 8 or header_bytes > file_bytes - 8:
                _refuse_file(path, "its header is cut off")
            if header_bytes > MAX_HEADER_BYTES:
                _refuse_file(path, f"its header claims {format_bytes(header_bytes)}")
            header = _parse_json(path, file.read(header_bytes))
    except OSError as error:
        _refuse_file(path, f"{error.strerror or error}")
    header.pop("__metadata__", None)
    specs = {
        name: _tensor_spec(path, name, entry, data_offset_bytes=8 + header_bytes)
        for name, entry in header.items()
    }
    _check_offsets(path, specs, file_bytes=file_bytes)
    return specs


def read_json(path: Path, *, max_bytes: int) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        ModelError: Too large, no JSON, or no object.
    """
    try:
        size_bytes = path.stat().st_size
        if size_bytes > max_bytes:
            _refuse_file(path, f"it is {format_bytes(size_bytes)} large")
        return _parse_json(path, path.read_bytes())
    except OSError as error:
        _refuse_file(path, f"{error.strerror or error}")


def no_safetensors_error(files: Set[str], place: str) -> ModelError:
    """Why `place`, which holds `files`, is no checkpoint that can be read."""
    suffixes = {Path(file).suffix for file in files}
    if "adapter_model.safetensors" in files:
        what = "it holds a LoRA adapter, no base model"
        fix = "Give the adapter's base model (`base_model_name_or_path` in adapter_config.json)."
    elif suffixes & {".bin", ".pt", ".pth"}:
        what = "its weights are pickles (.bin), which can run code when they are opened"
        fix = (
            'Convert it where you trust it: python -c "from transformers import '
            f"AutoModelForCausalLM as M; M.from_pretrained('{place}', dtype='auto')"
            ".save_pretrained('converted')\"."
        )
    elif ".gguf" in suffixes:
        what = "its weights are in GGUF, a format for inference"
        fix = "Give the original model with safetensors files."
    elif any(file.startswith("model-") and file.endswith(".safetensors") for file in files):
        what = f"{INDEX_FILE} is missing beside its parts"
        fix = f"Download {INDEX_FILE} from the model's source into the same folder."
    else:
        what = f"it holds neither {SINGLE_FILE} nor {INDEX_FILE}"
        fix = "Give a hub id such as google/gemma-4-12B-it, or the folder of a downloaded model."
    return ModelError(
        f"There is no checkpoint to read in {place}.",
        why=f"Models are read from safetensors files, and {what}.",
        fix=fix,
    )


def _read_sharded(folder: Path, weight_map: Mapping[str, str]) -> dict[str, TensorSpec]:
    files = sorted(set(weight_map.values()))
    missing = [file for file in files if not (folder / file).exists()]
    if missing:
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise ModelError(
            f"{len(missing)} of {len(files)} files of the checkpoint in {folder} are missing: "
            f"{shown}.",
            why=f"{INDEX_FILE} says that they hold weights.",
            fix="Download the model again: `hf download` fetches only what is missing.",
        )
    headers = {file: read_header(folder / file) for file in files}
    for name, file in weight_map.items():
        if name not in headers[file]:
            _refuse_file(folder / file, f"{INDEX_FILE} expects {name!r} in it")
    return {name: headers[file][name] for name, file in weight_map.items()}


def _parse_json(path: Path, data: bytes) -> dict[str, Any]:
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        _refuse_file(path, "it is no valid JSON")
    if not isinstance(content, dict):
        _refuse_file(path, "it is JSON, but no object")
    return content


def _tensor_spec(path: Path, name: str, entry: object, *, data_offset_bytes: int) -> TensorSpec:
    values = entry if isinstance(entry, dict) else {}
    dtype, shape = values.get("dtype"), _sizes(values.get("shape"))
    offsets = _sizes(values.get("data_offsets"))
    if not isinstance(dtype, str) or shape is None or offsets is None or len(offsets) != 2:
        _refuse_file(path, f"the entry of tensor {name[:120]!r} is no entry")
    size_bytes = offsets[1] - offsets[0]
    # Dtypes that we do not know keep the size that the header gives them.
    item_bytes = _ITEM_BYTES.get(dtype)
    expected_bytes = size_bytes if item_bytes is None else math.prod(shape) * item_bytes
    if size_bytes < 0 or size_bytes != expected_bytes:
        _refuse_file(
            path, f"tensor {name!r} of {dtype} and shape {shape} cannot have {size_bytes} bytes"
        )
    return TensorSpec(
        file=path.name,
        dtype=dtype,
        shape=shape,
        offset_bytes=data_offset_bytes + offsets[0],
        size_bytes=size_bytes,
    )


def _sizes(values: object) -> tuple[int, ...] | None:
    """`values` as sizes or offsets, None if they are none."""
    if not isinstance(values, list) or len(values) > MAX_DIMENSIONS:
        return None
    if not all(type(value) is int and 0 <= value < 1 << 62 for value in values):
        return None
    return tuple(values)


def _check_offsets(path: Path, specs: Mapping[str, TensorSpec], *, file_bytes: int) -> None:
    end_bytes = 0
    previous = ""
    for name, spec in sorted(specs.items(), key=lambda item: item[1].offset_bytes):
        if spec.offset_bytes < end_bytes and spec.size_bytes:
            _refuse_file(path, f"tensors {previous!r} and {name!r} overlap")
        end_bytes = max(end_bytes, spec.offset_bytes + spec.size_bytes)
        previous = name
        if end_bytes > file_bytes:
            _refuse_file(
                path,
                f"tensor {name!r} ends at byte {end_bytes}, and the file has {file_bytes}: it is "
                "cut off",
            )


def _refuse_file(path: Path, reason: str) -> NoReturn:
    raise ModelError(
        f"{path} cannot be used: {reason}.",
        why="The file is damaged, incomplete or not from where it should be.",
        fix="Delete it and download it again from the model's source.",
    )
