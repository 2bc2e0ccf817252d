"""Where each tensor of a decoder layer lies in its blob: pure arithmetic, no torch.

Order: the linears as in `models.spec.linear_shapes` (each its codes, block maxima, nested maxima),
biases, norms, layer scalar, per-layer embedding. Layers of one type have one layout, so that a slot
of the ring serves all of them and the planner knows its size before a weight is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal

from eightgig.models.layout import layer_tensor_shapes
from eightgig.models.spec import DecoderSpec, LayerSpec, linear_shapes
from eightgig.quant.manifest import ALIGNMENT_BYTES, NestedAbsmax, StoredTensor

Quantization = Literal["nf4", "none"]

ITEM_BYTES: Mapping[str, int] = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True, kw_only=True, slots=True)
class FourBitFormat:
    """How a linear is quantised: ours by default, or that of a checkpoint taken over.

    Attributes:
        block_size: Values per block maximum.
        nested_block_size: Maxima per nested maximum; None: the maxima are float32.
        code_table: Name of the 16-entry table.
        nested_code_table: Name of the 256-entry table.
    """

    block_size: int = 64
    nested_block_size: int | None = 256
    code_table: str = "nf4"
    nested_code_table: str = "dynamic"


OWN_FORMAT = FourBitFormat()


def layer_layout(
    decoder: DecoderSpec,
    layer: LayerSpec,
    *,
    dtype: str,
    quantization: Quantization = "nf4",
    formats: Mapping[str, FourBitFormat] | None = None,
) -> tuple[dict[str, StoredTensor], int]:
    """The tensors of `layer` by short name with their places, and the blob's size in bytes.

    Args:
        decoder: The stack.
        layer: One of its layers.
        dtype: Of the checkpoint's weights: `bfloat16`, `float16` or `float32`.
        quantization: `nf4`, or `none` for dense linears.
        formats: Linears that the checkpoint holds in 4 bit, and how; they stay as they are.

    Returns:
        Layout with `mean=0.0` wherever a mean stands, and the size of the blob.
    """
    layout = _Layout(dtype=dtype)
    linears = linear_shapes(decoder, layer)
    for name, shape in linears.items():
        own = OWN_FORMAT if quantization == "nf4" else None
        four_bit_format = (formats or {}).get(name, own)
        if four_bit_format is None:
            layout.add_dense(name, shape, dtype)
        else:
            layout.add_four_bit(name, shape, four_bit_format)
    for name, dense_shape in layer_tensor_shapes(decoder, layer).items():
        if name not in linears:
            layout.add_dense(name, dense_shape, stored_dtype(name, dtype))
    return layout.tensors, layout.size_bytes


def stored_dtype(name: str, dtype: str) -> str:
    """Dtype of the dense tensor `name` where the checkpoint's is `dtype`.

    Norms (with the family's offset added) and the layer scalar are float32, so that the kernels
    read one dtype; the rest stays as it is.
    """
    return "float32" if name.endswith("_norm") or name == "layer_scalar" else dtype


def align(offset_bytes: int) -> int:
    """The next multiple of `ALIGNMENT_BYTES`."""
    return -(-offset_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def four_bit_layout(
    shape: tuple[int, ...], *, dtype: str, four_bit_format: FourBitFormat
) -> tuple[StoredTensor, int]:
    """The layout of one 4-bit tensor alone, and its size in bytes."""
    layout = _Layout(dtype=dtype)
    layout.add_four_bit("tensor", shape, four_bit_format)
    return layout.tensors["tensor"], layout.size_bytes


class _Layout:
    """Places parts one after another, each aligned."""

    def __init__(self, *, dtype: str) -> None:
        self.tensors: dict[str, StoredTensor] = {}
        self.size_bytes = 0
        self._dtype = dtype

    def add_dense(self, name: str, shape: tuple[int, ...], dtype: str) -> None:
        """Place numbers of `dtype`."""
        size_bytes = prod(shape) * ITEM_BYTES[dtype]
        self.tensors[name] = StoredTensor(
            format="dense",
            shape=shape,
            dtype=dtype,
            offset_bytes=self._place(size_bytes),
            size_bytes=size_bytes,
        )

    def add_four_bit(
        self, name: str, shape: tuple[int, ...], four_bit_format: FourBitFormat
    ) -> None:
        """Place codes, block maxima and nested maxima."""
        size_bytes = -(-prod(shape) // 2)
        offset_bytes = self._place(size_bytes)
        num_blocks = -(-prod(shape) // four_bit_format.block_size)
        nested_block_size = four_bit_format.nested_block_size
        nested = None
        if nested_block_size is None:
            absmax_offset_bytes = self._place(4 * num_blocks)
        else:
            absmax_offset_bytes = self._place(num_blocks)
            num_nested = -(-num_blocks // nested_block_size)
            nested = NestedAbsmax(
                offset_bytes=self._place(4 * num_nested),
                count=num_nested,
                block_size=nested_block_size,
                mean=0.0,
                code_table=four_bit_format.nested_code_table,
            )
        self.tensors[name] = StoredTensor(
            format="nf4",
            shape=shape,
            dtype=self._dtype,
            offset_bytes=offset_bytes,
            size_bytes=size_bytes,
            block_size=four_bit_format.block_size,
            absmax_offset_bytes=absmax_offset_bytes,
            absmax_count=num_blocks,
            nested=nested,
            code_table=four_bit_format.code_table,
        )

    def _place(self, size_bytes: int) -> int:
        offset_bytes = self.size_bytes
        self.size_bytes = align(offset_bytes + size_bytes)
        return offset_bytes
