"""A checkpoint on disk: which tensors a decoder needs from it, and how their bytes are reached."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from eightgig.errors import ModelError
from eightgig.models.families import find_conditional
from eightgig.models.headers import read_json, read_tensor_specs
from eightgig.models.layout import (
    OTHER_SUFFIXES,
    head_tensor_name,
    layer_suffixes,
    layer_tensor_shapes,
    other_tensor_shapes,
)
from eightgig.models.read import WEIGHT_DTYPES, parse_model_spec
from eightgig.models.settings import Settings
from eightgig.models.spec import ModelSpec, TensorSpec

MAX_CONFIG_BYTES = 4_000_000
MAX_README_BYTES = 1_000_000

# What bitsandbytes stores beside a 4-bit weight, by our names of the parts.
_BNB_SUFFIXES = {
    "absmax": ".absmax",
    "quant_map": ".quant_map",
    "nested_absmax": ".nested_absmax",
    "nested_quant_map": ".nested_quant_map",
}
_BNB_STATE_SUFFIXES = (".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4")
_LICENSE_LINE = re.compile(r"^license:[ \t]*([\w.-]+)[ \t]*$", re.MULTILINE)


def read_model_spec(folder: Path, *, name: str | None = None) -> ModelSpec:
    """The model in `folder`: its config, its safetensors headers, and that the two agree.

    Args:
        folder: Holds config.json and the checkpoint.
        name: What the user calls the model; None: the folder.

    Raises:
        ModelError: No such folder, no model in it, a damaged file, another family, or tensors that
            are missing or misshapen.
    """
    shown = str(folder) if name is None else name
    config = read_config(folder)
    spec = parse_model_spec(config, name=shown, tensors=read_tensor_specs(folder))
    return check_model_spec(
        dataclasses.replace(
            spec,
            eos_token_ids=_generation_eos(folder, name=shown) or spec.eos_token_ids,
            license=_read_license(folder),
        )
    )


def read_config(folder: Path) -> dict[str, object]:
    """The content of config.json in `folder`.

    Raises:
        ModelError: There is no such folder, no config.json in it, or no JSON object in that.
    """
    if not folder.is_dir():
        raise ModelError(
            f"There is no model folder {folder}.",
            why="It is missing" + (", and a file has its name." if folder.exists() else "."),
            fix="Correct `model.name`: a folder, or a hub id such as google/gemma-4-12B-it.",
        )
    path = folder / "config.json"
    if not path.exists():
        is_adapter = (folder / "adapter_config.json").exists()
        raise ModelError(
            f"{folder} is no model folder: it holds no config.json.",
            why="It is the folder of a LoRA adapter."
            if is_adapter
            else "config.json describes the model; Transformers and the hub always write it.",
            fix="Give the folder of a base model, or a hub id such as google/gemma-4-12B-it.",
        )
    return read_json(path, max_bytes=MAX_CONFIG_BYTES)


def layer_tensor_names(spec: ModelSpec, index: int) -> dict[str, str]:
    """Short name -> checkpoint name of every tensor that layer `index` needs."""
    start = f"{spec.tensor_prefix}layers.{index}."
    suffixes = layer_suffixes(spec.decoder, spec.decoder.layers[index])
    return {short: start + suffix for short, suffix in suffixes.items()}


def other_tensor_names(spec: ModelSpec) -> dict[str, str]:
    """Short name -> checkpoint name of the tensors outside the layers; `head` always included.

    The head is the embedding's tensor where they are tied.
    """
    head = head_tensor_name(spec.tensor_prefix)
    names = {
        short: head if short == "head" else spec.tensor_prefix + OTHER_SUFFIXES[short]
        for short in other_tensor_shapes(spec.decoder)
    }
    return names if "head" in names else names | {"head": names["embedding"]}


def quantized_parts(tensors: Mapping[str, TensorSpec], name: str) -> dict[str, str] | None:
    """Checkpoint names of the parts of a 4-bit weight, None where `name` is stored as it is.

    Returns:
        `codes`, `quant_state`, `absmax`, `quant_map`, and with double quantisation
        `nested_absmax`, `nested_quant_map`.
    """
    states = [name + suffix for suffix in _BNB_STATE_SUFFIXES if name + suffix in tensors]
    if not states:
        return None
    parts = {"codes": name, "quant_state": states[0]}
    for part, suffix in _BNB_SUFFIXES.items():
        if name + suffix in tensors:
            parts[part] = name + suffix
    return parts


def check_model_spec(spec: ModelSpec) -> ModelSpec:
    """`spec` with its skipped parts, after a check of every tensor that the decoder needs.

    Raises:
        ModelError: Tensors are missing, misshapen or of a dtype that cannot be read.
    """
    needed = _needed_tensors(spec)
    missing = [name for name in needed if name not in spec.tensors]
    if missing:
        raise ModelError(
            f"The checkpoint of {spec.name} lacks {len(missing)} of {len(needed)} tensors: "
            f"{_shown(missing)}.",
            why="Its config describes a decoder that has them; its files hold others, such as "
            f"{_shown(sorted(spec.tensors)[:2])}.",
            fix="Download config.json and the weights again, both from the same source.",
        )
    wrong = {
        name: reason
        for name, shape in needed.items()
        if (reason := _mismatch(spec.tensors, name, shape)) is not None
    }
    if wrong:
        first = next(iter(wrong))
        raise ModelError(
            f"The checkpoint of {spec.name} does not match its config: {first} {wrong[first]}.",
            why=f"{len(wrong)} of {len(needed)} tensors do not match: {_shown(list(wrong))}.",
            fix="Download config.json and the weights again, both from the same source.",
        )
    return dataclasses.replace(spec, skipped_parts=_skipped_parts(spec, needed))


class TensorReader:
    """The bytes of a checkpoint's tensors, mapped: nothing is read before it is used.

    Args:
        folder: Holds the files that `tensors` name.
        tensors: By name; their places in the files must have been checked.
    """

    def __init__(self, folder: Path, tensors: Mapping[str, TensorSpec]) -> None:
        self._folder = folder
        self._tensors = tensors
        self._files: dict[str, NDArray[np.uint8]] = {}

    def read(self, name: str, rows: slice | None = None) -> NDArray[np.uint8]:
        """The tensor's bytes as they lie in the file (little endian), without a copy.

        Args:
            name: Tensor in the checkpoint.
            rows: Consecutive entries of the first dimension; None: all.

        Returns:
            Read-only bytes, (size,). They stay valid after `close`.

        Raises:
            ModelError: The file has become shorter since its header was read, or cannot be read.
        """
        spec = self._tensors[name]
        start, stop = 0, spec.size_bytes
        if rows is not None:
            num_rows = spec.shape[0] if spec.shape else 1
            first, last, step = rows.indices(num_rows)
            assert step == 1, f"rows must be consecutive, got step {step}"
            row_bytes = spec.size_bytes // num_rows if num_rows else 0
            start, stop = first * row_bytes, max(first, last) * row_bytes
        data = self._map(spec.file)
        if spec.offset_bytes + stop > len(data):
            raise ModelError(
                f"{self._folder / spec.file} has become shorter than its header says.",
                why=f"Tensor {name} ends behind the end of the file.",
                fix="Download the file again, and let nothing write to it meanwhile.",
            )
        return data[spec.offset_bytes + start : spec.offset_bytes + stop]

    def close(self) -> None:
        """Let go of the mapped files; bytes already handed out keep theirs mapped."""
        self._files.clear()

    def _map(self, file: str) -> NDArray[np.uint8]:
        if file not in self._files:
            path = self._folder / file
            try:
                self._files[file] = np.memmap(path, dtype=np.uint8, mode="r")
            except (OSError, ValueError) as error:
                raise ModelError(
                    f"{path} cannot be read.",
                    why=str(error),
                    fix="Check that the file is still there and readable, or download it again.",
                ) from error
        return self._files[file]


def _needed_tensors(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor the decoder needs, by its name in the checkpoint."""
    others = other_tensor_names(spec)
    needed = {others[short]: shape for short, shape in other_tensor_shapes(spec.decoder).items()}
    for layer in spec.decoder.layers:
        shapes = layer_tensor_shapes(spec.decoder, layer)
        names = layer_tensor_names(spec, layer.index)
        needed |= {names[short]: shape for short, shape in shapes.items()}
    return needed


def _mismatch(tensors: Mapping[str, TensorSpec], name: str, shape: tuple[int, ...]) -> str | None:
    """What is wrong with tensor `name`, None if nothing is."""
    tensor = tensors[name]
    parts = quantized_parts(tensors, name)
    if parts is not None:
        if "absmax" not in parts or "quant_map" not in parts:
            return "is in 4 bit, but its block maxima or its code table are missing"
        packed_bytes = (math.prod(shape) + 1) // 2
        if tensor.size_bytes != packed_bytes:
            return f"has {tensor.size_bytes} bytes of 4-bit codes instead of {packed_bytes}"
        return None
    if tensor.dtype not in WEIGHT_DTYPES:
        return f"is stored as {tensor.dtype}, not as one of {', '.join(WEIGHT_DTYPES)}"
    # A scalar may be stored with or without its one dimension.
    if tensor.shape != shape and not (tensor.shape == () and shape == (1,)):
        return f"has shape {tensor.shape} instead of {shape}"
    return None


def _skipped_parts(spec: ModelSpec, needed: Mapping[str, object]) -> tuple[str, ...]:
    """What else the checkpoint holds, in words."""
    conditional = find_conditional(spec.model_type)
    starts = conditional.part_tensors if conditional else {}
    parts: dict[str, None] = {}
    unknown = []
    for name in spec.tensors:
        words = next((words for start, words in starts.items() if name.startswith(start)), None)
        if words is not None:
            parts[words] = None
        elif not _belongs_to_needed(spec, name, needed):
            unknown.append(name)
    order = list(conditional.parts.values()) if conditional else []
    named = sorted(parts, key=order.index)
    if unknown:
        plural = "" if len(unknown) == 1 else "s"
        named.append(f"{len(unknown)} unused tensor{plural} ({_shown(unknown)})")
    return tuple(named)


def _belongs_to_needed(spec: ModelSpec, name: str, needed: Mapping[str, object]) -> bool:
    if name in needed or name.endswith(".rotary_emb.inv_freq"):
        return True
    if name == head_tensor_name(spec.tensor_prefix):
        return True
    weight, separator, _ = name.rpartition(".weight.")
    if separator and f"{weight}.weight" in needed:
        return True  # a part of a 4-bit weight
    # Gemma 4 checkpoints hold K and V of layers that use another layer's; nobody reads them.
    layer = re.match(re.escape(spec.tensor_prefix) + r"layers\.(\d{1,4})\.self_attn\.[kv]_", name)
    if layer is None or int(layer.group(1)) >= spec.decoder.num_layers:
        return False
    return spec.decoder.layers[int(layer.group(1))].kv_source is not None


def _generation_eos(folder: Path, *, name: str) -> tuple[int, ...]:
    path = folder / "generation_config.json"
    if not path.exists():
        return ()
    values = read_json(path, max_bytes=MAX_CONFIG_BYTES)
    return Settings(name=name, values=values, defaults={}).token_ids("eos_token_id")


def _read_license(folder: Path) -> str | None:
    """The licence that the model card's front matter names."""
    path = folder / "README.md"
    if not path.is_file() or path.stat().st_size > MAX_README_BYTES:
        return None
    text = path.read_text(encoding="utf-8", errors="replace")
    if not text.startswith("---"):
        return None
    match = _LICENSE_LINE.search(text.split("\n---", maxsplit=1)[0])
    return match.group(1) if match else None


def _shown(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
