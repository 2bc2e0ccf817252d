"""A micro-batch on the device, with what its layers share."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eightgig.data.batches import IGNORE_INDEX, Batch
from eightgig.ops.reference import mix32


@dataclass(kw_only=True)
class MicroBatch:
    """N tokens of whole rows, and what layers hand to each other.

    Attributes:
        num_tokens: N.
        max_length: Tokens of the longest row.
        cu_seqlens: (rows + 1,) int32 on the device.
        rotary: cos and sin, (N, hd/2) float32, by the layer's rotary embedding.
        row_keys: (N,) int64 hashes for dropout, None without.
        ple: Per-layer inputs (N, L, P), None where the family has none.
        label_index: Tokens that carry loss, (n,) int64 on the device.
        labels: Their next tokens, (n,) on the host.
        shared_kv: K and V (N, K, hd) of layers that later layers attend to.
        shared_kv_grads: Their gradients, float32, summed over the later layers.
    """

    num_tokens: int
    max_length: int
    cu_seqlens: Tensor
    rotary: dict[tuple[object, ...], tuple[Tensor, Tensor]]
    row_keys: Tensor | None = None
    ple: Tensor | None = None
    label_index: Tensor
    labels: NDArray[np.int64]
    shared_kv: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    shared_kv_grads: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


def row_keys(batch: Batch, *, seed: int, step: int) -> NDArray[np.int64]:
    """Hash of (seed, step, row, position) for each token, (N,), below 2^32.

    Row and position, not the place in the micro-batch: masks do not depend on packing.
    """
    key = torch.full((batch.num_tokens,), seed & 0xFFFFFFFF, dtype=torch.int64)
    for value in (step, batch.row_ids, batch.positions):
        key = mix32(key ^ torch.as_tensor(value, dtype=torch.int64))
    keys: NDArray[np.int64] = key.numpy()
    return keys


def label_positions(batch: Batch) -> NDArray[np.int64]:
    """Places of the tokens that carry loss, (n,)."""
    return np.flatnonzero(batch.labels != IGNORE_INDEX).astype(np.int64)


def to_device(array: NDArray[np.int64] | NDArray[np.int32], device: torch.device) -> Tensor:
    """A copy of `array` on `device`; on a GPU through pinned memory, without waiting."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
