"""What enters the first layer: rows of tables that stay in host memory, gathered on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eightgig.data.batches import Batch
from eightgig.engine.batch import MicroBatch, label_positions, row_keys, to_device
from eightgig.engine.decoder import rotary_key
from eightgig.engine.rope import angles, inverse_frequencies
from eightgig.memory.estimate import PLE_TILE_TOKENS
from eightgig.models.spec import DecoderSpec
from eightgig.ops.reference import rms_norm

_PLE_SUM_SCALE = 2.0**-0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class HostInputs:
    """A micro-batch before it goes to the device.

    Attributes:
        batch: The tokens.
        embedding: Rows of the token embedding, (N, D), pinned where there is a GPU.
        ple: Rows of the per-layer embedding, (N, L * P), or None.
        row_keys: (N,) hashes for dropout, or None.
        label_index: Places of the labelled tokens, (n,).
    """

    batch: Batch
    embedding: Tensor
    ple: Tensor | None
    row_keys: NDArray[np.int64] | None
    label_index: NDArray[np.int64]


class Embedding:
    """Token and per-layer embeddings of micro-batches.

    Args:
        decoder: The stack.
        table: Token embedding, (V, D), in host memory.
        ple_table: Per-layer embedding, (V, L * P), None where there is none.
        other: `ple_model_projection` (L * P, D) and `ple_model_norm` (P,) where there are.
        dtype: Compute dtype.
        hidden_dtype: Dtype of the residual stream.
        device: Where layers compute.
    """

    def __init__(
        self,
        decoder: DecoderSpec,
        table: Tensor,
        ple_table: Tensor | None,
        other: Mapping[str, Tensor],
        *,
        dtype: torch.dtype,
        hidden_dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._decoder = decoder
        self._table = table
        self._ple_table = ple_table
        self._dtype = dtype
        self._hidden_dtype = hidden_dtype
        self._device = device
        # Transformers rounds the scale to the dtype of the weights it multiplies. Sent anew for
        # each micro-batch it would make Python wait for all that the device has still to do.
        scale_dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        self._scale = torch.tensor(decoder.embedding_scale, dtype=scale_dtype, device=device)
        self._frequencies = {}
        for layer in decoder.layers:
            frequencies, factor = inverse_frequencies(layer.rope, layer.head_dim)
            self._frequencies[rotary_key(layer)] = (frequencies.to(device), factor)
        if ple_table is not None:
            self._projection = other["ple_model_projection"].to(device, dtype)
            self._norm = other["ple_model_norm"].to(device)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="eightgig-gather")

    def prepare(
        self, batch: Batch, *, seed: int | None = None, step: int = 0
    ) -> Future[HostInputs]:
        """Gather a micro-batch's rows in the background.

        Args:
            batch: The tokens.
            seed: Of dropout; None: no dropout.
            step: Optimizer step that dropout masks depend on.
        """
        return self._thread.submit(self._gather, batch, seed, step)

    def to_device(self, inputs: HostInputs) -> tuple[Tensor, MicroBatch]:
        """The first hidden states (N, D), and what the layers need besides."""
        batch, device = inputs.batch, self._device
        positions = to_device(batch.positions, device)
        micro_batch = MicroBatch(
            num_tokens=batch.num_tokens,
            max_length=batch.max_length,
            cu_seqlens=to_device(batch.cu_seqlens, device),
            rotary={
                key: angles(positions, frequencies, factor)
                for key, (frequencies, factor) in self._frequencies.items()
            },
            row_keys=None if inputs.row_keys is None else to_device(inputs.row_keys, device),
            label_index=to_device(inputs.label_index, device),
            labels=batch.labels[inputs.label_index].astype(np.int64),
        )
        embedded = inputs.embedding.to(device, non_blocking=True).to(self._scale.dtype)
        embedded = embedded * self._scale
        if inputs.ple is not None:
            micro_batch.ple = self._per_layer_inputs(embedded.to(self._dtype), inputs.ple)
        return embedded.to(self._hidden_dtype), micro_batch

    def close(self) -> None:
        """Stop the gathering thread."""
        self._thread.shutdown()

    def _gather(self, batch: Batch, seed: int | None, step: int) -> HostInputs:
        ids = torch.from_numpy(batch.input_ids.astype(np.int64))
        return HostInputs(
            batch=batch,
            embedding=self._rows(self._table, ids),
            ple=None if self._ple_table is None else self._rows(self._ple_table, ids),
            row_keys=None if seed is None else row_keys(batch, seed=seed, step=step),
            label_index=label_positions(batch),
        )

    def _rows(self, table: Tensor, ids: Tensor) -> Tensor:
        out = torch.empty(
            len(ids), table.shape[1], dtype=table.dtype, pin_memory=self._device.type == "cuda"
        )
        torch.index_select(table, 0, ids, out=out)
        return out

    def _per_layer_inputs(self, embedded: Tensor, host_rows: Tensor) -> Tensor:
        """(context + token) / sqrt(2), (N, L, P): see Gemma 3n and 4's per-layer embedding."""
        decoder = self._decoder
        shape = (len(embedded), decoder.num_layers, decoder.ple_size)
        combined = torch.empty(shape, dtype=self._dtype, device=self._device)
        tiles = (part.split(PLE_TILE_TOKENS) for part in (combined, embedded, host_rows))
        for out, tile, rows in zip(*tiles, strict=True):
            context = torch.mm(tile, self._projection.t()) * decoder.hidden_size**-0.5
            context = rms_norm(context.view(out.shape), self._norm, decoder.rms_norm_eps)
            token = rows.to(self._device, non_blocking=True).to(self._dtype).view(out.shape)
            torch.mul(context + token * decoder.ple_size**0.5, _PLE_SUM_SCALE, out=out)
        return combined
