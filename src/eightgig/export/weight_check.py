"""The numbers of a written export against their definition: each within its type's own rounding.

A file of 16 or 8 bits never holds exactly what was trained, so answers alone cannot tell a small
fault from rounding: one linear of hundreds that was left unmerged moves them less than the rounding
of all others does. The numbers can. Every type has a largest rounding error, by definition and not
by measurement; a number that is further than that from W + scale B A was not rounded but wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from eightgig.adapters.files import AdapterFolder
from eightgig.adapters.lora import lora_scale
from eightgig.errors import ExportError
from eightgig.export.gguf_file import GgufTensor, load_gguf
from eightgig.export.source import TunedWeights
from eightgig.models.spec import ModelSpec
from eightgig.units import MIB

# The largest error of rounding to nearest, as a share of the number: 2^-p with p bits of precision.
_UNIT_ROUNDOFF: Mapping[str, float] = {"f32": 2.0**-24, "f16": 2.0**-11, "bf16": 2.0**-8}
# Below the smallest normal number it is a share of that instead.
_SMALLEST_STEP: Mapping[str, float] = {"f32": 2.0**-150, "f16": 2.0**-25, "bf16": 2.0**-134}
_Q8_BLOCK = 32
# A block of q8_0 holds whole multiples of a step, of which 127 are its largest number; the number
# is up to half a step off, and the step itself is rounded to float16.
_Q8_ROUNDOFF = 1 / 254 + 2.0**-11
_Q8_SMALLEST = 127 * 2.0**-25
# The products are summed in float32, in an order of their own; a share of a row's largest number.
_ARITHMETIC = 2.0**-16
# Numbers in float64 that are compared at a time: few enough for a processor's cache.
_BLOCK_BYTES = 8 * MIB
_GGUF_KINDS: Mapping[str, str] = {"F32": "f32", "F16": "f16", "BF16": "bf16", "Q8_0": "q8_0"}


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightCheck:
    """What was found in a written file; part of `export.json`.

    Attributes:
        num_tensors: Tensors compared, number by number.
        num_adapted: Those that the adapter changes.
        error_ratio: The largest error, as a share of what rounding may make there.
    """

    num_tensors: int
    num_adapted: int
    error_ratio: float


class DefinedWeights(TunedWeights):
    """The tuned weights by their definition, W + scale B A in float64: slower, and nothing shared
    with the way they are written.
    """

    def __init__(self, spec: ModelSpec, folder: Path, adapter: AdapterFolder) -> None:
        super().__init__(spec, folder, adapter)
        self._adapter = adapter

    def by_module(self) -> dict[str, Callable[[], Iterator[Tensor]]]:
        """What makes each adapted weight, by its module in Transformers."""
        prefixes = self.spec.tensor_prefix, f"{self.spec.module_prefix}."
        return {
            name.replace(*prefixes, 1).removesuffix(".weight"): partial(self.blocks, name)
            for name in sorted(self.adapted_names)
        }

    def blocks(self, name: str) -> Iterator[Tensor]:
        """The tuned tensor `name` in float32, consecutive rows at a time."""
        numbers = self._source.numbers(name)
        if numbers.dim() == 0:
            yield numbers.float()
            return
        module = name.removeprefix(self.spec.tensor_prefix).removesuffix(".weight")
        a = self._adapter.tensors.get(f"{module}.lora_A")
        row_bytes = max(1, 8 * numbers[:1].numel())
        rows = max(1, _BLOCK_BYTES // row_bytes)
        for start in range(0, len(numbers), rows):
            block = numbers[start : start + rows].double()
            if a is not None:
                b = self._adapter.tensors[f"{module}.lora_B"][start : start + rows]
                block = block + lora_scale(self._adapter.lora) * (b.double() @ a.double())
            yield block.float()


class MergedCheck:
    """Compares merged safetensors with their definition, a file at a time.

    Args:
        folder: Holds them.
        weights: What they must hold.
    """

    def __init__(self, folder: Path, weights: DefinedWeights) -> None:
        self._folder = folder
        self._weights = weights
        self._names: set[str] = set()
        self._error_ratio = 0.0

    def check_file(self, name: str) -> None:
        """Compare the tensors of one file.

        Raises:
            ExportError: One is of another kind, or off by more than rounding.
        """
        with safe_open(self._folder / name, framework="pt") as file:
            for tensor in file.keys():  # noqa: SIM118 - it is no dict
                self._check_tensor(tensor, file.get_slice(tensor), file)
                self._names.add(tensor)

    def result(self) -> WeightCheck:
        """What was found, once all files are there.

        Raises:
            ExportError: A tensor that the adapter changes is in none of them.
        """
        missing = sorted(self._weights.adapted_names - self._names)
        if missing:
            raise _refusal(f"{missing[0]} is missing")
        return WeightCheck(
            num_tensors=len(self._names),
            num_adapted=len(self._weights.adapted_names),
            error_ratio=self._error_ratio,
        )

    def _check_tensor(self, name: str, stored: Any, file: Any) -> None:
        weights = self._weights
        if name not in weights.spec.tensors:
            raise _refusal(f"{name} is no tensor of the base model")
        dtype, shape = weights.layout(name)
        if (stored.get_dtype(), tuple(stored.get_shape())) != (dtype, shape):
            raise _refusal(f"{name} is of another dtype or shape than in the base model")
        if name not in weights.adapted_names and not weights.is_four_bit(name):
            self._check_copy(name, stored if shape else file.get_tensor(name))
            return
        start = 0
        for block in weights.blocks(name):
            rows = stored[start : start + len(block)].float()
            start += len(block)
            ratio = _checked(name, rows, block, dtype.lower())
            self._error_ratio = max(self._error_ratio, ratio)

    def _check_copy(self, name: str, stored: Any) -> None:
        original = np.frombuffer(self._weights.raw(name), dtype=np.uint8)
        _, shape = self._weights.layout(name)
        row_bytes = len(original) // shape[0] if shape and shape[0] else max(1, len(original))
        rows = max(1, _BLOCK_BYTES // max(1, row_bytes))
        for start in range(0, shape[0] if shape else 1, rows):
            part = stored[start : start + rows] if shape else stored
            found = part.contiguous().reshape(-1).view(torch.uint8).numpy()
            place = start * row_bytes
            if not np.array_equal(found, original[place : place + len(found)]):
                raise _refusal(f"{name} differs from the base model, and has no adapter")


def check_gguf(path: Path, expected: Sequence[GgufTensor], *, num_adapted: int) -> WeightCheck:
    """Compare the tensors of a GGUF with their definition.

    Args:
        path: The file; of types that are written here.
        expected: What it must hold.
        num_adapted: Tensors among them that the adapter changes.

    Raises:
        ExportError: A tensor is missing, of another shape, or off by more than rounding.
    """
    gguf = load_gguf()
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    missing = sorted({tensor.name for tensor in expected} ^ set(stored))
    if missing:
        raise _refusal(f"{missing[0]} is missing, or too many")
    worst = 0.0
    for tensor in expected:
        found = stored[tensor.name]
        if tuple(reversed(found.shape.tolist())) != tensor.shape:
            raise _refusal(f"{tensor.name} is of another shape than in the base model")
        kind, start = _GGUF_KINDS[found.tensor_type.name], 0
        for block in tensor.blocks():
            rows = found.data[start : start + len(block)]
            start += len(block)
            numbers = gguf.quants.dequantize(np.ascontiguousarray(rows), found.tensor_type)
            values = torch.from_numpy(np.array(numbers, dtype=np.float32)).reshape(block.shape)
            worst = max(worst, _checked(tensor.name, values, block, kind))
    return WeightCheck(num_tensors=len(expected), num_adapted=num_adapted, error_ratio=worst)


def rounding_bound(expected: Tensor, kind: str) -> Tensor:
    """The largest error that rounding to `kind` may make of each of `expected`, and float32 sums.

    Args:
        expected: (..., in) of float32.
        kind: `f32`, `f16`, `bf16` or `q8_0`.
    """
    size = expected.abs()
    if not size.numel():
        return size
    if kind == "q8_0":
        blocks = size.view(*size.shape[:-1], -1, _Q8_BLOCK).amax(-1, keepdim=True)
        rounding = (blocks * _Q8_ROUNDOFF + _Q8_SMALLEST).expand(*blocks.shape[:-1], _Q8_BLOCK)
        rounding = rounding.reshape(size.shape)
    else:
        rounding = size * _UNIT_ROUNDOFF[kind] + _SMALLEST_STEP[kind]
    largest = size.amax(-1, keepdim=True) if size.dim() else size
    return rounding + _ARITHMETIC * largest


def _checked(name: str, found: Tensor, expected: Tensor, kind: str) -> float:
    """The largest error of `found`, as a share of its bound.

    Raises:
        ExportError: It is above 1.
    """
    if not expected.numel():
        return 0.0
    ratio = float(((found - expected).abs_() / rounding_bound(expected, kind)).max())
    if ratio <= 1.0:  # false for NaN
        return ratio
    raise _refusal(
        f"a number of {name} is {ratio:.3g} times as far off as rounding to {kind} can be"
    )


def _refusal(why: str) -> ExportError:
    return ExportError(
        "The export was deleted again: it does not hold the base weights with the adapter added.",
        why=f"Read back from the disk, {why}.",
        fix="Export once more; if it fails again, check the disk and please report this.",
    )
