"""The tensors of a checkpoint as torch tensors: mapped, and dense whatever they are stored as."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from eightgig.models.checkpoint import TensorReader
from eightgig.models.spec import ModelSpec
from eightgig.quant.four_bit import FourBitTensor, read_four_bit
from eightgig.quant.mapping import tensor_of

_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "U8": torch.uint8,
    "I8": torch.int8,
}


class CheckpointSource:
    """Reads the checkpoint of `spec` in `folder`; nothing is copied before it is needed."""

    def __init__(self, spec: ModelSpec, folder: Path) -> None:
        self._tensors = spec.tensors
        self._reader = TensorReader(folder, spec.tensors)

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """The tensor by its full name as it is stored, mapped read-only.

        Args:
            name: Full name.
            rows: Consecutive rows of it; None: all. One that lies at an odd byte is copied, so
                take a large table by slices.
        """
        spec = self._tensors[name]
        data = tensor_of(self._reader.read(name, rows))
        dtype = _DTYPES[spec.dtype]
        if data.data_ptr() % dtype.itemsize:
            data = data.clone()  # an odd header length; torch reads at multiples only
        shape = spec.shape if rows is None else (-1, *spec.shape[1:])
        return data.view(dtype).view(shape)

    def four_bit(self, name: str) -> FourBitTensor | None:
        """The weight `name` where it is stored in 4 bit, else None.

        Raises:
            ModelError: Its parts do not match.
        """
        return read_four_bit(self.read, self._tensors, name)

    def numbers(self, name: str) -> Tensor:
        """The weight `name` as numbers: mapped, or what bitsandbytes makes of its 4 bits."""
        stored = self.four_bit(name)
        return self.read(name) if stored is None else stored.dequantize()
