"""The plan: every decision that memory forces, with its reason, before a weight is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from eightgig.config import Choice


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What will run where, and what it will take.

    Attributes:
        fits: Whether peak, host memory and disk stay within their budgets.
        device, compute_dtype: Where and in what the layers compute.
        budget_bytes: What the CUDA allocator may reserve; on a CPU, what host memory allows.
        peak_bytes: Predicted reserved peak; never below the true one.
        breakdown: `peak_bytes` by item: layer_slots, resident_layers, dequant_scratch, lora,
            optimizer, hidden, checkpoints, attention, mlp, head, allocator_slack.
        budget_breakdown: How the budget came about: card, context, display, margin.
        host_bytes, host_budget_bytes: Main memory needed and allowed.
        host_breakdown: `host_bytes` by item.
        disk_bytes: Free disk needed for prepared weights and checkpoints.
        layer_slots: Slots of the ring; each holds one decoder layer or one head chunk.
        resident_layers: Layers that in effect never leave the device.
        micro_batch_tokens: Tokens of packed rows per micro-batch.
        micro_batches_per_visit: G, micro-batches sharing one visit of a layer.
        max_length: Longest row planned for.
        mlp_tile_tokens: Tokens per tile of the MLP.
        head_tile_tokens: Labelled tokens per tile of the head.
        head_chunk_rows: Vocabulary rows per head chunk.
        checkpoints: Where layer inputs wait for the backward pass.
        offload: Outputs kept in host memory instead of recomputed.
        optimizer_place: Where masters and moments of the adapter live.
        host_weights: Prepared layers in pinned memory, in pageable memory, or mapped from disk.
        kernels: `triton` or `plain`.
        choices: Every decision with its reason and best rejected alternative.
        advice: What to change to make it fit, or fit better, least harm first.
        tokens_per_second: Predicted speed, None where no rates are known.
        tokens_per_second_range: Honest range of it (low, high).
    """

    fits: bool
    device: Literal["cuda", "cpu"]
    compute_dtype: Literal["bfloat16", "float16", "float32"]
    budget_bytes: int
    peak_bytes: int
    breakdown: Mapping[str, int]
    budget_breakdown: Mapping[str, int]
    host_bytes: int
    host_budget_bytes: int
    host_breakdown: Mapping[str, int]
    disk_bytes: int
    layer_slots: int
    resident_layers: int
    micro_batch_tokens: int
    micro_batches_per_visit: int
    max_length: int
    mlp_tile_tokens: int
    head_tile_tokens: int
    head_chunk_rows: int
    checkpoints: Literal["device", "host"]
    offload: tuple[str, ...]
    optimizer_place: Literal["host", "device"]
    host_weights: Literal["pinned", "pageable", "mapped"]
    kernels: Literal["triton", "plain"]
    choices: tuple[Choice, ...]
    advice: tuple[str, ...] = ()
    tokens_per_second: float | None = None
    tokens_per_second_range: tuple[float, float] | None = None
