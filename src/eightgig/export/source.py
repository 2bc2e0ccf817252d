"""The base model's tensors with the adapter added: one at a time, a block of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from eightgig.adapters.files import AdapterFolder
from eightgig.adapters.lora import lora_scale
from eightgig.models.checkpoint import TensorReader, quantized_parts
from eightgig.models.read import WEIGHT_DTYPES
from eightgig.models.spec import ModelSpec
from eightgig.quant.source import CheckpointSource
from eightgig.units import MIB

BLOCK_BYTES = 64 * MIB
TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_HEADER_DTYPES = {name: header for header, name in WEIGHT_DTYPES.items()}


class TunedWeights:
    """W + scale B A of every adapted linear, and every other tensor as it is.

    Args:
        spec: The base model, with the tensors of its checkpoint.
        folder: Where its checkpoint lies.
        adapter: What is added to it.
        block_bytes: Most bytes of float32 that are made at a time.
    """

    def __init__(
        self,
        spec: ModelSpec,
        folder: Path,
        adapter: AdapterFolder,
        *,
        block_bytes: int = BLOCK_BYTES,
    ) -> None:
        self.spec = spec
        self._source = CheckpointSource(spec, folder)
        self._reader = TensorReader(folder, spec.tensors)
        self._scale = lora_scale(adapter.lora)
        self._block_bytes = block_bytes
        self._updates = {
            f"{spec.tensor_prefix}{name.removesuffix('.lora_A')}.weight": (
                tensor,
                adapter.tensors[name.removesuffix("A") + "B"],
            )
            for name, tensor in adapter.tensors.items()
            if name.endswith(".lora_A")
        }
        missing = sorted(set(self._updates) - set(spec.tensors))
        assert not missing, f"the checkpoint lacks {missing[:3]}"

    @property
    def adapted_names(self) -> frozenset[str]:
        """Names of the tensors that the adapter changes."""
        return frozenset(self._updates)

    def raw(self, name: str) -> memoryview:
        """The bytes of `name` as the checkpoint holds them, mapped."""
        return self._reader.read(name).data

    def layout(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Dtype (`BF16`, ...) and shape of `name`: of a 4-bit weight those of its original."""
        four_bit = self._source.four_bit(name)
        if four_bit is not None:
            return _HEADER_DTYPES[four_bit.dtype], four_bit.quantized.shape
        tensor = self.spec.tensors[name]
        return tensor.dtype, tensor.shape

    def is_four_bit(self, name: str) -> bool:
        """Whether the checkpoint holds `name` in 4 bit."""
        return quantized_parts(self.spec.tensors, name) is not None

    def blocks(self, name: str) -> Iterator[Tensor]:
        """The tuned tensor `name` in float32, consecutive rows at a time.

        Yields:
            (rows, ...) of float32; a tensor without dimensions as it is.
        """
        numbers = self._source.numbers(name)
        if numbers.dim() == 0:
            yield numbers.float()
            return
        update = self._updates.get(name)
        row_bytes = max(1, 4 * numbers[0].numel()) if len(numbers) else 1
        rows = max(1, self._block_bytes // row_bytes)
        for start in range(0, len(numbers), rows):
            block = numbers[start : start + rows].to(torch.float32, copy=True)
            if update is not None:
                a, b = update
                block += self._scale * (b[start : start + rows] @ a)
            yield block
