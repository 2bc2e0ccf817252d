"""The store's format: what each blob and table holds, and where.

`CACHE/eightgig/KEY/{manifest.json, layer-000.blob ..., head, embedding, ple, other.safetensors}`.
A blob is one decoder layer as one run of bytes; every part starts at a multiple of
`ALIGNMENT_BYTES`, so that a blob can be copied to the GPU as it is and read in place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

FORMAT_VERSION = 1
ALIGNMENT_BYTES = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class NestedAbsmax:
    """Double quantisation: the 8-bit block maxima and how to read them.

    absmax[i] = code_table[codes[i]] * nested_absmax[i // block_size] + mean

    Attributes:
        offset_bytes: Of the float32 nested maxima in the blob.
        count: Number of nested maxima.
        block_size: Maxima per nested maximum (256 in bitsandbytes).
        mean: bitsandbytes' `offset`, subtracted before the maxima were quantised.
        code_table: Name of the 256-entry table in `Manifest.code_tables`.
    """

    offset_bytes: int
    count: int
    block_size: int
    mean: float
    code_table: str


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """One tensor in a blob.

    Attributes:
        format: `nf4` (two codes a byte, high half first) or `dense`.
        shape: Shape in elements; linear weights are (out, in).
        dtype: Of dense data: `bfloat16`, `float16`, `float32`; of nf4, that of the original.
        offset_bytes, size_bytes: The codes, or the dense data.
        block_size: Elements per block maximum, 0 for dense.
        absmax_offset_bytes: Of the block maxima: uint8 when `nested` is set, else float32.
        absmax_count: Number of block maxima.
        nested: Second level, None when the maxima are float32.
        code_table: Name of the 16-entry table in `Manifest.code_tables`, empty for dense.
    """

    format: Literal["nf4", "dense"]
    shape: tuple[int, ...]
    dtype: str
    offset_bytes: int
    size_bytes: int
    block_size: int = 0
    absmax_offset_bytes: int = 0
    absmax_count: int = 0
    nested: NestedAbsmax | None = None
    code_table: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredBlob:
    """One decoder layer.

    Attributes:
        file: Name in the store's folder.
        size_bytes: Size of the file.
        sha256: Of the file, checked when the blob is first copied.
        tensors: By short name: the linears (`q_proj` ... `down_proj`), `q_bias`, `k_bias`,
            `v_bias`, the norms as float32 with the family's offset added (`input_norm`,
            `post_attention_norm`, `pre_mlp_norm`, `post_mlp_norm`, `q_norm`, `k_norm`),
            `layer_scalar`, `ple_gate`, `ple_projection`, `ple_norm`.
    """

    file: str
    size_bytes: int
    sha256: str
    tensors: Mapping[str, StoredTensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTable:
    """A large table that stays in host memory: embedding, head or per-layer embedding.

    Attributes:
        file: Path of the file: relative to the store, or absolute for an original checkpoint.
        offset_bytes: Start of the data in the file.
        shape: (rows, columns).
        dtype: `bfloat16`, `float16` or `float32`.
    """

    file: str
    offset_bytes: int
    shape: tuple[int, int]
    dtype: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """Everything a store holds.

    Attributes:
        format_version: `FORMAT_VERSION` of the writer.
        key: Name of the store's folder.
        source: Model the weights came from.
        quantization: How linears are kept.
        layers: One blob per decoder layer.
        embedding: Token embedding, (V, D).
        head: Output embedding, (V, D); the same table when tied.
        ple: Per-layer embedding, (V, L * ple_size), None where there is none.
        other_file: safetensors file with the final norm and what stands outside the layers.
        code_tables: Quantisation tables by name.
    """

    format_version: int
    key: str
    source: str
    quantization: Literal["nf4", "none"]
    layers: tuple[StoredBlob, ...]
    embedding: StoredTable
    head: StoredTable
    ple: StoredTable | None
    other_file: str
    code_tables: Mapping[str, tuple[float, ...]]
